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
class Place:
    """A folder that is read."""

    root: str
    """Its path, or its path inside the file system of the URL."""
    url: str = ""
    """As it was given; empty for a folder of this machine."""
    files: Any = None
    """The file system behind a URL."""

    @classmethod
    def of(cls, where: Path | str) -> Place:
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

    def name_of(self, name: str) -> str:
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

    def read_text(self, name: str) -> str | None:
        """The content of a small file; None where there is none.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not UTF-8.
        """
        if self.files is None:
            path = Path(self.root, name)
            return path.read_text(encoding="utf-8") if path.is_file() else None
        try:
            return self.files.cat_file(self._inside(name)).decode("utf-8")
        except FileNotFoundError:
            return None

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

    def parts(self) -> list[Place]:
        """The folders of a cache of either kind: this one, or those of its teachers."""
        pattern = "teachers/*/*/manifest.json"
        if self.files is None:
            found = sorted(Path(self.root).glob(pattern))
            return [Place(str(file.parent)) for file in found] or [self]
        names = sorted(self.files.glob(self._inside(pattern)))
        ends = ["/".join(str(name).split("/")[-4:-1]) for name in names]
        return [Place(self._inside(end), f"{self.url}/{end}", self.files) for end in ends] or [self]

    def _inside(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"
