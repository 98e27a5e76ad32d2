"""Data files behind a URL of fsspec: each is copied once, and again when it changes there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.core import url_to_fs

from collegium.console import progress
from collegium.errors import DataError, first_line
from collegium.storage.files import lock_folder, user_cache, write_json
from collegium.storage.records import read_record

STATES = "files.json"
"""State of each file at the URL when it was copied, by its path in the copy."""


@dataclass(frozen=True)
class RemoteFiles:
    """The copy of a file, a folder, or the files that match a pattern."""

    url: str
    path: Path
    """The copied file, the folder with the copied files, or the pattern in that folder."""
    above: Path
    """The folder in the place of the fixed part of the URL, or for the folder of a single file."""

    def name_of(self, file: Path) -> str:
        """Return the name of a copied file, the same on every machine."""
        inside = file.relative_to(self.above).as_posix()
        return self.url if file == self.path else f"{_fixed_part(self.url)}/{inside}"


@lru_cache
def copy_of(url: str, where: str) -> RemoteFiles:
    """Copy the files of a URL that are new or have changed. Files are listed once per process.

    Raises DataError if the URL cannot be read, or names no file.
    """
    folder = user_cache() / "data" / hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        files, root = url_to_fs(url)
        names = _listed(files, str(root))
        if not names:
            raise FileNotFoundError("no such file")
        # A folder is named after that of the URL, which is the default domain of its files.
        is_file = not has_magic(root) and files.isfile(root)
        top = folder if is_file else folder / (PurePosixPath(_fixed_part(str(root))).name or "data")
        with lock_folder(folder, "wait for it", wait=True):
            _copy(files, names, top, folder / STATES, url)
    # Wide on purpose: the errors of the file systems of fsspec have no common base class.
    except Exception as error:
        raise DataError(
            f"{where}: {url}: cannot be read ({first_line(error)}); must be a file, a folder or a "
            "pattern that fsspec opens; check the name, the network and the credentials, and the "
            f"space in {folder}"
        ) from error
    if is_file:
        return RemoteFiles(url, top / next(iter(names)), top)
    pattern = str(root)[len(_fixed_part(str(root))) :].lstrip("/")
    return RemoteFiles(url, top / pattern, top)


def _listed(files: Any, root: str) -> dict[str, str]:
    """Return the path of each file by its path below the fixed part of `root`."""
    paths = files.glob(root) if has_magic(root) else files.find(root)
    above = _fixed_part(root)
    if not has_magic(root) and paths == [root]:
        above = str(PurePosixPath(root).parent)
    names = {}
    for path in sorted(paths):
        inside = PurePosixPath(path).relative_to(above) if above else PurePosixPath(path)
        if ".." in inside.parts or inside.is_absolute():
            raise ValueError(f"a file is named {path}")
        if not has_magic(root) or files.isfile(path):
            names[inside.as_posix()] = path
    return names


def _fixed_part(url: str) -> str:
    """Return the folder of a URL above the first part with a wildcard, without trailing slash."""
    parts = url.split("/")
    first = next((n for n, part in enumerate(parts) if has_magic(part)), len(parts))
    return "/".join(parts[:first]).rstrip("/")


def _copy(files: Any, names: Mapping[str, str], top: Path, record: Path, url: str) -> None:
    old = read_record(record, dict[str, str]) or {}
    states = {name: str(files.ukey(path)) for name, path in names.items()}
    for name in old.keys() - states.keys():
        (top / name).unlink(missing_ok=True)
    # With the size: a truncated copy would silently be other text.
    missing = [
        name
        for name, path in names.items()
        if old.get(name) != states[name] or not _is_whole(top / name, files.size(path))
    ]
    kept = {name: state for name, state in states.items() if name not in missing}
    if not missing:
        return
    with progress(f"copy {url}") as advance:
        for number, name in enumerate(missing):
            advance(number, len(missing))
            target = top / name
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            files.get_file(names[name], str(part))
            os.replace(part, target)
            # After each file: an interrupted copy goes on with the next one.
            kept[name] = states[name]
            write_json(record, kept)


def _is_whole(file: Path, size: int | None) -> bool:
    """Return whether a copy has the size of the file at the URL, where that is known."""
    return file.is_file() and size in (None, file.stat().st_size)
