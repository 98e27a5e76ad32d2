"""Readers of text, JSON, CSV and parquet files that report exact locations in errors.

A file that cannot be read is a DataError. A row that cannot be read is one too, but in place of its
value, so that the rows after it are read.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import Field, model_validator

from collegium.errors import DataError
from collegium.options import option
from collegium.storage.credentials import URL

Row = tuple[int | None, object]
"""Line or row number, counted from 1, or None for a whole file, and the value of the row."""

FORMATS = {
    **dict.fromkeys((".txt", ".text", ".md"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
"""File format by extension. `.gz` and `.zst` may follow, except for parquet."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# UTF-32 first: its mark starts with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Encodings to name in a message. Several fit most texts, so none is used on its own.
_ENCODINGS = ("gb18030", "big5", "shift_jis", "euc_kr", "cp1251", "cp1252")
_SAMPLE_BYTES = 4096
_SEPARATORS = {"blank_line": r"\n(?:[^\S\n]*\n)+", "line": r"\n"}
# An over-long line is measured up to this many bytes, for the error message: a gzip bomb can hold
# an endless one.
_MAX_COUNTED_BYTES = 100_000_000


@option
class SourceOptions:
    """A source of documents: exactly one of `path`, `url` and `hub`."""

    path: str | None = None
    """A file, a glob such as `data/*.txt`, a folder of files, or a saved `datasets` folder."""
    url: URL | None = None
    """The same at a URL of fsspec, such as `s3://bucket/data/*.jsonl`. Copied before it is read."""
    hub: str | None = None
    """A dataset of the Hugging Face hub, loaded with `datasets.load_dataset`."""
    name: str | None = None
    """Configuration of the hub dataset."""
    split: str = "train"
    """Split of the hub dataset, or of a folder whose files are named after splits."""
    revision: str | None = None
    """Commit or tag of the hub dataset."""
    streaming: bool = False
    """Stream the hub dataset instead of downloading it."""
    domain: str | None = None
    """Label in weights and tables. Defaults to the name of the file, folder or dataset."""
    format: Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet"] = "auto"
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
        if [self.path, self.url, self.hub].count(None) != 2:
            raise ValueError("give exactly one of `path`, `url` and `hub`")
        return self


def extension(file: Path) -> str:
    """Return the extension of a file in lower case, with that of a compression: `.jsonl.gz`."""
    last = file.suffix.lower()
    return "".join(file.suffixes[-2:]).lower() if last in COMPRESSIONS else last


def format_of(file: Path) -> str | None:
    """Return the format of a file by its extension, or None if it is unknown."""
    suffix = extension(file)
    base, _, _ = suffix.rpartition(".")
    form = FORMATS.get(base if suffix.endswith((*COMPRESSIONS,)) else suffix)
    return None if form == "parquet" and base else form


def read_rows(file: Path, options: SourceOptions, *, where: str) -> Iterator[Row]:
    """Yield the rows of a file. Those of a text file have a single field, `text_column`."""
    place = f"{where}: {file}"
    form = format_of(file) if options.format == "auto" else options.format
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
        if form == "parquet":
            yield from _read_parquet(file, place)
            return
        with _open(file) as handle:
            if form == "text":
                for number, text in _read_text(handle.read(), options.split_on, place):
                    yield number, {options.text_column: text}
            elif form == "jsonl":
                yield from _read_jsonl(handle, options.max_line_bytes, place)
            elif form == "json":
                yield from _read_json(handle.read(), options.max_line_bytes, place)
            else:
                yield from _read_csv(handle, "\t" if form == "tsv" else ",", place)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{place}: truncated or damaged gzip stream ({error}); must be gzip-compressed; copy "
            "it again, or rename it to .jsonl if it is plain text"
        ) from error
    except OSError as error:
        raise DataError(f"{place}: cannot be read ({error.strerror or error})") from error


def _open(file: Path) -> IO[bytes]:
    """Open a file for reading UTF-8: decompressed, and recoded from UTF-16 or UTF-32."""
    compression = COMPRESSIONS.get(file.suffix.lower())
    if compression == "zstd":
        import pyarrow

        with pyarrow.input_stream(str(file), compression=compression) as stream:
            handle: IO[bytes] = io.BytesIO(stream.read())
    else:
        open_file: Any = gzip.open if compression else open
        handle = open_file(file, "rb")
    begin = handle.read(4)
    encoding = next((name for mark, name in _MARKS.items() if begin.startswith(mark)), None)
    handle.seek(0)
    if encoding is None:
        return handle
    with handle:
        return io.BytesIO(handle.read().decode(encoding).encode())


