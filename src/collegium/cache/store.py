"""A cache on disk: shards and the manifest that names, sizes and digests all of them.

    manifest.json   {"format", "identity": what the targets depend on, "shards": [{"name", "sha256", "bytes", "targets"}],
                    "num_targets", "num_bytes", "sha256": digest of all the rest}
    shard-00000-<first digits of its sha256>.parquet ...

Nothing is read from a cache whose identity differs from what the run expects, nor from a shard that differs from the manifest.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from collegium.cache.codec import STEP, EncodedRows, decode_rows
from collegium.cache.layout import Layout, entropy_name, log_z_name
from collegium.cache.location import Location
from collegium.cache.shards import PieceKey, read_group, read_keys, read_vocabulary
from collegium.errors import CacheError
from collegium.run_folder import differing_fields, fingerprint
from collegium.types import SparseRows, StoredRows

FORMAT = 2
"""Version of docs/cache-format.md; another one is refused, never guessed at."""
MANIFEST = "manifest.json"
SHARD_NAME = re.compile(r"shard-(\d{5,})-([0-9a-f]{16})\.parquet")
MAX_GROUPS = 256
"""Decoded row groups that are kept, about 1 MB each."""
MAX_FIELDS = 8


@dataclass(frozen=True, slots=True)
class _PieceAddress:
    shard: int
    group: int
    piece: int


class TargetCache:
    """A cache that verified, read by the keys of its pieces in any order."""

    def __init__(self, place: Location, manifest: Mapping[str, Any]) -> None:
        """Take a manifest and shards that `open_cache` has verified."""
        self.place = place
        self.manifest = manifest
        identity = manifest["identity"]
        self.layout = Layout.of_identity(identity)
        self.vocab_size = int(identity["vocab_size"])
        self._names = [shard["name"] for shard in manifest["shards"]]
        self._files: dict[int, pq.ParquetFile] = {}
        self._vocabularies: dict[int, np.ndarray] = {}
        self._groups: OrderedDict[tuple[int, int], tuple[SparseRows, EncodedRows, np.ndarray]] = (
            OrderedDict()
        )
        self._places = self._index()

    @property
    def digest(self) -> str:
        """Digest of the manifest, and with it of every byte of the cache."""
        return str(self.manifest["sha256"])

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, keys: Sequence[PieceKey]) -> SparseRows:
        """The targets of pieces, one after the other. The offset of a key is not compared: the same window of the same
        document has the same target wherever it stands.

        Raises:
            CacheError: a piece is not in the cache, or its shard was damaged since it was opened.
        """
        parts = []
        for key in keys:
            sparse, _, starts, piece = self._find(key)
            parts.append(sparse.block(slice(int(starts[piece]), int(starts[piece + 1]))))
        return join_rows(parts, self)

    def stored(self, keys: Sequence[PieceKey]) -> StoredRows:
        """The same with all that is kept beside the targets, for a cache of one teacher.

        Raises:
            CacheError: as `rows`.
        """
        parts, levels = [], []
        scalars: dict[str, list[np.ndarray]] = {name: [] for name in self.layout.scalars}
        for key in keys:
            sparse, encoded, starts, piece = self._find(key)
            span = slice(int(starts[piece]), int(starts[piece + 1]))
            parts.append(sparse.block(span))
            for name, found in scalars.items():
                found.append(encoded.scalars[name][span])
            if encoded.levels is not None:
                entries = slice(int(sparse.starts[span.start]), int(sparse.starts[span.stop]))
                levels.append(encoded.levels[entries])
        rows = join_rows(parts, self)
        logp_E = torch.from_numpy(np.concatenate(levels) * np.float32(-STEP)) if levels else None
        columns = {name: _column(found) for name, found in scalars.items()}
        temperatures = self.layout.temperatures
        return StoredRows(
            rows=rows,
            logp=rows.logp if logp_E is None else logp_E,
            label_logp_N=columns["label_logp"],
            max_logp_N=columns["max_logp"],
            entropy={value: columns[entropy_name(value)] for value in (1.0, *temperatures)},
            log_z={value: columns[log_z_name(value)] for value in temperatures},
        )

    def scalars(self, key: PieceKey) -> dict[str, np.ndarray]:
        """(n,) float16 of each scalar of one piece.

        Raises:
            CacheError: as `rows`.
        """
        _, encoded, starts, piece = self._find(key)
        span = slice(int(starts[piece]), int(starts[piece + 1]))
        return {name: values_n[span] for name, values_n in encoded.scalars.items()}

    def check(self) -> None:
        """Decode every target.

        Raises:
            CacheError: a shard holds what no builder writes.
        """
        num_targets = 0
        for shard in range(len(self._names)):
            for group in range(self._file(shard).num_row_groups):
                num_targets += len(self._group(shard, group)[0])
        if num_targets != self.manifest["num_targets"]:
            raise CacheError(
                f"{self.place}: holds {num_targets:,} targets; must hold {self.manifest['num_targets']:,}; build it again"
            )

    def _find(self, key: PieceKey) -> tuple[SparseRows, EncodedRows, np.ndarray, int]:
        place = self._places.get((key.document, key.window))
        if place is None:
            raise CacheError(
                f"{self.place}: holds no target for the tokens at {key.offset} of document {key.document:016x} in this "
                "context; must be built from the same windows; build the cache again from this recipe"
            )
        return *self._group(place.shard, place.group), place.piece

    def _group(self, shard: int, group: int) -> tuple[SparseRows, EncodedRows, np.ndarray]:
        found = self._groups.get((shard, group))
        if found is not None:
            self._groups.move_to_end((shard, group))
            return found
        try:
            file = self._file(shard)
            if shard not in self._vocabularies:
                self._vocabularies[shard] = read_vocabulary(file)
            encoded, starts = read_group(file, group, self.layout, self._vocabularies[shard])
            found = decode_rows(self.layout.targets, encoded, self.vocab_size), encoded, starts
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(shard, error) from error
        self._groups[shard, group] = found
        if len(self._groups) > MAX_GROUPS:
            self._groups.popitem(last=False)
        return found

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            self._files[shard] = self.place.parquet(self._names[shard])
        return self._files[shard]

    def _index(self) -> dict[tuple[int, bytes], _PieceAddress]:
        places: dict[tuple[int, bytes], _PieceAddress] = {}
        for shard in range(len(self._names)):
            try:
                groups = read_keys(self._file(shard))
            except (OSError, ValueError, KeyError) as error:
                raise self._damaged(shard, error) from error
            for group, keys in enumerate(groups):
                for piece, key in enumerate(keys):
                    places.setdefault(
                        (key.document, key.window), _PieceAddress(shard, group, piece)
                    )
        return places

    def _damaged(self, shard: int, error: Exception) -> CacheError:
        return CacheError(
            f"{self.place.path_of(self._names[shard])}: cannot be read ({error}); must be what the cache was built with; "
            "delete the file and build the cache again, all other shards are kept"
        )


def open_cache(where: Path | str, expected: Mapping[str, Any] | None = None) -> TargetCache:
    """Open a finished cache after comparing it with the run and every byte of it with its manifest.

    Args:
        where: the folder, or its URL.
        expected: the identity that the run needs; None to look at whatever is there.

    Raises:
        CacheError: no finished cache, one of another run (with the differing fields), or a damaged one.
    """
    place = Location.of(where)
    manifest = require_manifest(where)
    if expected is not None:
        require_identity(where, manifest["identity"], expected)
    for shard in manifest["shards"]:
        verify_file(place, shard)
    return TargetCache(place, manifest)


def cache_folders(where: Path | str) -> list[str]:
    """The folders of a cache of either kind: itself, or those of its teachers."""
    parts = Location.of(where).parts(f"teachers/*/*/{MANIFEST}")
    return [str(place) for place in parts] or [str(where)]


def require_manifest(where: Path | str) -> dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
        CacheError: there is none, or as `read_manifest`.
    """
    manifest = read_manifest(where)
    if manifest is None:
        raise CacheError(
            f"{where}: no finished cache; must hold {MANIFEST}; build it with `collegium cache`"
        )
    return manifest


