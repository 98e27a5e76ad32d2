"""Documents, and readers of text, JSONL and parquet files that report exact locations in errors."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from collegium.errors import DataError

Row = tuple[int, object]
"""Row number, counted from 1, and the value of the row."""

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TOOL_KEYS = ("tool_calls", "tool_call_id", "function_call")
_SURROGATE = re.compile("[\ud800-\udfff]")
# An over-long line is measured up to this many bytes, for the error message.
_MAX_COUNTED_BYTES = 100_000_000
_GZIP_MAGIC = b"\x1f\x8b"
_TYPE_NAMES = {
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


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


@dataclass(slots=True)
class RowParser:
    """Parser from the rows of one file to documents. The first row fixes the kind of all rows."""

    text_column: str
    domain: str
    teacher_column: str | None = None
    kind: str | None = None

    def parse(self, row: object, name: str, *, place: str) -> Document | None:
        """Return the document of a row, or None if it is blank.

        Raises:
            DataError: a field is missing or of the wrong type, or the text cannot be used.
        """
        if not isinstance(row, Mapping):
            raise DataError(
                f"{place}: record is {_type_name(row)}; must be an object with named fields"
            )
        if self.kind is None:
            self.kind = self._detect(row, place)
        document = self._document(row, name, place)
        if document is None or self.teacher_column is None:
            return document
        # Null means no teacher. An empty string is kept, and rejected later as an unknown name.
        is_named = _field(row, self.teacher_column, place) is not None
        teacher = _text(row, self.teacher_column, place) if is_named else None
        return replace(document, teacher=teacher)

    def _document(self, row: Mapping[str, object], name: str, place: str) -> Document | None:
        if self.kind == "messages":
            messages = _messages(_field(row, "messages", place), place)
            return Document(id=name, domain=self.domain, messages=messages) if messages else None
        if self.kind == "prompt":
            prompt = _text(row, "prompt", place)
            completion = _text(row, "completion", place)
            if not completion.strip():
                return None
            if not prompt:
                raise DataError(
                    f"{place}: `prompt` is empty; must have text; give rows without a prompt as "
                    "`text`"
                )
            return Document(id=name, domain=self.domain, prompt=prompt, completion=completion)
        text = _text(row, self.text_column, place)
        return Document(id=name, domain=self.domain, text=text) if text.strip() else None

    def _detect(self, row: Mapping[str, object], place: str) -> str:
        # An explicit `text_column` overrides the other kinds.
        if self.text_column != "text" and self.text_column in row:
            return "text"
        if "messages" in row:
            return "messages"
        if "prompt" in row and "completion" in row:
            return "prompt"
        if self.text_column in row:
            return "text"
        raise DataError(
            f"{place}: field `{self.text_column}` is missing (has: {', '.join(map(str, row))}); "
            "must have `messages`, `prompt` and `completion`, or a text; set `text_column`"
        )


def at(where: str, name: str) -> str:
    """Join `where: name`, without the empty ones."""
    return ": ".join(part for part in (where, name) if part)


def check_text(text: str, field: str, *, place: str) -> None:
    """Reject characters that no tokenizer should see.

    Raises:
        DataError: the text has a NUL character or an unpaired surrogate.
    """
    column = text.find("\0")
    if column >= 0:
        raise DataError(f"{place}: NUL character at column {column + 1} of {field}; remove it")
    if not text.isascii() and (match := _SURROGATE.search(text)):
        raise DataError(
            f"{place}: lone surrogate U+{ord(match.group()):04X} at column {match.start() + 1} of "
            f"{field}; must be valid Unicode; remove it"
        )


def read_text_file(file: Path, split_on: str, where: str) -> Iterator[tuple[int | None, str]]:
    """Yield (first line number or None for a whole file, text) from a UTF-8 text file.

    A byte order mark is dropped and CRLF becomes LF.
    """
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            _not_utf8(at(where, f"{file}:{line}"), raw[error.start], error.start)
        ) from None
    text = text.replace("\r\n", "\n")
    if split_on == "file":
        if raw:
            yield None, text
        return
    pattern = r"\n(?:[^\S\n]*\n)+" if split_on == "blank_line" else r"\n"
    line, start = 1, 0
    for match in re.finditer(pattern, text):
        piece = text[start : match.start()]
        if piece.strip():
            yield line, piece
        line += text.count("\n", start, match.end())
        start = match.end()
    if text[start:].strip():
        yield line, text[start:]


def read_jsonl(file: Path, max_line_bytes: int, where: str) -> Iterator[Row]:
    """Yield the rows of a JSONL file, gzip-compressed or not, skipping blank lines."""
    label = at(where, str(file))
    with _open(file, label) as handle:
        number, offset = 1, 0
        line = _next_line(handle, max_line_bytes, f"{label}:1", label)
        while line:
            # One line ahead: only the last line of a file can be truncated instead of malformed.
            following = _next_line(handle, max_line_bytes, f"{label}:{number + 1}", label)
            body = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if body.strip():
                start = offset + len(line) - len(body)
                yield number, _parse_line(body, start, not following, f"{label}:{number}")
            number, offset, line = number + 1, offset + len(line), following


def read_parquet(file: Path, where: str) -> Iterator[Row]:
    """Yield the rows of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    label = at(where, str(file))
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{label}: not a complete parquet file ({reason}); copy it again"
        ) from error


