"""Document sources: files, folders and hub datasets, read one document at a time."""

from __future__ import annotations

import dataclasses
import datetime
import glob
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from collegium.data import readers
from collegium.data.documents import Document, columns_read, parse_rows
from collegium.data.readers import SourceOptions
from collegium.data.remote import copy_of
from collegium.errors import DataError
from collegium.options import option
from collegium.storage.files import listing

Part = Literal["train", "calibration", "validation"]
"""Part of the documents that one dataset holds."""
PARTS: tuple[Part, ...] = ("train", "calibration", "validation")
Truncate = Literal["right", "left", "drop", "error"]
"""Handling of a prompt or chat longer than a window."""
SpecialTokens = Literal["auto", "parse", "text"]
"""Handling of special tokens that are spelled out in documents."""

# The keywords of `datasets`: https://huggingface.co/docs/hub/datasets-file-names-and-splits
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|notice|changelog|contributing|citation|code_of_conduct)\b", re.IGNORECASE
)
_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def _iso_date(value: str) -> str:
    return datetime.date.fromisoformat(value).isoformat()


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
    special_tokens: SpecialTokens = "auto"
    """Special tokens spelled out in documents: `parse` encodes them as such, `text` as plain text.
    `auto` parses them in texts and prompts, which may be rendered chats, but not in messages."""
    date: Annotated[str, AfterValidator(_iso_date)] = "2025-01-01"
    """Today's date for chat templates that print it, so that a run is the same tomorrow."""
    max_train_tokens: Annotated[int, Field(ge=2)] | None = None
    """Train on at most this many tokens, balanced over the domains."""
    max_calibration_tokens: Annotated[int, Field(ge=2)] | None = None
    """Calibrate on at most this many tokens, balanced over the domains."""
    max_validation_tokens: Annotated[int, Field(ge=2)] | None = None
    """Evaluate on at most this many tokens, balanced over the domains."""
    corpus: Path | None = None
    """Folder of encoded corpora, shared between runs. Defaults to `corpus` in the run folder."""

    @model_validator(mode="after")
    def _check_fractions(self) -> DataOptions:
        if self.calibration_fraction + self.validation_fraction >= 1:
            raise ValueError("calibration_fraction + validation_fraction must be less than 1")
        return self

    @property
    def sources(self) -> dict[Part, list[SourceOptions]]:
        """Sources of each part."""
        return {"train": self.train, "calibration": self.calibration, "validation": self.validation}


@dataclass
class SourceSummary:
    """Files and rows of a source, counted while it is read."""

    where: str
    origin: str = ""
    """Path or name of the data set."""
    num_files: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    """Reason by file of a folder that is not read."""
    num_rows: int = 0
    num_blank: int = 0
    num_documents: int = 0
    refused: list[str] = field(default_factory=list)
    """Error of every row that cannot be used."""
    unread_columns: set[str] = field(default_factory=set)
    sample: str = ""
    """A decoded document with its targets marked."""

    def lines(self) -> list[str]:
        """Describe the source, one line per fact."""
        rows = (
            f"{self.where}: {self.origin}: files: {self.num_files:,} read, "
            f"{len(self.skipped):,} skipped; rows: {self.num_rows:,} read, "
            f"{self.num_documents:,} used, {self.num_blank:,} blank, {len(self.refused):,} refused"
        )
        lines = [rows]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [
            f"{self.where}: skipped ({reason}): {', '.join(names[:3])}"
            + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
            for reason, names in by_reason.items()
        ]
        if self.unread_columns:
            columns = ", ".join(sorted(self.unread_columns))
            lines.append(f"{self.where}: columns without effect: {columns}")
        if self.sample:
            lines.append(f"{self.where}: sample, targets in [[ ]]: {self.sample}")
        return lines


def read_documents(
    options: SourceOptions, *, where: str, summary: SourceSummary | None = None
) -> Iterator[Document]:
    """Yield the documents of a source in stored order, skipping blank ones.

    Columns decide the kind of a row, see `collegium.data.documents`. Raises DataError if a file is
    missing or unreadable or the source has no documents, and, after the last row, if any row is
    refused.
    """
    summary = summary or SourceSummary(where)
    for document in chain.from_iterable(_read_source(options, where, summary)):
        summary.num_rows += 1
        if isinstance(document, DataError):
            summary.refused.append(str(document))
        elif document is None:
            summary.num_blank += 1
        else:
            summary.num_documents += 1
            yield document
            if summary.num_documents == options.limit:
                break
    raise_refused(summary.refused, summary.num_rows, where=where)
    place = f"{where}: {options.path or options.url or options.hub}"
    if summary.num_rows == 0:
        raise DataError(f"{place}: got no rows; must have at least one document")
    if summary.num_documents == 0:
        raise DataError(
            f"{place}: rows without text to train on: {summary.num_blank:,} of "
            f"{summary.num_rows:,}; must have text; set `text_column` to the right field"
        )


def raise_refused(errors: Sequence[str], num_rows: int, *, where: str) -> None:
    """Raise DataError if rows were refused: the first three errors and the number of all."""
    if not errors:
        return
    lines = list(errors[:3])
    if len(errors) > 1:
        lines.append(f"{where}: refused rows: {len(errors):,} of {num_rows:,}")
    raise DataError("\n".join(lines))


