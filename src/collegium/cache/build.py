"""Resumable, deterministic build of a target cache, shard by shard."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from collegium.cache.codec import Samples
from collegium.cache.layout import Layout
from collegium.cache.processes import Ranks
from collegium.cache.shards import PieceTargets, read_identity, shard_bytes
from collegium.cache.store import (
    FORMAT,
    MANIFEST,
    SHARD_NAME,
    manifest_digest,
    read_manifest,
    require_identity,
)
from collegium.errors import CacheError, CollegiumError
from collegium.storage.files import lock_folder, sha256_of, write_bytes, write_json

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Fitted to English text scored by SmolLM2: docs/results/cache.md.
FREQUENCY_BITS = 2.3
"""Bits per rank that unequal frequencies save."""
SINGLE_PROCESS = Ranks()
SPACE_MARGIN = 1.05
"""Required free space, as a multiple of the estimate."""


def build_cache(
    path: Path,
    identity: Mapping[str, Any],
    encode: Callable[[int], Iterable[PieceTargets]],
    *,
    shard_targets: Sequence[int],
    sample: Callable[[], float] | None = None,
    announce: Callable[[int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, Any] | None:
    """Write the missing shards, then the manifest, and return the manifest.

    A killed build loses only the shard in progress. The finished cache has the same bytes however
    often the build was interrupted and however many processes ran it. With several processes, all
    but the last to finish return None.

    Args:
        path: the folder, locked during the build.
        identity: everything the targets depend on, as plain data, with `targets` and `vocab_size`.
        encode: shard number -> pieces, as an iterable. Called only for missing shards.
        shard_targets: number of targets of each shard.
        sample: entries per target of a sample, for the size estimate. Called if no shard exists.
        announce: called with the expected bytes before any are written.
        progress: called with (targets done, targets in total) of this process.
        ranks: rank and world size, which assign shards to processes.

    Raises:
        CacheError: the folder holds a cache of another run, or the disk is full.
        CollegiumError: another process builds in this folder.
    """
    with ranks.lock(path):
        manifest = read_manifest(path)
        if manifest is not None:
            require_identity(path, manifest["identity"], identity)
        # Verifies every finished shard, so a damaged one is built again even under a manifest.
        build = _Build(path, identity, shard_targets, ranks)
        if manifest is not None and build.is_finished:
            return manifest
        needed = build.bytes_needed(sample)
        if announce is not None:
            announce(needed)
        build.require_space(needed)
        numbers = [number for number in range(len(shard_targets)) if ranks.owns(number)]
        done = sum(shard_targets[number] for number in numbers if number in build.shards)
        total = sum(shard_targets[number] for number in numbers)
        for number in numbers:
            if number in build.shards:
                continue
            pieces = []
            for piece in encode(number):
                pieces.append(piece)
                done += len(piece.rows.sizes)
                if progress is not None:
                    progress(done, total)
            build.write(number, pieces)
        return build.finish()


def expected_bytes_per_token(
    layout: Layout, vocab_size: int, entries: float | None = None
) -> float:
    """Estimate the bytes per target on disk. `entries` defaults to that of English text.

    A rank costs log2 V - log2(n!) / n - `FREQUENCY_BITS` bits: a row's n entries are sorted, and
    common tokens have small ranks.
    """
    if entries is None:
        entries = layout.targets.num_entries(vocab_size)
    order_bits = math.lgamma(entries + 1) / math.log(2) / entries
    rank_bytes = max(1.0, math.log2(vocab_size) - order_bits - FREQUENCY_BITS) / 8
    scalars = 1.8 * len(layout.scalars)
    # All constants below were fitted to the table in docs/results/cache.md.
    if isinstance(layout.targets, Samples):
        levels = 1.2 * entries + 1.9 if layout.has_levels else 0.0
        return entries * (rank_bytes + 0.33) + 0.7 + levels + scalars
    return entries * (rank_bytes + 0.58) + 5.2 + scalars


class _Build:
    """State of one build."""

    def __init__(
        self, path: Path, identity: Mapping[str, Any], shard_targets: Sequence[int], ranks: Ranks
    ) -> None:
        self._path = path
        self._identity = identity
        self._shard_targets = shard_targets
        self._layout = Layout.of_identity(identity)
        self._vocab_size = int(identity["vocab_size"])
        self._ranks = ranks
        self.shards = finished_shards(path, ranks)
        """Finished shards with a valid checksum, by number."""
        for number, file in self.shards.items():
            require_identity(path, read_identity(file), self._metadata(number))

    def _metadata(self, number: int) -> dict[str, Any]:
        return shard_metadata(self._identity, number, self._shard_targets)

    @property
    def is_finished(self) -> bool:
        return len(self.shards) == len(self._shard_targets)

    def bytes_needed(self, sample: Callable[[], float] | None = None) -> int:
        """Estimate the bytes of the missing shards from the finished ones, else from a sample."""
        done = sum(self._shard_targets[number] for number in self.shards)
        if done:
            per_token = sum(path.stat().st_size for path in self.shards.values()) / done
        else:
            # Top-k fixes the entries. The number of unique draws depends on the teachers' entropy:
            # for small teachers the estimate for English text was half of the measured size.
            if not isinstance(self._layout.targets, Samples):
                sample = None
            entries = None if sample is None else sample()
            per_token = expected_bytes_per_token(self._layout, self._vocab_size, entries)
        return round((sum(self._shard_targets) - done) * per_token)

    def require_space(self, needed: int) -> None:
        """Raise if the disk is too small for the estimate."""
        free = shutil.disk_usage(self._path).free
        if free < needed * SPACE_MARGIN:
            raise self._disk_full(round(needed * SPACE_MARGIN), free)

    def write(self, number: int, pieces: Sequence[PieceTargets]) -> None:
        """Write one shard atomically."""
        num_targets = sum(len(piece.rows.sizes) for piece in pieces)
        if num_targets != self._shard_targets[number]:
            raise ValueError(
                f"shard {number}: {num_targets} targets instead of {self._shard_targets[number]}"
            )
        data = shard_bytes(pieces, self._layout, self._vocab_size, identity=self._metadata(number))
        path = self._path / shard_name(number, data)
        try:
            write_bytes(path, data)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise CacheError(f"{path}: cannot be written ({error.strerror})") from error
            free = shutil.disk_usage(self._path).free
            raise self._disk_full(max(self.bytes_needed(), len(data)), free) from error
        self.shards[number] = path

    def finish(self) -> dict[str, Any] | None:
        """Write the manifest, which marks the cache as finished, if every shard exists."""
        if not self._ranks.is_single:
            # Cheap check of the names first; `finished_shards` reads every byte.
            if len(shard_files(self._path)) < len(self._shard_targets):
                return None
            self.shards = finished_shards(self._path, self._ranks)
            if not self.is_finished:
                return None
        files = [self.shards[number] for number in range(len(self._shard_targets))]
        with ExitStack() as held:
            try:
                held.enter_context(lock_folder(self._path, "", name=".lock-manifest"))
            except CollegiumError:
                return None  # another rank also found all shards and is writing the manifest
            try:
                return write_manifest(self._path, self._identity, files, self._shard_targets)
            except OSError as error:
                raise self._disk_full(1 << 20, shutil.disk_usage(self._path).free) from error

    def _disk_full(self, needed: int, free: int) -> CacheError:
        done = len(self.shards)
        return CacheError(
            f"{self._path}: the disk is full; about {needed:,} more bytes are needed, {free:,} are "
            f"free; {done} of {len(self._shard_targets)} shards are finished and kept; free space, "
            "then run the same command again"
        )


def shard_name(number: int, data: bytes | memoryview) -> str:
    """Return a file name with the digest, which identifies a finished shard without a manifest."""
    return f"shard-{number:05d}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"


def shard_metadata(
    identity: Mapping[str, Any], number: int, shard_targets: Sequence[int]
) -> dict[str, Any]:
    """Return the metadata of a shard, enough to merge shards without a manifest."""
    return {
        **identity,
        "format": FORMAT,
        "shard": number,
        "num_targets": shard_targets[number],
        "num_shards": len(shard_targets),
    }


def write_manifest(
    path: Path, identity: Mapping[str, Any], files: Sequence[Path], shard_targets: Sequence[int]
) -> dict[str, Any]:
    """Write the manifest of finished shards, and return it."""
    shards = [
        {
            "name": file.name,
            "sha256": sha256_of(file),
            "bytes": file.stat().st_size,
            "targets": num_targets,
        }
        for file, num_targets in zip(files, shard_targets, strict=True)
    ]
    manifest: dict[str, Any] = {
        "format": FORMAT,
        # Tuples become lists, so the returned manifest equals the one read back.
        "identity": json.loads(json.dumps(identity, sort_keys=True)),
        "shards": shards,
        "num_targets": sum(shard_targets),
        "num_bytes": sum(shard["bytes"] for shard in shards),
    }
    manifest["sha256"] = manifest_digest(manifest)
    write_json(path / MANIFEST, manifest)
    return manifest


def shard_files(path: Path) -> dict[int, Path]:
    """Return the files named like a shard, by shard number, without verifying them."""
    matches = ((SHARD_NAME.fullmatch(file.name), file) for file in path.glob("shard-*.parquet"))
    return {int(match.group(1)): file for match, file in matches if match is not None}


def finished_shards(path: Path, ranks: Ranks) -> dict[int, Path]:
    """Return finished shards with a valid checksum. Deletes this rank's partial or damaged ones."""
    # Only its own: a temporary file of another rank may be a write in progress.
    for leftover in path.glob(".shard-*.tmp"):
        match = SHARD_NAME.match(leftover.name[1:])
        if match is None or ranks.owns(int(match.group(1))):
            leftover.unlink(missing_ok=True)
    shards: dict[int, Path] = {}
    for number, file in sorted(shard_files(path).items()):
        digest = file.name.rpartition("-")[2].partition(".")[0]
        if sha256_of(file).startswith(digest):
            shards[number] = file
        elif ranks.owns(number):
            file.unlink()
    return shards
