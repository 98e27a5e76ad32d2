"""The hidden states of one teacher on disk: shards, the projection, and the manifest that digests them all.

    features.json   {"format", "identity": what the states depend on, "projection": {"name", "sha256", "bytes"}, "shards": [{"name",
                    "sha256", "bytes", "targets"}], "num_targets", "num_bytes", "sha256": digest of all the rest}
    projection-<first digits of its sha256>.safetensors
    shard-00000-<first digits of its sha256>.parquet ...

Shapes: N rows, D width of a hidden state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from collegium.cache.feature_shards import PieceFeatures, read_feature_group
from collegium.cache.features import read_projections
from collegium.cache.shards import KEYS, PieceKey
from collegium.cache.store import load_manifest, require_identity, verify_file
from collegium.errors import CacheError
from collegium.storage.location import Location

FEATURE_FORMAT = 1
"""Version of the layout; another one is refused."""
FEATURE_MANIFEST = "features.json"
MAX_GROUPS = 64
"""Decoded row groups that are kept."""
_AGAIN = "delete it and build the cache again, all other shards are kept"


class FeatureCache:
    """The verified hidden states of one teacher, read by the keys of pieces in any order."""

    def __init__(self, place: Location, manifest: Mapping[str, Any]) -> None:
        """Take a manifest and files that `open_features` has verified."""
        self.place = place
        self.manifest = manifest
        self.taps: list[str] = list(manifest["identity"]["layers"])
        projection = place.read_bytes(manifest["projection"]["name"])
        assert projection is not None  # it was verified
        self._projections = read_projections(projection)
        self._names = [shard["name"] for shard in manifest["shards"]]
        self._files: dict[int, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[int, int], list[PieceFeatures]] = OrderedDict()
        self._places = self._index()

    @property
    def digest(self) -> str:
        """Digest of the manifest, and with it of every byte."""
        return str(self.manifest["sha256"])

    def rows(self, keys: Sequence[PieceKey], taps: Sequence[str]) -> dict[str, Tensor]:
        """The hidden states of pieces, one after the other, by tap: (N, D) float32.

        Raises:
            CacheError: a piece or a tap is not there, or a shard was damaged since it was opened.
        """
        self.require(taps)
        pieces = [self._find(key) for key in keys]
        found = {}
        for tap in taps:
            parts = [piece.taps[tap] for piece in pieces]
            codes_NR = np.concatenate([codes for codes, _ in parts])
            scale_N = np.concatenate([scale for _, scale in parts])
            found[tap] = torch.from_numpy(self._projections[tap].decode(codes_NR, scale_N))
        return found

    def require(self, taps: Sequence[str]) -> None:
        """Look for taps.

        Raises:
            CacheError: one is not there.
        """
        for tap in taps:
            if tap not in self._projections:
                raise CacheError(
                    f"{self.place}: holds {', '.join(self.taps)}; must hold `{tap}`; build the cache again from this recipe"
                )

    def check(self) -> None:
        """Decode every shard.

        Raises:
            CacheError: one holds what no builder writes.
        """
        groups = ((s, g) for s in range(len(self._names)) for g in range(self._file(s).num_row_groups))  # fmt: skip
        num_targets = sum(len(piece) for shard, group in groups for piece in self._group(shard, group))  # fmt: skip
        if num_targets != self.manifest["num_targets"]:
            raise CacheError(
                f"{self.place}: holds {num_targets:,} targets; must hold {self.manifest['num_targets']:,}; build it again"
            )

    def _find(self, key: PieceKey) -> PieceFeatures:
        place = self._places.get((key.document, key.window))
        if place is None:
            raise CacheError(
                f"{self.place}: holds no hidden states for the tokens at {key.offset} of document {key.document:016x} in this "
                "context; must be built from the same windows; build the cache again from this recipe"
            )
        shard, group, number = place
        return self._group(shard, group)[number]

    def _group(self, shard: int, group: int) -> list[PieceFeatures]:
        found = self._groups.get((shard, group))
        if found is not None:
            self._groups.move_to_end((shard, group))
            return found
        try:
            found = read_feature_group(self._file(shard), group, self.taps)
        except (OSError, ValueError, KeyError) as error:
            raise self._damaged(shard, error) from error
        self._groups[shard, group] = found
        if len(self._groups) > MAX_GROUPS:
            self._groups.popitem(last=False)
        return found

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            try:
                self._files[shard] = self.place.parquet(self._names[shard])
            except (OSError, ValueError) as error:
                raise self._damaged(shard, error) from error
        return self._files[shard]

    def _index(self) -> dict[tuple[int, bytes], tuple[int, int, int]]:
        places = {}
        for shard in range(len(self._names)):
            file = self._file(shard)
            for group in range(file.num_row_groups):
                try:
                    table = file.read_row_group(group, columns=list(KEYS), use_threads=False)
                except (OSError, ValueError) as error:
                    raise self._damaged(shard, error) from error
                pairs = zip(*(table.column(n).to_pylist() for n in ("document", "window")), strict=True)  # fmt: skip
                for number, (document, window) in enumerate(pairs):
                    places.setdefault((document, window), (shard, group, number))
        return places

    def _damaged(self, shard: int, error: Exception) -> CacheError:
        name = self.place.path_of(self._names[shard])
        return CacheError(f"{name}: damaged ({error}); {_AGAIN}")


def open_features(where: Path | str, expected: Mapping[str, Any] | None = None) -> FeatureCache:
    """Verify every byte of a folder, or of one behind a URL, against its manifest.

    Raises:
        CacheError: there is none, it is of another run (with the differing fields), or damaged.
    """
    place = Location.of(where)
    manifest = require_feature_manifest(where)
    if expected is not None:
        require_identity(where, manifest["identity"], expected)
    for entry in (manifest["projection"], *manifest["shards"]):
        verify_file(place, entry)
    return FeatureCache(place, manifest)


def require_feature_manifest(where: Path | str) -> dict[str, Any]:
    """The manifest of finished hidden states.

    Raises:
        CacheError: there is none, or as `read_feature_manifest`.
    """
    manifest = read_feature_manifest(where)
    if manifest is None:
        raise CacheError(
            f"{where}: no finished hidden states; must hold {FEATURE_MANIFEST}; build it with `collegium cache`"
        )
    return manifest


def read_feature_manifest(where: Path | str) -> dict[str, Any] | None:
    """The manifest of finished hidden states; None where there is none.

    Raises:
        CacheError: it is damaged, or of another format.
    """
    return load_manifest(where, FEATURE_MANIFEST, FEATURE_FORMAT)


def feature_folders(where: Path | str) -> list[str]:
    """The folders of hidden states inside a cache."""
    return Location.of(where).folders(f"features/*/{FEATURE_MANIFEST}")