def _read_text(raw: bytes, split_on: str, place: str) -> Iterator[tuple[int | None, str]]:
    """Yield the pieces of a UTF-8 file with the number of their first line.

    A byte order mark is dropped and CRLF becomes LF.
    """
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{place}:{line}", raw, error.start, error.start) from None
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


def _read_jsonl(handle: IO[bytes], max_line_bytes: int, place: str) -> Iterator[Row]:
    start = 0
    for number in count(1):
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
            try:
                yield number, _parse_line(line, start, f"{place}:{number}")
            except DataError as error:
                yield number, error
        start += len(line)


def _read_json(raw: bytes, max_line_bytes: int, place: str) -> Iterator[Row]:
    """Yield the rows of a JSON array, of an object with one array of objects, or of JSON lines."""
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{place}:{line}", raw, error.start, error.start) from None
    except json.JSONDecodeError as error:
        # Many files of JSON lines are called .json.
        if error.msg == "Extra data":
            yield from _read_jsonl(io.BytesIO(raw), max_line_bytes, place)
            return
        raise DataError(
            f"{place}:{error.lineno}: invalid JSON at column {error.colno} ({error.msg}); must be "
            "an array of objects; if the file was cut off, copy it again"
        ) from None
    except ValueError as error:  # Python limits the digits of an integer
        raise DataError(f"{place}: invalid JSON ({error}); must be ordinary numbers") from None
    except RecursionError:
        raise DataError(f"{place}: nested too deeply; must be an array of objects") from None
    if isinstance(value, dict):
        tables = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        is_row = "messages" in value or "conversations" in value or len(tables) != 1
        value = [value] if is_row else tables[0]
    if not isinstance(value, list):
        raise DataError(f"{place}: got {show(value)}; must be an array of objects")
    yield from enumerate(value, 1)


def _read_csv(handle: IO[bytes], delimiter: str, place: str) -> Iterator[Row]:
    """Yield the rows of a table whose first line names the columns. Values are strings."""
    text = io.TextIOWrapper(handle, encoding="utf-8-sig", newline="")
    # Strict: a quote that is never closed would swallow the rest of the file.
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    csv.field_size_limit(_MAX_COUNTED_BYTES)
    try:
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                yield (
                    number,
                    DataError(
                        f"{place}:{reader.line_num}: got another number of fields than in the "
                        f"first line ({len(reader.fieldnames or ())}); must be equal; quote fields"
                    ),
                )
            else:
                yield number, row
    except csv.Error as error:
        raise DataError(
            f"{place}:{reader.line_num}: invalid CSV ({error}); must have closed quotes"
        ) from None
    except UnicodeDecodeError as error:
        raw = bytes(error.object)
        raise _not_utf8(f"{place}:{reader.line_num + 1}", raw, error.start, error.start) from None
    finally:
        text.detach()  # the caller closes the file


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
        raise _not_utf8(place, line, error.start, start + error.start) from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        cut = "" if text.endswith("\n") else "; if the file was cut off here, copy it again"
        raise DataError(
            f"{place}: invalid JSON at column {error.colno} ({error.msg}); must be one object per "
            f"line{cut}"
        ) from None
    except ValueError as error:  # Python limits the digits of an integer
        raise DataError(f"{place}: invalid JSON ({error}); must be ordinary numbers") from None
    except RecursionError:
        raise DataError(f"{place}: nested too deeply; must be a flat record") from None


def _not_utf8(place: str, raw: bytes, at: int, offset: int) -> DataError:
    """Return the error for raw[at], which is byte `offset` of the file."""
    sample = raw[:_SAMPLE_BYTES]
    fits = [name for name in _ENCODINGS if _decodes(sample, name)]
    hint = f"; it could be {' or '.join(fits)}" if fits else ""
    return DataError(
        f"{place}: byte 0x{raw[at]:02X} at offset {offset:,} is not UTF-8{hint}; must be UTF-8; "
        "convert it from the encoding that it was written in, and look at the result"
    )


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError as error:
        # The sample may end inside a character.
        return len(raw) == _SAMPLE_BYTES and error.start >= len(raw) - 4
    return True


def show(value: object) -> str:
    """Return the beginning of a value as JSON, for a message."""
    return json.dumps(value, default=str)[:60]