def _open(file: Path, label: str) -> BinaryIO:
    if file.suffix.lower() != ".gz":
        return file.open("rb")
    with file.open("rb") as handle:
        magic = handle.read(3)
    if magic and not magic.startswith(_GZIP_MAGIC):
        shown = magic.decode("latin-1")
        raise DataError(
            f"{label}: does not start with the gzip magic (found `{shown}`); must be "
            "gzip-compressed; rename it to .jsonl if it is plain text"
        )
    return gzip.open(file, "rb")  # type: ignore[return-value]


def _next_line(handle: BinaryIO, limit: int, place: str, label: str) -> bytes:
    try:
        line = handle.readline(limit + 2)
        if len(line.rstrip(b"\r\n")) <= limit:
            return line
        size = len(line)
        # A gzip bomb can hold an endless line, so its length is counted up to a limit.
        while size < _MAX_COUNTED_BYTES and not line.endswith(b"\n"):
            line = handle.readline(1 << 20)
            if not line:
                break
            size += len(line)
    except EOFError:
        raise DataError(f"{label}: truncated gzip stream; copy it again") from None
    except (zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{label}: corrupt gzip stream ({error}); copy it again") from error
    raise DataError(
        f"{place}: line of {'more than ' * (size >= _MAX_COUNTED_BYTES)}{size / 1e6:,.1f} MB; "
        f"must be at most {limit / 1e6:,.1f} MB; raise `max_line_bytes`"
    )


def _parse_line(body: bytes, offset: int, is_last: bool, place: str) -> object:
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        # A multi-byte character cut at the end of the file.
        if is_last and error.end == len(body) and error.reason == "unexpected end of data":
            raise DataError(f"{place}: truncated record; copy the file again") from None
        raise DataError(_not_utf8(place, body[error.start], offset + error.start)) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if is_last and _is_truncated(text, error):
            raise DataError(f"{place}: truncated record; copy the file again") from None
        raise DataError(
            f"{place}: invalid JSON at column {error.colno} ({error.msg}); must be one object per "
            "line"
        ) from None
    except RecursionError:
        raise DataError(f"{place}: nested too deeply; must be a flat record") from None


def _is_truncated(text: str, error: json.JSONDecodeError) -> bool:
    # A truncated literal such as `nu` is reported as an invalid value at its start.
    rest = text[error.pos :].strip()
    at_end = error.msg.startswith(("Unterminated string", "Invalid \\")) or not rest
    return at_end or any(word.startswith(rest) for word in ("true", "false", "null"))


def _not_utf8(place: str, byte: int, offset: int) -> str:
    return (
        f"{place}: byte 0x{byte:02X} at offset {offset:,} is not UTF-8; looks like latin-1; "
        "convert it with `iconv -f latin1 -t utf8`"
    )


def _type_name(value: object) -> str:
    return _TYPE_NAMES.get(type(value), f"of type {type(value).__name__}")


def _field(row: Mapping[str, object], name: str, place: str) -> object:
    if name not in row:
        raise DataError(f"{place}: field `{name}` is missing (has: {', '.join(map(str, row))})")
    return row[name]


def _text(row: Mapping[str, object], name: str, place: str) -> str:
    value = _field(row, name, place)
    # A null text counts as blank, so the row is skipped instead of rejected.
    if value is None:
        return ""
    if not isinstance(value, str):
        shown = "" if isinstance(value, list | dict) else f" ({value})"
        raise DataError(f"{place}: `{name}` is {_type_name(value)}{shown}; must be a string")
    check_text(value, f"`{name}`", place=place)
    return value


def _messages(value: object, place: str) -> tuple[Mapping[str, str], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(
            f"{place}: `messages` is {_type_name(value)}; must be a list of role and content"
        )
    messages: list[Mapping[str, str]] = []
    for number, message in enumerate(value):
        name = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise DataError(
                f"{place}: `{name}` is {_type_name(message)}; must be an object with role and "
                "content"
            )
        role = _field(message, "role", f"{place}: {name}")
        if role not in _ROLES:
            raise DataError(f"{place}: unknown role `{role}`; must be one of {', '.join(_ROLES)}")
        if role == "assistant" and messages and messages[-1]["role"] == role:
            raise DataError(
                f"{place}: two consecutive `assistant` turns; must alternate; merge them"
            )
        if used := [key for key in _TOOL_KEYS if message.get(key)]:
            raise DataError(f"{place}: {name} has `{used[0]}`; must have only role and content")
        if not isinstance(_field(message, "content", f"{place}: {name}"), str):
            raise DataError(
                f"{place}: content of {name} is {_type_name(message['content'])}; must be a string"
            )
        messages.append({"role": role, "content": _text(message, "content", f"{place}: {name}")})
    return tuple(messages)
