"""Sealed entries of stages.json: what each stage wrote, and whether it is still that.

An entry has a digest of itself and of every file of its stage, so a changed byte, a missing file
and an exchanged one are all detected before a finished stage is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from collegium.storage.files import fingerprint, sha256_of
from collegium.storage.records import FileDigest, Stage, read_record

STAGES = "stages.json"


def sealed(name: str, stage: Stage) -> Stage:
    """Return the entry with its digest."""
    return stage.model_copy(update={"sha256": _digest(name, stage.to_json())})


def read_stages(folder: Path) -> tuple[dict[str, Stage], list[str]]:
    """Return the intact entries of a run folder, and the names of the damaged ones.

    Raises CollegiumError if the file is not of this form.
    """
    stages = read_record(folder / STAGES, dict[str, Stage]) or {}
    # As written: a newer version may have added fields.
    entries = read_record(folder / STAGES, dict[str, dict[str, Any]]) or {}
    damaged = [name for name, entry in entries.items() if not _is_intact(name, entry)]
    return {name: stage for name, stage in stages.items() if name not in damaged}, damaged


def file_digest(path: Path) -> FileDigest:
    """Return the size and SHA-256 of a file."""
    return FileDigest(bytes=path.stat().st_size, sha256=sha256_of(path))


def digests_of(folder: Path, files: Iterable[Path]) -> dict[str, FileDigest]:
    """Return the digest of each file, by its name relative to `folder`."""
    return {file.relative_to(folder).as_posix(): file_digest(file) for file in files}


def damage(folder: Path, files: Mapping[str, FileDigest]) -> str | None:
    """Describe the first file that is not the recorded one, None if all of them are."""
    for name, expected in files.items():
        path = folder / name
        if not os.path.isfile(path):  # unlike the method of Path, also for an overlong name
            return f"{name} is missing"
        if (size := path.stat().st_size) != expected.bytes:
            return f"{name} has {size} bytes; must have {expected.bytes}"
        if sha256_of(path) != expected.sha256:
            return f"{name} has a wrong sha256"
    return None


def _is_intact(name: str, entry: Mapping[str, Any]) -> bool:
    # Entries of version 0.1 have neither: they are shown, and their stages are repeated.
    is_old = "sha256" not in entry and "files" not in entry
    return is_old or entry.get("sha256") == _digest(name, entry)


def _digest(name: str, entry: Mapping[str, Any]) -> str:
    return fingerprint([name, {key: value for key, value in entry.items() if key != "sha256"}])
