"""Random access by piece key to a cache, in a folder or behind a URL."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from collegium.cache.codecs.hidden import HiddenCodec
from collegium.cache.codecs.targets import TargetCodec
from collegium.cache.index import index_of, is_stored
from collegium.cache.keys import PieceKey
from collegium.cache.manifest import (
    MANIFEST,
    REBUILD,
    Manifest,
    damaged,
    first_error,
    require_identity,
    require_manifest,
    verify_file,
    verify_size,
)
from collegium.cache.shards import (
    Codec,
    Columns,
    RowGroup,
    join_columns,
    list_names,
    read_group,
    read_keys,
    starts_of,
)
from collegium.cache.verified import VerifiedFiles
from collegium.errors import CacheError
from collegium.storage.location import Location

MAX_GROUPS = 256
"""Row groups kept in memory: about 0.1 MB each for targets, 0.3 MB per tap for hidden states."""
SIDE_FILES = {"features": "projection"}
"""Kinds of caches with a file beside the shards, and the stem of its name."""
_log = logging.getLogger(__name__)
Decoded = TypeVar("Decoded")


class CacheReader(Generic[Decoded]):
    """Random access by piece key to a cache. Each shard is verified before it is first read."""

    def __init__(self, location: Location, manifest: Manifest, codec: Codec[Decoded]) -> None:
        """Wrap the manifest and the codec of a cache that `open_cache` has opened."""
        self.location = location
        self.manifest = manifest
        self.codec = codec
        self._files: dict[int, pq.ParquetFile] = {}
        # Per shard: the columns to read, and the first row of each row group.
        self._names: dict[int, list[str]] = {}
        self._starts: dict[int, np.ndarray] = {}
        self._shared: dict[int, np.ndarray] = {}
        # Least recently used first; bounded by `MAX_GROUPS`.
        self._groups: OrderedDict[tuple[int, int], RowGroup] = OrderedDict()
        self._verified = VerifiedFiles.of(location, manifest.sha256)
        self._index = index_of(manifest, self._read_all_keys)

    def __len__(self) -> int:
        return len(self._index)

    def read(self, keys: Sequence[PieceKey]) -> Decoded:
        """Return the joined targets of pieces. Raises CacheError if one is missing or damaged."""
        parts = [self._piece(key) for key in keys]
        # Without a key, the first columns give the names and types of zero rows.
        return self.codec.decode(join_columns(parts or [self._columns(0, 0, 0, 0)]))

    def check(self) -> None:
        """Decode every target. Raises CacheError if a shard holds rows that no builder writes."""
        num_targets = 0
        for shard in range(len(self.manifest.shards)):
            with self._reading(shard) as file:
                num_groups = file.num_row_groups
            for group in range(num_groups):
                columns = self._columns(shard, group, 0, -1)
                self.codec.decode(columns)
                num_targets += self.codec.num_targets(columns)
        if num_targets != self.manifest.num_targets:
            raise CacheError(
                f"{self.location}: holds {num_targets:,} targets; must hold "
                f"{self.manifest.num_targets:,}; build it again"
            )

    def _piece(self, key: PieceKey) -> Columns:
        # No offset: the same window of a document has the same distribution wherever it starts,
        # and a batch does not know where in the document its pieces start.
        place = self._place(key)
        if place is None and self._index.is_stored:
            _log.warning("%s: another key than in its index; the index is made again", key)
            self._index = index_of(self.manifest, self._read_all_keys, is_fresh=True)
            place = self._place(key)
        if place is None:
            raise CacheError(
                f"{self.location}: holds no target for the tokens at {key.offset} of document "
                f"{key.document:016x} in this context; must be built from the same windows; build "
                "the cache again from this recipe"
            )
        shard, group, n = place
        return self._columns(shard, group, n, n + 1)

    def _place(self, key: PieceKey) -> tuple[int, int, int] | None:
        """Return shard, row group and row of a piece. None if it is absent, or another is there."""
        shard, row = self._index.find(key) or (0, -1)
        if row < 0 or shard >= len(self.manifest.shards):
            return None
        with self._reading(shard):
            starts = self._starts[shard]
        group = int(np.searchsorted(starts, row, "right")) - 1
        if group >= len(starts) - 1:
            return None
        n = row - int(starts[group])
        return (shard, group, n) if self._group(shard, group).has(n, key) else None

    def _group(self, shard: int, group: int) -> RowGroup:
        """Return a row group, read if it is not in memory."""
        with self._reading(shard) as file:
            content = self._groups.pop((shard, group), None)
            if content is None:
                content = read_group(file, group, self._names[shard])
            self._groups[shard, group] = content
            if len(self._groups) > MAX_GROUPS:
                self._groups.popitem(last=False)
            return content

    def _columns(self, shard: int, group: int, start: int, stop: int) -> Columns:
        """Unpack the pieces from `start` to `stop` of a row group."""
        lists = self._group(shard, group).lists
        with self._reading(shard) as file:
            if shard not in self._shared and self.codec.shared:
                column = read_group(file, 0, [self.codec.shared]).lists[self.codec.shared]
                self._shared[shard] = column.values[: column.starts[1]]
            spans = {n: slice(c.starts[start], c.starts[stop]) for n, c in lists.items()}
            columns = {n: column.values[spans[n]] for n, column in lists.items()}
            return self.codec.unpack(columns, self._shared.get(shard))

    def _read_all_keys(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the keys of each shard, as `read_keys`."""
        for shard in range(len(self.manifest.shards)):
            # Hashing a large cache takes hours. Pages of keys have checksums of their own, and the
            # key of a piece is compared when it is read.
            with self._reading(shard, verified=not is_stored(self.manifest)) as file:
                yield read_keys(file, range(file.num_row_groups))

    @contextmanager
    def _reading(self, shard: int, *, verified: bool = True) -> Iterator[pq.ParquetFile]:
        """Verify and open a shard once, and report everything that cannot be read in it."""
        entry = self.manifest.shards[shard]
        try:
            if not verified:
                with self.location.parquet(entry.name) as file:
                    yield file
                return
            if shard not in self._files:
                self._verified.verify(entry)
                file = self.location.parquet(entry.name)
                names, codec = list_names(file), self.codec
                if missing := codec.unread - {*names}:
                    raise ValueError(f"no column `{min(missing)}`")
                self._names[shard] = [n for n in names if n not in {codec.shared, *codec.unread}]
                self._files[shard] = file
                rows = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
                self._starts[shard] = starts_of(rows)
            yield self._files[shard]
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
            raise damaged(self.location, entry.name, f"cannot be read ({error})") from error


