"""Document sources: files, folders and hub datasets, read one document at a time."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from collegium.data.readers import (
    Document,
    Row,
    RowParser,
    at,
    check_text,
    read_jsonl,
    read_parquet,
    read_text_file,
)
from collegium.errors import DataError
from collegium.options import option

__all__ = ["DataOptions", "Document", "SourceOptions", "check_sources", "read_documents"]

_FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
}
_FIRST_ROWS = 3


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
    truncate: Literal["right", "left", "drop", "error"] = "right"
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
        return {
            "train": self.train,
            "calibration": self.calibration,
            "validation": self.validation,
        }


def read_documents(options: SourceOptions, *, where: str) -> Iterator[Document]:
    """Yield the documents of a source in stored order, skipping blank ones.

    Columns decide the kind of a row: `messages`, `prompt` + `completion`, or the text column.

    Raises:
        DataError: a file is missing or unreadable, a row is not a document, or the source has no
            documents.
    """
    num_rows = num_documents = 0
    for document in _read_all(options, where):
        num_rows += 1
        if document is None:
            continue
        yield document
        num_documents += 1
        if num_documents == options.limit:
            return
    label = options.path or options.hub or ""
    if num_rows == 0:
        raise DataError(f"{at(where, label)}: 0 rows; must have at least one document")
    if num_documents == 0:
        raise DataError(
            f"{at(where, label)}: {num_rows:,} of {num_rows:,} rows have an empty "
            f"`{options.text_column}`; must have text; set `text_column` to the right field"
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
        for file in _find_files(options, place):
            _check_readable(file, place)
            # The domain may stay empty: these documents are discarded.
            list(islice(_parse_file(file, options, "", place), _FIRST_ROWS))
        # Reads up to the first document, and raises for a source that has none.
        next(read_documents(options, where=place))


def _read_all(options: SourceOptions, where: str) -> Iterator[Document | None]:
    if options.hub is not None:
        yield from _read_hub(options, where)
        return
    files = _find_files(options, where)
    domain = options.domain or _default_domain(options, files)
    for file in files:
        yield from _parse_file(file, options, domain, where)


def _parse_file(
    file: Path, options: SourceOptions, domain: str, where: str
) -> Iterator[Document | None]:
    kind = _format_of(file, options, where)
    if kind == "text" and options.teacher_column is not None:
        raise DataError(
            f"{at(where, str(file))}: got `teacher_column` for a text file; must have named "
            "fields; use JSONL or parquet, or name the teacher of its domain"
        )
    if kind == "text":
        for line, text in read_text_file(file, options.split_on, where):
            name = str(file) if line is None else f"{file}:{line}"
            check_text(text, "the text", place=at(where, name))
            yield Document(id=name, domain=domain, text=text) if text.strip() else None
        return
    rows: Iterable[Row]
    if kind == "jsonl":
        rows = read_jsonl(file, options.max_line_bytes, where)
    else:
        rows = read_parquet(file, where)
    yield from _parse_rows(rows, str(file), domain, options, where)


def _read_hub(options: SourceOptions, where: str) -> Iterator[Document | None]:
    import datasets

    assert options.hub is not None
    try:
        loaded: Any = datasets.load_dataset(
            options.hub,
            options.name,
            split=options.split,
            revision=options.revision,
            streaming=options.streaming,
        )
    # Wide on purpose: the errors of `load_dataset` have no common base class.
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{at(where, options.hub)}: cannot be loaded ({type(error).__name__}: {reason}); "
            "must be a dataset that `datasets.load_dataset` opens; check the name, the network, "
            "`name`, `split` and `revision`"
        ) from error
    domain = options.domain or options.hub.rstrip("/").rsplit("/", 1)[-1]
    rows = enumerate(loaded, start=1)
    yield from _parse_rows(rows, options.hub, domain, options, where)


def _parse_rows(
    rows: Iterable[Row], label: str, domain: str, options: SourceOptions, where: str
) -> Iterator[Document | None]:
    parser = RowParser(
        text_column=options.text_column, domain=domain, teacher_column=options.teacher_column
    )
    for number, row in rows:
        name = f"{label}:{number}"
        yield parser.parse(row, name, place=at(where, name))


def _find_files(options: SourceOptions, where: str) -> list[Path]:
    assert options.path is not None
    path = Path(os.path.expanduser(options.path))
    # Unlike Path.is_file, os.path.isfile is False for a name that is too long for the system.
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        files = sorted(f for f in path.rglob("*") if f.is_file() and _extension(f) in _FORMATS)
        if not files:
            raise DataError(
                f"{at(where, options.path)}: no {', '.join(_FORMATS)} file; {_contents(path)}"
            )
        return files
    files = [f for f in map(Path, sorted(glob.glob(str(path), recursive=True))) if f.is_file()]
    if not files:
        parent = path.parent
        while not os.path.isdir(parent) and parent != parent.parent:
            parent = parent.parent
        raise DataError(f"{at(where, options.path)}: no such file; {_contents(parent)}")
    return files


def _contents(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    return f"{folder} contains: {shown or 'nothing'}"


def _default_domain(options: SourceOptions, files: Sequence[Path]) -> str:
    assert options.path is not None
    path = Path(os.path.expanduser(options.path))
    if os.path.isdir(path):
        return path.resolve().name
    if len(files) > 1:
        return files[0].resolve().parent.name
    return files[0].name[: len(files[0].name) - len(_extension(files[0]))] or files[0].name


def _extension(file: Path) -> str:
    suffixes = "".join(file.suffixes[-2:]).lower()
    return suffixes if suffixes in _FORMATS else file.suffix.lower()


def _format_of(file: Path, options: SourceOptions, where: str) -> str:
    if options.format != "auto":
        return options.format
    kind = _FORMATS.get(_extension(file))
    if kind is None:
        raise DataError(
            f"{at(where, str(file))}: unknown extension `{_extension(file)}`; must be one of "
            f"{', '.join(_FORMATS)}; set `format` if the content is one of these"
        )
    return kind


def _check_readable(file: Path, where: str) -> None:
    try:
        with file.open("rb") as handle:
            handle.read(1)
    except OSError as error:
        raise DataError(f"{at(where, str(file))}: cannot be read ({error.strerror})") from error
