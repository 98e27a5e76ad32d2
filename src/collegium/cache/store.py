"""A cache on disk: shards, and a manifest with the name, size and digest of each.

    manifest.json   {"format", "identity": everything the targets depend on,
                     "shards": [{"name", "sha256", "bytes", "targets"}],
                     "num_targets", "num_bytes", "sha256": digest of all other fields}
    shard-00000-<first digits of its sha256>.parquet ...

A cache with another identity than the run's is refused, and so is a shard that fails its checksum.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from collegium.cache.codec import STEP, EncodedRows, decode_rows
from collegium.cache.layout import Layout, entropy_name, log_z_name
from collegium.cache.shards import PieceKey, read_group, read_keys, read_vocabulary
from collegium.distributions import NamedRows, StoredScalars
from collegium.errors import CacheError
from collegium.storage.files import differing_fields, fingerprint
from collegium.storage.location import Location

FORMAT = 2
"""Version of docs/cache-format.md. Any other is refused."""
MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"shard-(\d{5,})-([0-9a-f]{16})\.parquet")
MAX_GROUPS = 256
"""Decoded row groups kept in memory, about 1 MB each."""
MAX_FIELDS = 8
"""Differing identity fields shown in one message."""


@dataclass(frozen=True, slots=True)
class _PieceAddress:
    shard: int
    group: int
    piece: int


class TargetCache:
    """Random access by piece key to a verified cache."""

    def __init__(self, location: Location, manifest: Mapping[str, Any]) -> None:
        """Wrap a manifest and shards that `open_cache` has verified."""
        self.location = location
        self.manifest = manifest
        identity = manifest["identity"]
        self.layout = Layout.of_identity(identity)
        self.vocab_size = int(identity["vocab_size"])
        self._names = [shard["name"] for shard in manifest["shards"]]
        self._files: dict[int, pq.ParquetFile] = {}
        self._vocabularies: dict[int, np.ndarray] = {}
        # Least recently used first; bounded by `MAX_GROUPS`.
        self._groups: OrderedDict[tuple[int, int], tuple[NamedRows, EncodedRows, np.ndarray]] = (
            OrderedDict()
        )
        self._addresses = self._index()

    @property
    def digest(self) -> str:
        """Digest of the manifest, which covers every byte of the cache."""
        return str(self.manifest["sha256"])

    def __len__(self) -> int:
        return len(self._addresses)

    def rows(self, keys: Sequence[PieceKey]) -> NamedRows:
        """Return the concatenated targets of pieces. The offset of a key is ignored.

        Raises:
            CacheError: a piece is missing, or its shard was damaged after opening.
        """
        parts = []
        for key in keys:
            sparse, _, starts, piece = self._lookup(key)
            parts.append(sparse.block(slice(int(starts[piece]), int(starts[piece + 1]))))
        return join_rows(parts, self)

    def stored(self, keys: Sequence[PieceKey]) -> NamedRows:
        """Return the rows of a single-teacher cache with their levels and scalars.

        Raises:
            CacheError: see `rows`.
        """
        parts, levels = [], []
        scalars: dict[str, list[np.ndarray]] = {name: [] for name in self.layout.scalars}
        for key in keys:
            sparse, encoded, starts, piece = self._lookup(key)
            span = slice(int(starts[piece]), int(starts[piece + 1]))
            parts.append(sparse.block(span))
            for name, column in scalars.items():
                column.append(encoded.scalars[name][span])
            if encoded.levels is not None:
                entries = slice(int(sparse.starts[span.start]), int(sparse.starts[span.stop]))
                levels.append(encoded.levels[entries])
        rows = join_rows(parts, self)
        logp_E = torch.from_numpy(np.concatenate(levels) * np.float32(-STEP)) if levels else None
        columns = {name: _column(column) for name, column in scalars.items()}
        temperatures = self.layout.temperatures
        stored = StoredScalars(
            columns["label_logp"],
            columns["max_logp"],
            {value: columns[entropy_name(value)] for value in (1.0, *temperatures)},
            {value: columns[log_z_name(value)] for value in temperatures},
        )
        return replace(rows, token_logp=logp_E, stored=stored)

    def scalars(self, key: PieceKey) -> dict[str, np.ndarray]:
        """Return (n,) float16 of each scalar of one piece.

        Raises:
            CacheError: see `rows`.
        """
        _, encoded, starts, piece = self._lookup(key)
        span = slice(int(starts[piece]), int(starts[piece + 1]))
        return {name: values_n[span] for name, values_n in encoded.scalars.items()}

    def check(self) -> None:
        """Decode every target.

        Raises:
            CacheError: a shard holds rows that no builder writes.
        """
        num_targets = 0
        for shard in range(len(self._names)):
            for group in range(self._file(shard).num_row_groups):
                num_targets += len(self._group(shard, group)[0])
        if num_targets != self.manifest["num_targets"]:
            raise CacheError(
                f"{self.location}: holds {num_targets:,} targets; must hold "
                f"{self.manifest['num_targets']:,}; build it again"
            )

    def _lookup(self, key: PieceKey) -> tuple[NamedRows, EncodedRows, np.ndarray, int]:
        # No offset: the same window of a document has the same distribution wherever it starts,
        # and a batch does not know where in the document its pieces start.
        address = self._addresses.get((key.document, key.window))
        if address is None:
            raise CacheError(
                f"{self.location}: holds no target for the tokens at {key.offset} of document "
                f"{key.document:016x} in this context; must be built from the same windows; build "
                "the cache again from this recipe"
            )
        return *self._group(address.shard, address.group), address.piece

    def _group(self, shard: int, group: int) -> tuple[NamedRows, EncodedRows, np.ndarray]:
        decoded = self._groups.get((shard, group))
        if decoded is not None:
            self._groups.move_to_end((shard, group))
            return decoded
        try:
            file = self._file(shard)
            if shard not in self._vocabularies:
                self._vocabularies[shard] = read_vocabulary(file)
            encoded, starts = read_group(file, group, self.layout, self._vocabularies[shard])
            decoded = decode_rows(self.layout.targets, encoded, self.vocab_size), encoded, starts
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(shard, error) from error
        self._groups[shard, group] = decoded
        if len(self._groups) > MAX_GROUPS:
            self._groups.popitem(last=False)
        return decoded

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            self._files[shard] = self.location.parquet(self._names[shard])
        return self._files[shard]

    def _index(self) -> dict[tuple[int, bytes], _PieceAddress]:
        addresses: dict[tuple[int, bytes], _PieceAddress] = {}
        for shard in range(len(self._names)):
            try:
                groups = read_keys(self._file(shard))
            except (OSError, ValueError, KeyError) as error:
                raise self._damaged(shard, error) from error
            for group, keys in enumerate(groups):
                for piece, key in enumerate(keys):
                    # The first of equal windows wins: all have the same distribution.
                    addresses.setdefault(
                        (key.document, key.window), _PieceAddress(shard, group, piece)
                    )
        return addresses

    def _damaged(self, shard: int, error: Exception) -> CacheError:
        return CacheError(
            f"{self.location.path_of(self._names[shard])}: cannot be read ({error}); must be the "
            "file that the cache was built with; delete it and build the cache again, all other "
            "shards are kept"
        )


def open_cache(where: Path | str, expected: Mapping[str, Any] | None = None) -> TargetCache:
    """Open a finished cache after verifying its identity and the checksum of every file.

    Args:
        where: the folder, or its URL.
        expected: the identity that the run needs, or None to accept any.

    Raises:
        CacheError: the cache is unfinished, damaged, or built for another run (names the fields).
    """
    location = Location.of(where)
    manifest = require_manifest(where)
    if expected is not None:
        require_identity(where, manifest["identity"], expected)
    for shard in manifest["shards"]:
        verify_file(location, shard)
    return TargetCache(location, manifest)


def cache_folders(where: Path | str) -> list[str]:
    """Return the folder of a fused cache, or the folders of a per-teacher cache."""
    return Location.of(where).folders(f"teachers/*/*/{MANIFEST}") or [str(where)]


def require_manifest(where: Path | str) -> dict[str, Any]:
    """Read the manifest of a finished cache.

    Raises:
        CacheError: there is none, or `read_manifest` fails.
    """
    manifest = read_manifest(where)
    if manifest is None:
        raise CacheError(
            f"{where}: no finished cache; must hold {MANIFEST}; build it with `collegium cache`"
        )
    return manifest


def read_manifest(where: Path | str) -> dict[str, Any] | None:
    """Read the manifest of a finished cache, or None if there is none.

    Raises:
        CacheError: it is damaged or has another format.
    """
    return load_manifest(where, MANIFEST, FORMAT)


def load_manifest(where: Path | str, name: str, version: int) -> dict[str, Any] | None:
    """Read a manifest of format `version`, or None if there is none.

    Raises:
        CacheError: it is damaged or has another format.
    """
    location = Location.of(where)
    file = location.path_of(name)
    try:
        text = location.read_bytes(name)
        if text is None:
            return None
        manifest = json.loads(text)
    except (OSError, ValueError) as error:
        raise CacheError(f"{file}: damaged ({error}); build the cache again") from error
    if not isinstance(manifest, dict) or manifest.get("sha256") != manifest_digest(manifest):
        raise CacheError(f"{file}: fails its own sha256; delete it and build the cache again")
    if manifest["format"] != version:
        is_newer = manifest["format"] > version
        remedy = "upgrade collegium" if is_newer else "delete the folder and build the cache again"
        raise CacheError(f"{file}: got format {manifest['format']}; must be {version}; {remedy}")
    return manifest


def summary(manifest: Mapping[str, Any]) -> str:
    """Describe the size of a finished cache in one line."""
    num_targets, num_bytes = manifest["num_targets"], manifest["num_bytes"]
    return (
        f"{num_targets:,} targets in {len(manifest['shards'])} shards, {num_bytes / 1e6:,.1f} MB, "
        f"{num_bytes / max(num_targets, 1):.1f} bytes per target"
    )


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the digest of all manifest fields except the digest itself."""
    return fingerprint({key: value for key, value in manifest.items() if key != "sha256"})


