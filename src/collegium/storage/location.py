"""Location of a cache: a local folder, or a URL that fsspec opens, such as `s3://bucket/cache`."""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from collegium.errors import CacheError
from collegium.storage.credentials import holds_secret
from collegium.storage.files import digest_of


@dataclass(frozen=True, slots=True)
class Location:
    """A readable folder, local or remote."""

    name: str
    """The path or URL as the user wrote it, without a trailing slash."""
    root: str
    """The path inside the file system."""
    files: Any
    """fsspec file system."""

    @classmethod
    def of(cls, where: Path | str) -> Location:
        """Parse a folder or a URL.

        Raises CacheError if fsspec cannot open the URL, or if it holds a password or a key.
        """
        text = str(where)
        if holds_secret(text):
            scheme = text.partition("://")[0]
            raise CacheError(
                f"{scheme}://...: the URL holds a secret; must hold none; keep it in the "
                "environment or in the configuration of fsspec; value not shown"
            )
        if isinstance(where, Path) or "://" not in text:
            # Absolute, because fsspec expands a leading `~`.
            return cls(text, str(Path(text).absolute()), LocalFileSystem())
        try:
            files, root = url_to_fs(text)
        except (ImportError, ValueError) as error:
            raise CacheError(
                f"{text}: cannot be opened ({error}); must be a URL that fsspec knows; install the "
                "package it names"
            ) from error
        return cls(text.rstrip("/"), str(root).rstrip("/"), files)

    def __str__(self) -> str:
        return self.name

    def path_of(self, name: str) -> str:
        """Return the full path of a file, for messages."""
        return f"{self}/{name}"

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None if it does not exist."""
        try:
            return int(self.files.size(self._inside(name)))
        except FileNotFoundError:
            return None

    def changed_at(self, name: str) -> int | None:
        """Return the time of the last change of a local file in ns. None for others, or no file."""
        if not isinstance(self.files, LocalFileSystem):
            return None
        try:
            return Path(self._inside(name)).stat().st_mtime_ns
        except OSError:
            return None

    def read_bytes(self, name: str) -> bytes | None:
        """Read a small file, or None if it does not exist. Raises OSError if it cannot be read."""
        try:
            return self.files.cat_file(self._inside(name))
        except FileNotFoundError:
            return None

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file, in hex."""
        with self.files.open(self._inside(name), "rb") as file:
            return digest_of(file)

    def parquet(self, name: str) -> pq.ParquetFile:
        """Open a shard. Page checksums are verified on read."""
        # Streamed, not memory-mapped: if a mapped file shrinks, the process dies of SIGBUS, while a
        # short read raises an error that names the file.
        path = self._inside(name)
        return pq.ParquetFile(path, filesystem=self.files, page_checksum_verification=True)

    def folders(self, pattern: str) -> list[str]:
        """Return the subfolders with a file that matches, as in `teachers/*/manifest.json`."""
        names = self.files.glob(f"{glob.escape(self.root)}/{pattern}")
        # Keep the tails of the paths of the file system, which also extend a URL.
        depth = pattern.count("/") + 1
        tails = ["/".join(str(name).split("/")[-depth:-1]) for name in sorted(names)]
        return [f"{self}/{tail}" for tail in tails]

    def _inside(self, name: str) -> str:
        return f"{self.root}/{name}"
