"""Writing a cache shard by shard: what is finished is kept, whatever ends the process, and nothing depends on the order of events."""

from __future__ import annotations

import errno
import hashlib
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from collegium.cache.codec import Samples
from collegium.cache.layout import Layout
from collegium.cache.shards import PieceTargets, read_identity, shard_bytes
from collegium.cache.store import (
    FORMAT,
    MANIFEST,
    SHARD_NAME,
    manifest_digest,
    read_manifest,
    require_identity,
)
from collegium.errors import CacheError
from collegium.files import lock_folder, sha256_of, write_bytes
from collegium.run_folder import write_json

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
COMMON_BITS = 2.3
"""Bits per rank that unequal frequencies save, on English text with SmolLM2: docs/results/cache.md."""
SPARE = 1.05
"""Free space that is asked for, as a multiple of the estimate."""


def build_cache(
    path: Path,
    identity: Mapping[str, Any],
    encode: Callable[[int], Iterable[PieceTargets]],
    *,
    shard_targets: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the shards that are missing, then the manifest; returns it.

    A killed build loses the shard that it was at; the finished cache has the same bytes as an unbroken one.

    Args:
        path: the folder; its lock is held meanwhile.
        identity: what the targets depend on, as plain data, with `targets` and `vocab_size`.
        encode: number of a shard -> its pieces, as they come; called for the missing ones alone.
        shard_targets: the number of targets of each shard.
        progress: called with (targets done, all targets).

    Raises:
        CacheError: another process builds here, the folder holds a cache of another run, or the disk is full.
    """
    with lock_folder(path, "wait for it, or set another cache.path"):
        manifest = read_manifest(path)
        if manifest is not None:
            require_identity(path, manifest["identity"], identity)
        found = _finished_shards(path, identity)
        if manifest is not None and len(found) == len(shard_targets):
            return manifest
        job = _Job(path, identity, shard_targets, found)
        job.require_space()
        done, total = sum(shard_targets[number] for number in found), sum(shard_targets)
        for number in range(len(shard_targets)):
            if number in found:
                continue
            pieces = []
            for piece in encode(number):
                pieces.append(piece)
                done += len(piece.rows.sizes)
                if progress is not None:
                    progress(done, total)
            job.write(number, pieces)
        return job.finish()


def expected_bytes_per_token(layout: Layout, vocab_size: int) -> float:
    """Bytes per target to expect on disk, before anything is measured; an estimate.

    A rank costs log2 V bits, less what the order of a row's n entries would say, log2(n!) / n, and what common tokens save.
    """
    entries = layout.targets.num_entries(vocab_size)
    order_bits = math.lgamma(entries + 1) / math.log(2) / entries
    rank_bytes = max(1.0, math.log2(vocab_size) - order_bits - COMMON_BITS) / 8
    scalars = 1.8 * len(layout.scalars)
    if isinstance(layout.targets, Samples):
        levels = 1.2 * entries + 1.9 if layout.has_levels else 0.0
        return entries * (rank_bytes + 0.33) + 0.7 + levels + scalars
    return entries * (rank_bytes + 0.84) + 5.2 + scalars


class _Job:
    """One build under way."""

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        shard_targets: Sequence[int],
        found: dict[int, Path],
    ) -> None:
        self._path = path
        self._identity = identity
        self._shard_targets = shard_targets
        self._found = found
        self._layout = Layout.of_identity(identity)
        self._vocab_size = int(identity["vocab_size"])

    def bytes_needed(self) -> int:
        """What the missing shards will take, judged by the finished ones where there are any."""
        done = sum(self._shard_targets[number] for number in self._found)
        per_token = expected_bytes_per_token(self._layout, self._vocab_size)
        if done:
            per_token = sum(path.stat().st_size for path in self._found.values()) / done
        return round((sum(self._shard_targets) - done) * per_token)

    def require_space(self) -> None:
        needed, free = self.bytes_needed() * SPARE, shutil.disk_usage(self._path).free
        if free < needed:
            raise self._full(round(needed), free)

    def write(self, number: int, pieces: Sequence[PieceTargets]) -> None:
        """Make one shard visible as a whole."""
        num_targets = sum(len(piece.rows.sizes) for piece in pieces)
        if num_targets != self._shard_targets[number]:
            raise ValueError(
                f"shard {number}: {num_targets} targets instead of {self._shard_targets[number]}"
            )
        note = {**self._identity, "format": FORMAT, "shard": number}
        data = shard_bytes(pieces, self._layout, self._vocab_size, identity=note)
        path = self._path / shard_name(number, data)
        try:
            write_bytes(path, data)
        except OSError as error:
            if error.errno not in FULL:
                raise CacheError(f"{path}: cannot be written ({error.strerror})") from error
            free = shutil.disk_usage(self._path).free
            raise self._full(max(self.bytes_needed(), len(data)), free) from error
        self._found[number] = path

    def finish(self) -> dict[str, Any]:
        """Write the manifest, which makes the cache one."""
        numbers = range(len(self._shard_targets))
        shards = [
            {
                "name": self._found[number].name,
                "sha256": sha256_of(self._found[number]),
                "bytes": self._found[number].stat().st_size,
                "targets": self._shard_targets[number],
            }
            for number in numbers
        ]
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "identity": dict(self._identity),
            "shards": shards,
            "num_targets": sum(self._shard_targets),
            "num_bytes": sum(shard["bytes"] for shard in shards),
        }
        manifest["sha256"] = manifest_digest(manifest)
        try:
            write_json(self._path / MANIFEST, manifest)
        except OSError as error:
            raise self._full(1 << 20, shutil.disk_usage(self._path).free) from error
        return manifest

    def _full(self, needed: int, free: int) -> CacheError:
        done = len(self._found)
        return CacheError(
            f"{self._path}: the disk is full; about {needed:,} bytes more are needed, {free:,} are free; {done} of "
            f"{len(self._shard_targets)} shards are finished and kept; free space, then run the same command again"
        )


def shard_name(number: int, data: bytes | memoryview) -> str:
    """A name that says what is in the file, so that a finished shard is known without the manifest."""
    return f"shard-{number:05d}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"


def _finished_shards(path: Path, identity: Mapping[str, Any]) -> dict[int, Path]:
    """The shards that stand and verify; what an interrupted writing or a bad disk left is removed.

    Raises:
        CacheError: a shard is of another run.
    """
    for leftover in path.glob(".shard-*.tmp"):
        leftover.unlink()
    found: dict[int, Path] = {}
    for file in sorted(path.glob("shard-*.parquet")):
        match = SHARD_NAME.fullmatch(file.name)
        if match is None:
            continue
        if not sha256_of(file).startswith(match.group(2)):
            file.unlink()
            continue
        note = read_identity(file)
        number = int(match.group(1))
        require_identity(path, note, {**identity, "format": FORMAT, "shard": number})
        found[number] = file
    return found