def require_identity(where: Path | str, actual: Any, expected: Mapping[str, Any]) -> None:
    """Refuse a cache of another run.

    Raises:
        CacheError: a field differs. All are listed as `field: in the cache -> in the run`.
    """
    fields = differing_fields(actual, expected)
    if fields:
        more = f" and {len(fields) - MAX_FIELDS} more" if len(fields) > MAX_FIELDS else ""
        raise CacheError(
            f"{where}: built for another run ({'; '.join(fields[:MAX_FIELDS])}{more}); must agree "
            "in every field; set another cache.path, or delete that folder"
        )


def join_rows(parts: Sequence[NamedRows], cache: TargetCache) -> NamedRows:
    """Concatenate rows. No parts give zero rows."""
    if len(parts) == 1:
        return parts[0]
    starts = [torch.zeros(1, dtype=torch.int64)]
    for part in parts:
        starts.append(part.starts[1:] + starts[-1][-1])
    tails = [part.log_tail for part in parts if part.log_tail is not None]
    return NamedRows(
        starts=torch.cat(starts),
        ids=torch.cat([part.ids for part in parts] or [torch.zeros(0, dtype=torch.int64)]),
        logp=torch.cat([part.logp for part in parts] or [torch.zeros(0)]),
        log_tail=torch.cat(tails) if tails else None,
        vocab_size=cache.vocab_size,
        is_sampled=cache.layout.is_sampled,
    )


def _column(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32))


def verify_file(location: Location, entry: Mapping[str, Any]) -> None:
    """Verify the size and checksum of a file against its manifest entry.

    Raises:
        CacheError: the file is missing or differs.
    """
    remedy = (
        "must be the file that the cache was built with; delete it and build the cache again, all "
        "other shards are kept"
    )
    name, file = entry["name"], location.path_of(entry["name"])
    # The size first: a truncated file is found without reading it.
    num_bytes = location.size(name)
    if num_bytes is None:
        raise CacheError(f"{file}: missing; {remedy}")
    if num_bytes != entry["bytes"]:
        raise CacheError(f"{file}: has {num_bytes} bytes instead of {entry['bytes']}; {remedy}")
    if location.sha256(name) != entry["sha256"]:
        raise CacheError(f"{file}: fails its sha256; {remedy}")