def check_sources(options_list: Sequence[SourceOptions], *, where: str) -> None:
    """Check that files exist, open and have known formats, without reading in full."""
    for number, options in enumerate(options_list):
        place = f"{where}[{number}]"
        # Checking a hub dataset would download it.
        if options.hub is None:
            for documents in _read_source(options, place, SourceSummary(place)):
                # A refused row is reported with all others, once the source is read in full.
                list(islice(documents, 3))


def _read_source(
    options: SourceOptions, where: str, summary: SourceSummary
) -> Iterator[Iterator[Document | DataError | None]]:
    """Yield the documents of each file, None for a blank row, an error for a refused one."""
    remote = options.url and copy_of(options.url, where)
    options = _local(options, where)
    summary.origin = str(options.path or options.hub)
    saved = Path(os.path.expanduser(summary.origin))
    is_saved = _is_saved(saved)
    if options.hub is not None or is_saved:
        table = _load_saved(saved, options, where) if is_saved else _read_hub(options, where)
        rows_of = {summary.origin: enumerate(table, start=1)}
        domain = summary.origin.rstrip("/").rsplit("/", 1)[-1]
    else:
        files, domain = _find_files(options, where, summary)
        rows_of = {str(file): readers.read_rows(file, options, where=where) for file in files}
    if remote:
        summary.origin = remote.url
        rows_of = {remote.name_of(Path(name)): rows for name, rows in rows_of.items()}
    summary.num_files = len(rows_of)
    columns = columns_read(options)
    for name, rows in rows_of.items():
        yield parse_rows(
            _note_columns(rows, columns, summary.unread_columns),
            name,
            options,
            domain=options.domain or domain,
            where=where,
        )


def source_files(options: SourceOptions, where: str) -> list[Path] | None:
    """Return the files that a source reads, copies of those at a URL. None for a hub dataset.

    Raises DataError if there are none.
    """
    if options.hub is not None:
        return None
    options = _local(options, where)
    folder = Path(os.path.expanduser(str(options.path)))
    if _is_saved(folder):
        return sorted(file for file in folder.rglob("*") if file.is_file())
    return _find_files(options, where, SourceSummary(where))[0]


def _local(options: SourceOptions, where: str) -> SourceOptions:
    """Return a source of copies in the place of one at a URL."""
    if options.url is None:
        return options
    return dataclasses.replace(options, path=str(copy_of(options.url, where).path), url=None)


def source_values(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a source, as plain data, that shape its documents."""
    # Without a URL they are those of a version that had none, so that its runs stay up to date.
    return {name: value for name, value in source.items() if (name, value) != ("url", None)}


def _note_columns(
    rows: Iterable[readers.Row], columns: set[str], unread: set[str]
) -> Iterator[readers.Row]:
    for number, row in rows:
        if isinstance(row, Mapping):
            unread |= {str(name) for name in row} - columns
        yield number, row


def _is_saved(folder: Path) -> bool:
    """Return whether `datasets` wrote the folder with `save_to_disk`."""
    markers = ("state.json", "dataset_dict.json")
    return any(os.path.isfile(folder / name) for name in markers)


def _load_saved(folder: Path, options: SourceOptions, where: str) -> Any:
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    # Wide on purpose: pyarrow's errors and those of `datasets` have no common base class.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{where}: {folder}: cannot be loaded ({type(error).__name__}: {reason}); must be a "
            "folder that `datasets` saved; save it again"
        ) from error
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if options.split not in saved:
        raise DataError(
            f"{where}.split: got `{options.split}`; must be one of {', '.join(map(str, saved))}, "
            f"the splits of {folder}"
        )
    return saved[options.split]


def _read_hub(options: SourceOptions, where: str) -> Iterator[Any]:
    import datasets

    # A stream can fail at any row.
    try:
        yield from datasets.load_dataset(
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
            f"{where}: {options.hub}: cannot be read ({type(error).__name__}: {reason}); "
            "must be a dataset that `datasets.load_dataset` opens; check the name, the network, "
            "`name`, `split` and `revision`"
        ) from error


def _find_files(
    options: SourceOptions, where: str, summary: SourceSummary
) -> tuple[list[Path], str]:
    """Return the files of a source, and its default domain."""
    path = Path(os.path.expanduser(str(options.path)))
    # Unlike the methods of Path, os.path returns False for a name too long for the system.
    is_folder, fault = os.path.isdir(path), "no such file"
    if is_folder:
        files = _files_of_folder(path, options.split, summary)
        fault = f"no {', '.join(readers.FORMATS)} file of the split `{options.split}`"
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


def _files_of_folder(folder: Path, split: str, summary: SourceSummary) -> list[Path]:
    """Return the data files of a folder, and note the reason for every file that is not read."""
    files = []
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        inside = file.relative_to(folder)
        if any(part.startswith((".", "__")) for part in inside.parts):
            reason = "hidden"
        elif _DOCUMENTATION.match(file.name):
            reason = "documentation"
        elif file.name.lower() in _METADATA:
            reason = "metadata"
        elif readers.format_of(file) is None:
            reason = "unknown format"
        else:
            files.append(file)
            continue
        summary.skipped[str(inside)] = reason
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    # A name like `training-diary.txt` is no split: a folder with splits has several.
    if len({*splits.values()} - {None}) < 2:
        return files
    split = _SPLITS.get(split, split)
    for file, other in splits.items():
        if other != split:
            reason = f"split {other}" if other else "no split in its name"
            summary.skipped[str(file.relative_to(folder))] = reason
    return [file for file, other in splits.items() if other == split]


def _split_of(file: Path) -> str | None:
    """Return the split that the name of a file or folder names, the innermost first."""
    for part in reversed(file.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None
