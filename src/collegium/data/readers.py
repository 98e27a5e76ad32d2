"""Documents, and readers of text, JSONL and parquet files that report exact locations in errors.

A file is read as rows, and a row is parsed as a document. A file that cannot be read, a malformed
line, a missing field, or text that cannot be used is a DataError.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from collegium.errors import DataError
from collegium.options import option

Row = tuple[int | None, object]
"""Line or row number, counted from 1, or None for a whole file, and the value of the row."""

FORMATS = {
    **dict.fromkeys((".txt", ".text", ".md"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonl.gz"), "jsonl"),
    ".parquet": "parquet",
}
"""File format by extension."""
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TOOL_KEYS = ("tool_calls", "tool_call_id", "function_call")
# Characters that no tokenizer should see.
_FORBIDDEN = re.compile("[\0\ud800-\udfff]")
_SEPARATORS = {"blank_line": r"\n(?:[^\S\n]*\n)+", "line": r"\n"}
# An over-long line is measured up to this many bytes, for the error message: a gzip bomb can hold
# an endless one.
_MAX_COUNTED_BYTES = 100_000_000


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
    """Row field with the name of its teacher, for `route`, or null to fall back to the domain. Not
    for text files."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Read at most this many documents."""
    max_line_bytes: Annotated[int, Field(ge=1)] = 8_000_000
    """Longest line of a JSONL file."""

    @model_validator(mode="after")
    def _check_origin(self) -> SourceOptions:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of `path` and `hub`")
        return self


@dataclass(frozen=True, slots=True)
class Document:
    """A text, a prompt with its completion, or the messages of a chat."""

    id: str
    """Name of the file or dataset, with the line or row if any. Stable across runs."""
    domain: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    teacher: str | None = None
    """Teacher named by the row, or None."""

    def content_hash(self) -> str:
        """Return the SHA-256 hex digest of the content, regardless of id, domain and teacher."""
        # The prefix keeps a text from colliding with a row that serializes to it.
        if self.text is not None:
            content = "text\0" + self.text
        else:
            messages = [[m["role"], m["content"]] for m in self.messages or ()]
            content = "row\0" + json.dumps([self.prompt, self.completion, messages])
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def parse_rows(
    rows: Iterable[Row], label: str, options: SourceOptions, *, domain: str, where: str
) -> Iterator[Document | None]:
    """Yield the document of each row, None if it is blank. The first row fixes the kind of all."""
    kind = None
    for number, row in rows:
        name = label if number is None else f"{label}:{number}"
        place = f"{where}: {name}"
        if not isinstance(row, Mapping):
            raise DataError(f"{place}: got {_show(row)}; must be an object with named fields")
        kind = kind or _kind_of(row, options.text_column, place)
        content = _content_of(row, kind, options.text_column, place)
        if content is None:
            yield None
            continue
        # Null means no teacher. An empty string is kept, and rejected later as an unknown name.
        column = options.teacher_column
        teacher = None if column is None else _text(row, column, place)
        yield Document(id=name, domain=domain, teacher=teacher, **content)


def extension(file: Path) -> str:
    """Return the extension of a file in lower case, with both parts of `.jsonl.gz`."""
    suffixes = "".join(file.suffixes[-2:]).lower()
    return suffixes if suffixes in FORMATS else file.suffix.lower()


def read_rows(file: Path, options: SourceOptions, *, where: str) -> Iterator[Row]:
    """Yield the rows of a file. Those of a text file have a single field, `text_column`."""
    place = f"{where}: {file}"
    form = FORMATS.get(extension(file)) if options.format == "auto" else options.format
    if form is None:
        raise DataError(
            f"{place}: unknown extension `{extension(file)}`; must be one of "
            f"{', '.join(FORMATS)}; set `format` if the content is one of these"
        )
    if form == "text" and options.teacher_column is not None:
        raise DataError(
            f"{place}: got `teacher_column` for a text file; must have named fields; use JSONL or "
            "parquet, or name the teacher of its domain"
        )
    try:
        if form == "text":
            for number, text in _read_text(file, options.split_on, place):
                yield number, {options.text_column: text}
        elif form == "jsonl":
            yield from _read_jsonl(file, options.max_line_bytes, place)
        else:
            yield from _read_parquet(file, place)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{place}: truncated or damaged gzip stream ({error}); must be gzip-compressed; copy "
            "it again, or rename it to .jsonl if it is plain text"
        ) from error
    except OSError as error:
        raise DataError(f"{place}: cannot be read ({error.strerror or error})") from error


def _read_text(file: Path, split_on: str, place: str) -> Iterator[tuple[int | None, str]]:
    """Yield the pieces of a UTF-8 file with the number of their first line.

    A byte order mark is dropped and CRLF becomes LF.
    """
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{place}:{line}", raw[error.start], error.start) from None
    if split_on == "file":
        if raw:
            yield None, text
        return
    line, start = 1, 0
    for match in re.finditer(rf"{_SEPARATORS[split_on]}|\Z", text):
        piece = text[start : match.start()]
        if piece.strip():
            yield line, piece
        line += text.count("\n", start, match.end())
        start = match.end()


