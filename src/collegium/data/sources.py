"""Document sources: files, folders and hub datasets, read one document at a time."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from collegium.data.readers import Document, Format, Row, parse_rows, read_rows
from collegium.errors import DataError
from collegium.options import option
from collegium.storage.files import listing

__all__ = [
    "DataOptions",
    "Document",
    "SourceOptions",
    "Truncate",
    "check_sources",
    "read_documents",
]

_FORMATS: dict[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
}
_FIRST_ROWS = 3

Truncate = Literal["right", "left", "drop", "error"]
"""Handling of a prompt or chat longer than a window."""


@option
class SourceOptions:
    """A source of documents: exactly one of `path` and `hub`."""

    path: str | None = None
    """A file, a glob such as `data/*.txt`, or a folder of files."""
    hub: str | None = None
    """A dataset of the Hugging Face hub, loaded with `datasets.load_dataset`."""
    name: str | None = None
    """Configuration of the hub dataset."""
    split: str = "train"
    """Split of the hub dataset."""
    revision: str | None = None
    """Commit or tag of the hub dataset."""
    streaming: bool = False
    """Stream the hub dataset instead of downloading it."""
    domain: str | None = None
    """Label in weights and tables. Defaults to the name of the file, folder or dataset."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """File format. `auto` infers it from the extension."""
    split_on: Literal["file", "blank_line", "line"] = "file"
    """Unit of a text file that makes one document."""
    text_column: str = "text"
    """Row field with the text."""
    teacher_column: str | None = None
    """Row field with the name of its teacher, for `route`. Not for text files.

    Null falls back to the domain.
    """
    limit: Annotated[int, Field(ge=1)] | None = None
    """Read at most this many documents."""
    max_line_bytes: Annotated[int, Field(ge=1)] = 8_000_000
    """Longest line of a JSONL file."""

    @model_validator(mode="after")
    def _check_origin(self) -> SourceOptions:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of `path` and `hub`")
        return self


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

    Raises:
        DataError: a file is missing or unreadable, a row is not a document, or the source has no
            documents.
    """
    num_rows = num_documents = 0
    for document in chain.from_iterable(_read_source(options, where)):
        num_rows += 1
        if document is None:
            continue
        yield document
        num_documents += 1
        if num_documents == options.limit:
            return
    place = f"{where}: {options.path or options.hub}"
    if num_rows == 0:
        raise DataError(f"{place}: got no rows; must have at least one document")
    if num_documents == 0:
        raise DataError(
            f"{place}: rows with an empty `{options.text_column}`: {num_rows:,} of {num_rows:,}; "
            "must have text; set `text_column` to the right field"
        )


def check_sources(options_list: Sequence[SourceOptions], *, where: str) -> None:
    """Check that files exist, formats are known and first rows parse, without reading in full.

    Raises:
        DataError: as `read_documents`, for the first rows.
    """
    for number, options in enumerate(options_list):
        place = f"{where}[{number}]"
        # Checking a hub dataset would download it.
        if options.hub is not None:
            continue
        for documents in _read_source(options, place):
            list(islice(documents, _FIRST_ROWS))
        # Reads up to the first document, and raises for a source that has none.
        next(read_documents(options, where=place))


def _read_source(options: SourceOptions, where: str) -> Iterator[Iterator[Document | None]]:
    """Yield the documents of each file, None for a blank row."""
    if options.hub is not None:
        rows_of = {options.hub: enumerate(_load_hub(options, where), start=1)}
        domain = options.hub.rstrip("/").rsplit("/", 1)[-1]
    else:
        files = _find_files(options, where)
        rows_of = {str(file): _read_file(file, options, where) for file in files}
        domain = _default_domain(options, files)
    for name, rows in rows_of.items():
        yield parse_rows(
            rows,
            name,
            domain=options.domain or domain,
            text_column=options.text_column,
            teacher_column=options.teacher_column,
            where=where,
        )


def _read_file(file: Path, options: SourceOptions, where: str) -> Iterator[Row]:
    form = _FORMATS.get(_extension(file)) if options.format == "auto" else options.format
    if form is None:
        raise DataError(
            f"{where}: {file}: unknown extension `{_extension(file)}`; must be one of "
            f"{', '.join(_FORMATS)}; set `format` if the content is one of these"
        )
    if form == "text" and options.teacher_column is not None:
        raise DataError(
            f"{where}: {file}: got `teacher_column` for a text file; must have named "
            "fields; use JSONL or parquet, or name the teacher of its domain"
        )
    yield from read_rows(
        file,
        form,
        split_on=options.split_on,
        text_column=options.text_column,
        max_line_bytes=options.max_line_bytes,
        where=where,
    )


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


def _find_files(options: SourceOptions, where: str) -> list[Path]:
    path = Path(os.path.expanduser(str(options.path)))
    # Unlike Path.is_file, os.path.isfile is False for a name that is too long for the system.
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        files = sorted(f for f in path.rglob("*") if f.is_file() and _extension(f) in _FORMATS)
        fault = f"no {', '.join(_FORMATS)} file"
    else:
        matches = sorted(glob.glob(str(path), recursive=True))
        files = [file for file in map(Path, matches) if file.is_file()]
        fault = "no such file"
    if not files:
        folder = next(p for p in (path, *path.parents) if os.path.isdir(p))
        raise DataError(f"{where}: {options.path}: {fault}; {folder} contains: {listing(folder)}")
    return files


def _default_domain(options: SourceOptions, files: Sequence[Path]) -> str:
    path = Path(os.path.expanduser(str(options.path)))
    if os.path.isdir(path):
        return path.resolve().name
    if len(files) > 1:
        return files[0].resolve().parent.name
    name, extension = files[0].name, _extension(files[0])
    return name[: len(name) - len(extension)] or name


def _extension(file: Path) -> str:
    suffixes = "".join(file.suffixes[-2:]).lower()
    return suffixes if suffixes in _FORMATS else file.suffix.lower()
