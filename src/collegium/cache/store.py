"""Random access by piece key to a verified cache, in a folder or behind a URL."""

from __future__ import annotations

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
)
from collegium.cache.shards import (
    KEYS,
    Codec,
    Columns,
    ListColumn,
    join_columns,
    read_group,
    read_keys,
)
from collegium.errors import CacheError
from collegium.storage.location import Location

MAX_GROUPS = 256
"""Row groups kept in memory: about 0.5 MB each for targets, 0.3 MB per tap for hidden states."""
SIDE_FILES = {"features": "projection"}
"""Kinds of caches with a file beside the shards, and the stem of its name."""
Decoded = TypeVar("Decoded")


class CacheReader(Generic[Decoded]):
    """Random access by piece key to a verified cache."""

    def __init__(self, location: Location, manifest: Manifest, codec: Codec[Decoded]) -> None:
        """Wrap a manifest and files that `open_cache` has verified."""
        self.location = location
        self.manifest = manifest
        self.codec = codec
        self._files: dict[int, pq.ParquetFile] = {}
        self._shared: dict[int, np.ndarray] = {}
        # Least recently used first; bounded by `MAX_GROUPS`.
        self._groups: OrderedDict[tuple[int, int], Mapping[str, ListColumn]] = OrderedDict()
        self._addresses: dict[tuple[int, bytes], tuple[int, int, int]] = {}
        for shard in range(len(manifest.shards)):
            with self._reading(shard) as file:
                for group, keys in enumerate(read_keys(file)):
                    for n, key in enumerate(keys):
                        # The first of equal windows wins: all have the same distribution.
                        self._addresses.setdefault((key.document, key.window), (shard, group, n))

    def __len__(self) -> int:
        return len(self._addresses)

    def read(self, keys: Sequence[PieceKey]) -> Decoded:
        """Return the joined targets of pieces. Raises CacheError if one is missing or damaged."""
        addresses = [self._find(key) for key in keys]
        parts = [self._columns(shard, group, n, n + 1) for shard, group, n in addresses]
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

    def _find(self, key: PieceKey) -> tuple[int, int, int]:
        # No offset: the same window of a document has the same distribution wherever it starts,
        # and a batch does not know where in the document its pieces start.
        address = self._addresses.get((key.document, key.window))
        if address is None:
            raise CacheError(
                f"{self.location}: holds no target for the tokens at {key.offset} of document "
                f"{key.document:016x} in this context; must be built from the same windows; build "
                "the cache again from this recipe"
            )
        return address

    def _columns(self, shard: int, group: int, start: int, stop: int) -> Columns:
        """Unpack the pieces from `start` to `stop` of a row group."""
        with self._reading(shard) as file:
            lists = self._groups.pop((shard, group), None)
            if lists is None:
                names = [n for n in file.schema_arrow.names if n not in (*KEYS, self.codec.shared)]
                lists = read_group(file, group, names)
            self._groups[shard, group] = lists
            if len(self._groups) > MAX_GROUPS:
                self._groups.popitem(last=False)
            if shard not in self._shared and self.codec.shared:
                column = read_group(file, 0, [self.codec.shared])[self.codec.shared]
                self._shared[shard] = column.values[: column.starts[1]]
            spans = {n: slice(c.starts[start], c.starts[stop]) for n, c in lists.items()}
            columns = {n: column.values[spans[n]] for n, column in lists.items()}
            return self.codec.unpack(columns, self._shared.get(shard))

    @contextmanager
    def _reading(self, shard: int) -> Iterator[pq.ParquetFile]:
        """Open a shard once, and report everything that cannot be read in it."""
        name = self.manifest.shards[shard].name
        try:
            if shard not in self._files:
                self._files[shard] = self.location.parquet(name)
            yield self._files[shard]
        except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
            raise damaged(self.location, name, f"cannot be read ({error})") from error


def open_cache(where: Path | str, expected: Mapping[str, Any] | None = None) -> CacheReader[Any]:
    """Open a finished cache, a folder or a URL, after verifying every checksum and its identity.

    Raises CacheError if it is unfinished, damaged, or, unless `expected` is None, of another run.
    """
    location = Location.of(where)
    manifest = verify_cache(where, expected)
    side = manifest.side_file
    try:
        codec = load_codec(manifest.identity, side and location.read_bytes(side.name))
    except ValueError as error:
        file, problem = location.path_of(MANIFEST), first_error(error)
        raise CacheError(f"{file}: identity.{problem}; {REBUILD}") from error
    return CacheReader(location, manifest, codec)


def verify_cache(where: Path | str, expected: Mapping[str, Any] | None = None) -> Manifest:
    """Verify the identity of a finished cache, then every checksum. Raises as `open_cache`."""
    manifest = require_manifest(where)
    if expected is not None:
        require_identity(where, manifest.identity, expected)
    side = manifest.side_file
    for entry in (*([side] if side else []), *manifest.shards):
        verify_file(Location.of(where), entry)
    return manifest


def load_codec(identity: Mapping[str, Any], side: bytes | None) -> TargetCodec | HiddenCodec:
    """Return the codec of a cache with this identity and side file, or raise ValueError."""
    if identity.get("kind") in [*SIDE_FILES]:  # compared, since it may be no text
        return HiddenCodec.load(side or b"")
    return TypeAdapter(TargetCodec).validate_python(identity)
