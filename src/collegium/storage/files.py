"""Atomic file writes, JSON, checksums and folder locks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from collegium.errors import CollegiumError

CHUNK_BYTES = 1 << 20
LOCK = ".lock"
USER_CACHE = "COLLEGIUM_CACHE"
"""Environment variable with the folder of downloads, converted models and indexes."""


def user_cache() -> Path:
    """Return `$COLLEGIUM_CACHE`, or the user's cache folder by default. It may be deleted."""
    if override := os.environ.get(USER_CACHE):
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "collegium"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return digest_of(file)


def digest_of(file: BinaryIO) -> str:
    """Return the SHA-256 of an open file, in hex."""
    digest = hashlib.sha256()
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
    """Write a file atomically, with fsync. A failed write raises OSError and leaves no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # A leftover of a killed process, or a link that somebody put there to redirect the write.
    temporary.unlink(missing_ok=True)
    try:
        # Exclusive creation (O_EXCL) never follows a link.
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    # The rename is durable only once the directory entry is on disk.
    fsync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON (no NaN) atomically."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def listing(folder: Path, limit: int = 12) -> str:
    """Return the names in a folder, without hidden ones, for a message."""
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    names = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of a JSON-serializable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def differing_fields(old: Any, new: Any, where: str = "") -> list[str]:
    """Return `field: old value -> new value` for every leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for key in sorted({*old, *new}, key=str):
            path = f"{where}.{key}" if where else str(key)
            lines += differing_fields(old.get(key), new.get(key), path)
        return lines
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


@contextmanager
def lock_folder(
    path: Path, remedy: str, *, name: str = LOCK, shared: bool = False, wait: bool = False
) -> Iterator[None]:
    """Hold the lock file `name` of a folder, exclusively or `shared`.

    Raises CollegiumError with `remedy` if another process holds it and `wait` is false.
    """
    path.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    try:
        # A lock file may come with a folder of somebody else: a link would create its target.
        descriptor = os.open(path / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if not (path / name).is_symlink():
            raise
        raise CollegiumError(
            f"{path / name}: is a link; must be a plain file; delete it"
        ) from error
    try:
        # The kernel releases a `flock` with its process, even after SIGKILL: no stale lock files.
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, mode if wait else mode | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise CollegiumError(f"{path}: another process is using this folder; {remedy}") from error
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def system_errors() -> Iterator[None]:
    """Raise I/O errors that a library hides in another exception as the OSError that they are.

    safetensors and tokenizers, written in Rust, end their messages with `(os error 28)`.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        match = re.search(r"\(os error (\d+)\)", str(error))
        if match is None:
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number)) from error
