"""Atomic file writes, checksums and folder locks."""

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
    """Return the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a directory to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically: temporary name, fsync, rename, fsync of the folder.

    Raises:
        OSError: the write failed. No partial file is left.
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
    # The rename is durable only once the directory entry is on disk.
    fsync(path.parent)


@contextmanager
def lock_folder(path: Path, remedy: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, exclusively or `shared`.

    Raises:
        CollegiumError: another process holds the lock. The message ends with `remedy`.
    """
    with hold_lock(path, LOCK, remedy, shared=shared):
        yield


@contextmanager
def hold_lock(path: Path, name: str, remedy: str, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock file `name` of a folder, as `lock_folder` does.

    Raises:
        CollegiumError: another process holds the lock. The message ends with `remedy`.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / name).open("a+") as file:
        _lock_or_refuse(file, path, remedy, shared=shared)
        yield


def _lock_or_refuse(file: Any, path: Path, remedy: str, *, shared: bool) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    # The kernel releases a `flock` with its process, even after SIGKILL: no stale lock files.
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        raise CollegiumError(f"{path}: another process is using this folder; {remedy}") from error