def _read_jsonl(file: Path, max_line_bytes: int, place: str) -> Iterator[Row]:
    open_file: Any = gzip.open if file.suffix.lower() == ".gz" else open
    with open_file(file, "rb") as handle:
        for number in count(1):
            start = handle.tell()
            line = handle.readline(max_line_bytes + 2)
            if not line:
                return
            size = len(line.rstrip(b"\r\n"))
            if size > max_line_bytes:
                while line and not line.endswith(b"\n") and size < _MAX_COUNTED_BYTES:
                    line = handle.readline(1 << 20)
                    size += len(line)
                raise DataError(
                    f"{place}:{number}: line of {'more than ' * (size >= _MAX_COUNTED_BYTES)}"
                    f"{size / 1e6:,.1f} MB; must be at most {max_line_bytes / 1e6:,.1f} MB; raise "
                    "`max_line_bytes`"
                )
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                yield number, _parse_line(line, start, f"{place}:{number}")


def _read_parquet(file: Path, place: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            start = 1
            for batch in table.iter_batches(batch_size=1024):
                yield from enumerate(batch.to_pylist(), start)
                start += batch.num_rows
    except pyarrow.ArrowException as error:
        reason = str(error).split("\n")[0]
        problem = f"not a complete parquet file ({reason}); copy it again"
        raise DataError(f"{place}: {problem}") from error


def _parse_line(line: bytes, start: int, place: str) -> object:
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        # Only at the end of a file: elsewhere a newline follows, an invalid continuation byte.
        if error.reason == "unexpected end of data":
            raise DataError(f"{place}: truncated record; copy the file again") from None
        raise _not_utf8(place, line[error.start], start + error.start) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = "" if text.endswith("\n") else "; if the file was cut off here, copy it again"
        raise DataError(
            f"{place}: invalid JSON at column {error.colno} ({error.msg}); must be one object per "
            f"line{cut}"
        ) from None
    except RecursionError:
        raise DataError(f"{place}: nested too deeply; must be a flat record") from None


def _not_utf8(place: str, byte: int, offset: int) -> DataError:
    return DataError(
        f"{place}: byte 0x{byte:02X} at offset {offset:,} is not UTF-8; looks like latin-1; "
        "convert it with `iconv -f latin1 -t utf8`"
    )


def _kind_of(row: Mapping[str, object], text_column: str, place: str) -> str:
    # An explicit `text_column` overrides the other kinds.
    if text_column != "text" and text_column in row:
        return "text"
    if "messages" in row:
        return "messages"
    if "prompt" in row and "completion" in row:
        return "prompt"
    if text_column in row:
        return "text"
    raise DataError(
        f"{place}: field `{text_column}` is missing (has: {', '.join(map(str, row))}); "
        "must have `messages`, `prompt` and `completion`, or a text; set `text_column`"
    )


def _content_of(
    row: Mapping[str, object], kind: str, text_column: str, place: str
) -> dict[str, Any] | None:
    # A null text counts as blank, so the row is skipped instead of rejected.
    if kind == "messages":
        messages = _messages(_field(row, "messages", place), place)
        return {"messages": messages} if messages else None
    if kind == "text":
        text = _text(row, text_column, place) or ""
        return {"text": text} if text.strip() else None
    prompt, completion = _text(row, "prompt", place), _text(row, "completion", place) or ""
    if not completion.strip():
        return None
    if not prompt:
        raise DataError(
            f"{place}: `prompt` is empty; must have text; give rows without a prompt as `text`"
        )
    return {"prompt": prompt, "completion": completion}


def _field(row: Mapping[str, object], name: str, place: str) -> object:
    if name not in row:
        raise DataError(f"{place}: field `{name}` is missing (has: {', '.join(map(str, row))})")
    return row[name]


def _text(row: Mapping[str, object], name: str, place: str) -> str | None:
    value = _field(row, name, place)
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{place}: `{name}` is {_show(value)}; must be a string")
    if match := _FORBIDDEN.search(value):
        character = f"lone surrogate U+{ord(match[0]):04X}" if ord(match[0]) else "NUL character"
        raise DataError(
            f"{place}: {character} at column {match.start() + 1} of `{name}`; must be valid "
            "Unicode; remove it"
        )
    return value


def _messages(value: object, place: str) -> tuple[Mapping[str, str], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        problem = "must be a list of role and content"
        raise DataError(f"{place}: `messages` is {_show(value)}; {problem}")
    messages: list[Mapping[str, str]] = []
    for number, message in enumerate(value):
        here = f"{place}: messages[{number}]"
        if not isinstance(message, Mapping):
            problem = "must be an object with role and content"
            raise DataError(f"{here}: got {_show(message)}; {problem}")
        role, content = _field(message, "role", here), _text(message, "content", here)
        if role not in _ROLES:
            raise DataError(f"{here}: unknown role `{role}`; must be one of {', '.join(_ROLES)}")
        if role == "assistant" and messages and messages[-1]["role"] == role:
            raise DataError(
                f"{here}: second of two consecutive `assistant` turns; must alternate; merge them"
            )
        if used := [key for key in _TOOL_KEYS if message.get(key)]:
            raise DataError(f"{here}: has `{used[0]}`; must have only role and content")
        if content is None:
            raise DataError(f"{here}: `content` is null; must be a string")
        messages.append({"role": str(role), "content": content})
    return tuple(messages)


def _show(value: object) -> str:
    return json.dumps(value, default=str)[:60]