def read_manifest(where: Path | str) -> dict[str, Any] | None:
    """The manifest of a finished cache; None where there is none.

    Raises:
        CacheError: it is damaged, or of another format.
    """
    return load_manifest(where, MANIFEST, FORMAT)


def load_manifest(where: Path | str, name: str, wanted: int) -> dict[str, Any] | None:
    """A manifest of the version `wanted`; None where there is none.

    Raises:
        CacheError: it is damaged, or of another format.
    """
    place = Location.of(where)
    file = place.path_of(name)
    try:
        text = place.read_text(name)
        if text is None:
            return None
        manifest = json.loads(text)
    except (OSError, ValueError) as error:
        raise CacheError(f"{file}: damaged ({error}); build the cache again") from error
    if not isinstance(manifest, dict) or manifest.get("sha256") != manifest_digest(manifest):
        raise CacheError(f"{file}: fails its own sha256; delete it and build the cache again")
    if manifest["format"] != wanted:
        is_newer = manifest["format"] > wanted
        remedy = "upgrade collegium" if is_newer else "delete the folder and build the cache again"
        raise CacheError(f"{file}: got format {manifest['format']}; must be {wanted}; {remedy}")
    return manifest


def summary(manifest: Mapping[str, Any]) -> str:
    """Size of a finished cache in words."""
    num_targets, num_bytes = manifest["num_targets"], manifest["num_bytes"]
    return (
        f"{num_targets:,} targets in {len(manifest['shards'])} shards, {num_bytes / 1e6:,.1f} MB, "
        f"{num_bytes / max(num_targets, 1):.1f} bytes per target"
    )


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Digest of everything in a manifest but the digest."""
    return fingerprint({key: value for key, value in manifest.items() if key != "sha256"})


def require_identity(where: Path | str, found: Any, expected: Mapping[str, Any]) -> None:
    """Refuse a cache of another run.

    Raises:
        CacheError: with every field that differs, as `field: in the cache -> in the run`.
    """
    fields = differing_fields(found, expected)
    if fields:
        more = f" and {len(fields) - MAX_FIELDS} more" if len(fields) > MAX_FIELDS else ""
        raise CacheError(
            f"{where}: built for another run ({'; '.join(fields[:MAX_FIELDS])}{more}); must agree in every field; set "
            "another cache.path, or delete that folder"
        )


def join_rows(parts: Sequence[SparseRows], cache: TargetCache) -> SparseRows:
    """Rows one after the other."""
    if len(parts) == 1:
        return parts[0]
    starts = [torch.zeros(1, dtype=torch.int64)]
    for part in parts:
        starts.append(part.starts[1:] + starts[-1][-1])
    tails = [part.log_tail for part in parts if part.log_tail is not None]
    return SparseRows(
        starts=torch.cat(starts),
        ids=torch.cat([part.ids for part in parts] or [torch.zeros(0, dtype=torch.int64)]),
        logp=torch.cat([part.logp for part in parts] or [torch.zeros(0)]),
        log_tail=torch.cat(tails) if tails else None,
        vocab_size=cache.vocab_size,
    )


def _column(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32))


def verify_file(place: Location, entry: Mapping[str, Any]) -> None:
    """Compare every byte of a file with its entry in a manifest.

    Raises:
        CacheError: it is missing or another one.
    """
    wanted = "must be what the cache was built with; delete it and build the cache again, all other shards are kept"
    name, file = entry["name"], place.path_of(entry["name"])
    num_bytes = place.size(name)
    if num_bytes is None:
        raise CacheError(f"{file}: missing; {wanted}")
    if num_bytes != entry["bytes"]:
        raise CacheError(f"{file}: has {num_bytes} bytes instead of {entry['bytes']}; {wanted}")
    if place.sha256(name) != entry["sha256"]:
        raise CacheError(f"{file}: fails its sha256; {wanted}")
