"""Records with a digest of themselves, which notice every changed byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from collegium.console import say
from collegium.errors import CollegiumError, first_line
from collegium.storage.files import fingerprint, write_json
from collegium.storage.records import Record, read_record

T = TypeVar("T", bound=Record)


def write_sealed(path: Path, value: Record) -> None:
    """Write a record with a digest of itself."""
    data = value.model_dump(mode="json")
    write_json(path, {**data, "sha256": fingerprint(data)})


def read_sealed(path: Path, form: type[T]) -> T | None:
    """Read what `write_sealed` wrote. None without a file, or for a damaged one, which is named."""
    if not path.is_file():
        return None
    try:
        data = read_record(path, dict[str, Any]) or {}
        if data.pop("sha256", None) == fingerprint(data):
            return read_record(path, form)
        say(f"{path}: fails its sha256; made again")
    except CollegiumError as error:
        say(f"{first_line(error)}; made again")
    return None
