"""Location of a cache: a local folder, or a URL that fsspec opens, such as `s3://bucket/cache`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from collegium.errors import CacheError
from collegium.files import CHUNK_BYTES, sha256_of


@dataclass(frozen=True, slots=True)
class Location:
    """A readable folder, local or remote."""

    root: str
    """Local path, or the path inside the file system of the URL."""
    url: str = ""
    """URL without a trailing slash. Empty for a local folder."""
    files: Any = None
    """fsspec file system of the URL. None for a local folder."""

    @classmethod
    def of(cls, where: Path | str) -> Location:
        """Parse a folder or a URL.

        Raises:
            CacheError: fsspec cannot open the URL.
        """
        text = str(where)
        if isinstance(where, Path) or "://" not in text:
            return cls(text)
        # Imported here, because only URLs need fsspec and the package of their protocol.
        from fsspec.core import url_to_fs

        try:
            files, root = url_to_fs(text)
        except (ImportError, ValueError) as error:
            raise CacheError(
                f"{text}: cannot be opened ({error}); must be a URL that fsspec knows; install the "
                "package it names"
            ) from error
        return cls(str(root), text.rstrip("/"), files)

    def __str__(self) -> str:
        return self.url or self.root

    def path_of(self, name: str) -> str:
        """Return the full path of a file, for messages."""
        return f"{self}/{name}"

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None if it does not exist."""
        if self.files is None:
            path = Path(self.root, name)
            return path.stat().st_size if path.is_file() else None
        try:
            return int(self.files.size(self._inside(name)))
        except FileNotFoundError:
            return None

    def read_bytes(self, name: str) -> bytes | None:
        """Read a small file, or None if it does not exist.

        Raises:
            OSError: it cannot be read.
        """
        if self.files is None:
            path = Path(self.root, name)
            return path.read_bytes() if path.is_file() else None
        try:
            return self.files.cat_file(self._inside(name))
        except FileNotFoundError:
            return None

    def read_text(self, name: str) -> str | None:
        """Read a small UTF-8 text file, or None if it does not exist.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not UTF-8.
        """
        data = self.read_bytes(name)
        return None if data is None else data.decode("utf-8")

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file, in hex."""
        if self.files is None:
            return sha256_of(Path(self.root, name))
        digest = hashlib.sha256()
        with self.files.open(self._inside(name), "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def parquet(self, name: str) -> pq.ParquetFile:
        """Open a shard. Page checksums are verified on read."""
        # Streamed, not memory-mapped: if a mapped file shrinks, the process dies of SIGBUS, while a
        # short read raises an error that names the file.
        source = Path(self.root, name)
        if self.files is not None:
            source = self.files.open(self._inside(name), "rb")
        return pq.ParquetFile(source, page_checksum_verification=True)

    def parts(self, pattern: str) -> list[Location]:
        """Return the subfolders with a file matching `pattern`: `teachers/*/*/manifest.json`."""
        if self.files is None:
            files = sorted(Path(self.root).glob(pattern))
            return [Location(str(file.parent)) for file in files]
        # fsspec returns paths of its file system. Keep their tails, which also extend the URL.
        depth = pattern.count("/") + 1
        names = sorted(self.files.glob(self._inside(pattern)))
        ends = ["/".join(str(name).split("/")[-depth:-1]) for name in names]
        return [Location(self._inside(end), f"{self.url}/{end}", self.files) for end in ends]

    def _inside(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"
