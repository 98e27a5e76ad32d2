"""Where documents come from: files, folders and hub data sets, read one document at a time."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

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
from collegium.types import STRICT

__all__ = ["Document", "SourceOptions", "check_sources", "read_documents"]

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


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceOptions:
    """One source of documents: exactly one of `path` and `hub`."""

    path: str | None = None
    """A file, a glob such as `data/*.txt`, or a folder of files."""
    hub: str | None = None
    """A data set of the Hugging Face hub, loaded with `datasets.load_dataset`."""
    name: str | None = None
    """Configuration of the hub data set."""
    split: str = "train"
    """Split of the hub data set."""
    revision: str | None = None
    """Commit or tag of the hub data set."""
    streaming: bool = False
    """Read the hub data set without downloading it whole."""
    domain: str | None = None
    """Label for weights and tables by domain; by default the name of the file, folder or data set."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """Format of the files; `auto` goes by the ending of the name."""
    split_on: Literal["file", "blank_line", "line"] = "file"
    """What one document of a text file is."""
    text_column: str = "text"
    """Field of a row that holds the text."""
    teacher_column: str | None = None
    """Field of a row that names its teacher, for `route`; null leaves the choice to the domain. Not for text files."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Read at most this many documents."""
    max_line_bytes: Annotated[int, Field(ge=1)] = 8_000_000
    """Longest line of a JSONL file."""

    @model_validator(mode="after")
    def _one_origin(self) -> SourceOptions:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of `path` and `hub`")
        return self


def read_documents(options: SourceOptions, *, where: str) -> Iterator[Document]:
    """Yield the documents of a source in the order in which they are stored; blank ones are left out.

    Rows are told apart by their columns: `messages`, `prompt` + `completion`, or the text column.

    Raises:
        DataError: a file is missing, not readable, or holds a row that is not a document;
            or the source holds no document at all.
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
        raise DataError(f"{at(where, label)}: 0 rows; must hold at least one document")
    if num_documents == 0:
        raise DataError(
            f"{at(where, label)}: {num_rows:,} of {num_rows:,} rows have an empty "
            f"`{options.text_column}`; must hold text; set `text_column` to the field that does"
        )


def check_sources(options_list: Sequence[SourceOptions], *, where: str) -> None:
    """Look at every source without reading it whole: files exist, formats are known, first rows parse.

    Raises:
        DataError: as `read_documents`, for the first rows.
    """
    for number, options in enumerate(options_list):
        place = f"{where}[{number}]"
        if options.hub is not None:
            continue
        for file in _find_files(options, place):
            _first_bytes_readable(file, place)
            list(islice(_parse_file(file, options, "", place), _FIRST_ROWS))
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
            f"{at(where, str(file))}: `teacher_column` given for a text file; must be rows of named fields; use JSONL or "
            "Parquet, or name the teacher of its domain"
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
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{at(where, options.hub)}: cannot be loaded ({type(error).__name__}: {reason}); "
            "must be a data set that `datasets.load_dataset` opens; check the name, the network, "
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
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        files = sorted(f for f in path.rglob("*") if f.is_file() and _ending(f) in _FORMATS)
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
    return f"{folder} holds: {shown or 'nothing'}"


def _default_domain(options: SourceOptions, files: Sequence[Path]) -> str:
    assert options.path is not None
    path = Path(os.path.expanduser(options.path))
    if os.path.isdir(path):
        return path.resolve().name
    if len(files) > 1:
        return files[0].resolve().parent.name
    return files[0].name[: len(files[0].name) - len(_ending(files[0]))] or files[0].name


def _ending(file: Path) -> str:
    suffixes = "".join(file.suffixes[-2:]).lower()
    return suffixes if suffixes in _FORMATS else file.suffix.lower()


def _format_of(file: Path, options: SourceOptions, where: str) -> str:
    if options.format != "auto":
        return options.format
    kind = _FORMATS.get(_ending(file))
    if kind is None:
        raise DataError(
            f"{at(where, str(file))}: unknown ending `{_ending(file)}`; must be one of "
            f"{', '.join(_FORMATS)}; set `format` if the content is one of these"
        )
    return kind


def _first_bytes_readable(file: Path, where: str) -> None:
    try:
        with file.open("rb") as handle:
            handle.read(1)
    except OSError as error:
        raise DataError(f"{at(where, str(file))}: cannot be read ({error.strerror})") from error