def open_cache(where: Path | str, expected: Mapping[str, Any] | None = None) -> CacheReader[Any]:
    """Open a finished cache, a folder or a URL, after verifying its identity and sizes of files.

    The checksum of a shard is verified before its targets are first read. Small caches, of which no
    index is stored, are verified now. Raises CacheError if the cache is unfinished, damaged, or,
    unless `expected` is None, of another run.
    """
    location = Location.of(where)
    manifest = require_manifest(where)
    if expected is not None:
        require_identity(where, manifest.identity, expected)
    side = manifest.side_file
    if side:
        verify_file(location, side)
    for entry in manifest.shards:
        verify_size(location, entry)
    try:
        codec = load_codec(manifest.identity, side and location.read_bytes(side.name))
    except ValueError as error:
        file, problem = location.path_of(MANIFEST), first_error(error)
        raise CacheError(f"{file}: identity.{problem}; {REBUILD}") from error
    return CacheReader(location, manifest, codec)


def verify_cache(where: Path | str) -> Manifest:
    """Verify every checksum of a finished cache. Raises as `open_cache`."""
    manifest = require_manifest(where)
    side = manifest.side_file
    for entry in (*([side] if side else []), *manifest.shards):
        verify_file(Location.of(where), entry)
    return manifest


def load_codec(identity: Mapping[str, Any], side: bytes | None) -> TargetCodec | HiddenCodec:
    """Return the codec of a cache with this identity and side file, or raise ValueError."""
    if identity.get("kind") in [*SIDE_FILES]:  # compared, since it may be no text
        return HiddenCodec.load(side or b"")
    return TypeAdapter(TargetCodec).validate_python(identity)
