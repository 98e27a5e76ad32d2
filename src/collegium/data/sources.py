"""Document sources: files, folders and hub datasets, read one document at a time."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from collegium.data import readers
from collegium.data.readers import Document, SourceOptions
from collegium.errors import DataError
from collegium.options import option
from collegium.storage.files import listing

Truncate = Literal["right", "left", "drop", "error"]
"""Handling of a prompt or chat longer than a window."""


@option
class DataOptions:
    """Corpora, and how they are encoded into windows of tokens."""

    train: Annotated[list[SourceOptions], Field(min_length=1)]
    """Sources to train on."""
    calibration: list[SourceOptions] = Field(default_factory=list)
    """Calibration sources. Defaults to documents held out of `train`."""
    validation: list[SourceOptions] = Field(default_factory=list)
    """Evaluation sources. Defaults to documents held out of `train`."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens per window."""
    packing: bool = True
    """Pack documents together, kept apart. Otherwise one document, or part of one, per window."""
    calibration_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Fraction of the `train` documents held out for calibration, if it has no sources."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Fraction of the `train` documents held out for evaluation, if it has no sources."""
    split_seed: int = 0
    """Seed of the held-out split and of the order of the documents."""
    truncate: Truncate = "right"
    """Handling of prompts and chats longer than a window. Texts are never truncated."""
    max_train_tokens: Annotated[int, Field(ge=2)] | None = None
    """Train on at most this many tokens, balanced over the domains."""
    max_calibration_tokens: Annotated[int, Field(ge=2)] | None = None
    """Calibrate on at most this many tokens, balanced over the domains."""
    max_validation_tokens: Annotated[int, Field(ge=2)] | None = None
    """Evaluate on at most this many tokens, balanced over the domains."""

    @model_validator(mode="after")
    def _check_fractions(self) -> DataOptions:
        if self.calibration_fraction + self.validation_fraction >= 1:
            raise ValueError("calibration_fraction + validation_fraction must be less than 1")
        return self

    @property
    def sources(self) -> dict[str, list[SourceOptions]]:
        """Sources of each part."""
        return {"train": self.train, "calibration": self.calibration, "validation": self.validation}


def read_documents(options: SourceOptions, *, where: str) -> Iterator[Document]:
    """Yield the documents of a source in stored order, skipping blank ones.

    Columns decide the kind of a row: `messages`, `prompt` + `completion`, or the text column.
    Raises DataError if a file is missing or unreadable, a row is not a document, or the source has
    no documents.
    """
    num_blank = num_documents = 0
    for document in chain.from_iterable(_read_source(options, where)):
        if document is None:
            num_blank += 1
            continue
        yield document
        num_documents += 1
        if num_documents == options.limit:
            return
    place = f"{where}: {options.path or options.hub}"
    if num_blank + num_documents == 0:
        raise DataError(f"{place}: got no rows; must have at least one document")
    if num_documents == 0:
        raise DataError(
            f"{place}: rows with an empty `{options.text_column}`: {num_blank:,} of {num_blank:,}; "
            "must have text; set `text_column` to the right field"
        )


def check_sources(options_list: Sequence[SourceOptions], *, where: str) -> None:
    """Check that files exist, formats are known and first rows parse, without reading in full."""
    for number, options in enumerate(options_list):
        place = f"{where}[{number}]"
        # Checking a hub dataset would download it.
        if options.hub is None:
            for documents in _read_source(options, place):
                list(islice(documents, 3))
            # Reads up to the first document, and raises for a source that has none.
            next(read_documents(options, where=place))


def _read_source(options: SourceOptions, where: str) -> Iterator[Iterator[Document | None]]:
    """Yield the documents of each file, None for a blank row."""
    if options.hub is not None:
        rows_of = {options.hub: enumerate(_load_hub(options, where), start=1)}
        domain = options.hub.rstrip("/").rsplit("/", 1)[-1]
    else:
        files, domain = _find_files(options, where)
        rows_of = {str(file): readers.read_rows(file, options, where=where) for file in files}
    for name, rows in rows_of.items():
        yield readers.parse_rows(rows, name, options, domain=options.domain or domain, where=where)


def _load_hub(options: SourceOptions, where: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(
            str(options.hub),
            options.name,
            split=options.split,
            revision=options.revision,
            streaming=options.streaming,
        )
    # Wide on purpose: the errors of `load_dataset` have no common base class.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{where}: {options.hub}: cannot be loaded ({type(error).__name__}: {reason}); "
            "must be a dataset that `datasets.load_dataset` opens; check the name, the network, "
            "`name`, `split` and `revision`"
        ) from error


def _find_files(options: SourceOptions, where: str) -> tuple[list[Path], str]:
    """Return the files of a source, and its default domain."""
    path = Path(os.path.expanduser(str(options.path)))
    # Unlike the methods of Path, os.path returns False for a name too long for the system.
    is_folder, fault = os.path.isdir(path), "no such file"
    if is_folder:
        files = sorted(
            f for f in path.rglob("*") if f.is_file() and readers.extension(f) in readers.FORMATS
        )
        fault = f"no {', '.join(readers.FORMATS)} file"
    elif os.path.isfile(path):
        files = [path]
    else:
        matches = sorted(glob.glob(str(path), recursive=True))
        files = [file for file in map(Path, matches) if file.is_file()]
    if not files:
        folder = next(p for p in (path, *path.parents) if os.path.isdir(p))
        raise DataError(f"{where}: {options.path}: {fault}; {folder} contains: {listing(folder)}")
    if is_folder or len(files) > 1:
        return files, (path if is_folder else files[0].parent).resolve().name
    name = files[0].name
    return files, name[: len(name) - len(readers.extension(files[0]))] or name
