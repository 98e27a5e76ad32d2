"""Verification of a cache's files when they are first read, remembered for local ones."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from collegium.cache.manifest import FileEntry, verify_file, verify_size
from collegium.storage.files import user_cache
from collegium.storage.location import Location

REMEMBERED_BYTES = 2**20
"""Size from which on a verified file is remembered. A smaller one is read in milliseconds."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class VerifiedFiles:
    """The files of a cache that had their checksum before, by size and time of change.

    One text file per manifest in the user's cache folder, which may be deleted at any time, with a
    line per file. Damage that keeps both is left to the checksums of pages, which are verified on
    every read, and to `collegium cache verify`, which reads all bytes.
    """

    location: Location
    file: Path
    _lines: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, location: Location, digest: str) -> VerifiedFiles:
        """Read what was verified of the cache with this digest of its manifest."""
        file = user_cache() / "verified" / f"{digest}.txt"
        try:
            lines = set(file.read_text(encoding="utf-8").splitlines())
        except (OSError, ValueError):
            lines = set()
        return cls(location, file, lines)

    def verify(self, entry: FileEntry) -> None:
        """Verify size and checksum, the latter only once. Raises as `verify_file`."""
        line = self._line(entry)
        if line is not None and line in self._lines:
            verify_size(self.location, entry)
            return
        verify_file(self.location, entry)
        # Compared again: a file that changed while it was hashed is not the one that was verified.
        if line is None or entry.bytes < REMEMBERED_BYTES or line != self._line(entry):
            return
        self._lines.add(line)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # Appended in one write: processes that verify other shards share the file.
            with self.file.open("a", encoding="utf-8") as lines:
                lines.write(f"{line}\n")
        except OSError as error:
            _log.warning("%s: verified files are not remembered (%s)", self.file, error)

    def _line(self, entry: FileEntry) -> str | None:
        changed = self.location.changed_at(entry.name)
        if changed is None:
            return None
        path = self.location.path_of(entry.name).encode("unicode_escape").decode()
        return f"{entry.sha256} {entry.bytes} {changed} {path}"
