"""Where a cache lies: a folder of this machine, or one behind any URL that fsspec opens, such as `s3://bucket/cache`.

Shards are streamed, not memory-mapped: a file that shrinks under a map ends the process, where a short read is an error with a name.
"""

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
    """A folder that is read."""

    root: str
    """Its path, or its path inside the file system of the URL."""
    url: str = ""
    """As it was given; empty for a folder of this machine."""
    files: Any = None
    """The file system behind a URL."""

    @classmethod
    def of(cls, where: Path | str) -> Location:
        """A folder or a URL.

        Raises:
            CacheError: nothing opens such a URL.
        """
        text = str(where)
        if isinstance(where, Path) or "://" not in text:
            return cls(text)
        from fsspec.core import url_to_fs

        try:
            files, root = url_to_fs(text)
        except (ImportError, ValueError) as error:
            raise CacheError(
                f"{text}: cannot be opened ({error}); must be a URL that fsspec knows; install what it names"
            ) from error
        return cls(str(root), text.rstrip("/"), files)

    def __str__(self) -> str:
        return self.url or self.root

    def path_of(self, name: str) -> str:
        """A file of the folder, for messages."""
        return f"{self}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""
        if self.files is None:
            path = Path(self.root, name)
            return path.stat().st_size if path.is_file() else None
        try:
            return int(self.files.size(self._inside(name)))
        except FileNotFoundError:
            return None

    def read_bytes(self, name: str) -> bytes | None:
        """The content of a small file; None where there is none.

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
        """The same as text.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not UTF-8.
        """
        data = self.read_bytes(name)
        return None if data is None else data.decode("utf-8")

    def sha256(self, name: str) -> str:
        """SHA-256 of a file, in hex."""
        if self.files is None:
            return sha256_of(Path(self.root, name))
        digest = hashlib.sha256()
        with self.files.open(self._inside(name), "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def parquet(self, name: str) -> pq.ParquetFile:
        """A shard whose pages are verified as they are read."""
        source = Path(self.root, name)
        if self.files is not None:
            source = self.files.open(self._inside(name), "rb")
        return pq.ParquetFile(source, page_checksum_verification=True)

    def parts(self, pattern: str) -> list[Location]:
        """The folders below this one that hold a file like `pattern`, such as `teachers/*/*/manifest.json`."""
        if self.files is None:
            found = sorted(Path(self.root).glob(pattern))
            return [Location(str(file.parent)) for file in found]
        depth = pattern.count("/") + 1
        names = sorted(self.files.glob(self._inside(pattern)))
        ends = ["/".join(str(name).split("/")[-depth:-1]) for name in names]
        return [Location(self._inside(end), f"{self.url}/{end}", self.files) for end in ends]

    def _inside(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"
