"""Files that are whole or absent, their digests, and a lock on a folder."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from collegium.errors import CollegiumError

CHUNK_BYTES = 1 << 20
LOCK = ".lock"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Have the content of a file, or the names in a folder, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is whole or absent: temporary name, fsync, rename, fsync of the folder.

    Raises:
        OSError: it could not be written; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


@contextmanager
def lock_folder(path: Path, remedy: str, *, shared: bool = False) -> Iterator[None]:
    """Hold a folder while the context lasts; the lock ends with the process, whatever ends it.

    With `shared`, others that share it may hold it too.

    Raises:
        CollegiumError: another process holds it; `remedy` says what to do.
    """
    with hold_lock(path, LOCK, remedy, shared=shared):
        yield


@contextmanager
def hold_lock(path: Path, name: str, remedy: str, *, shared: bool = False) -> Iterator[None]:
    """Hold one lock file of a folder, as `lock_folder` does.

    Raises:
        CollegiumError: as `lock_folder`.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / name).open("a+") as file:
        _lock_or_refuse(file, path, remedy, shared=shared)
        yield


def _lock_or_refuse(file: Any, path: Path, remedy: str, *, shared: bool) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        raise CollegiumError(
            f"{path}: another process is running on this folder; {remedy}"
        ) from error
