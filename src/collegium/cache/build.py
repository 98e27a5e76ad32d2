"""Writing a cache shard by shard: what is finished is kept, whatever ends the process, and nothing depends on the order of events."""

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
from collegium.files import hold_lock, sha256_of, write_bytes
from collegium.run_folder import write_json

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
COMMON_BITS = 2.3
"""Bits per rank that unequal frequencies save, on English text with SmolLM2: docs/results/cache.md."""
SINGLE_PROCESS = Ranks()
SPARE = 1.05
"""Free space that is asked for, as a multiple of the estimate."""


def build_cache(
    path: Path,
    identity: Mapping[str, Any],
    encode: Callable[[int], Iterable[PieceTargets]],
    *,
    shard_targets: Sequence[int],
    sample: Callable[[], float] | None = None,
    announce: Callable[[int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
    share: Ranks = SINGLE_PROCESS,
) -> dict[str, Any] | None:
    """Write the shards that are missing, then the manifest; returns it.

    A killed build loses the shard that it was at; the finished cache has the same bytes as an unbroken one, however many
    processes build it. Of several, those that do not finish last return None.

    Args:
        path: the folder; its lock is held meanwhile.
        identity: what the targets depend on, as plain data, with `targets` and `vocab_size`.
        encode: number of a shard -> its pieces, as they come; called for the missing ones alone.
        shard_targets: the number of targets of each shard.
        sample: entries per target of a few of them, for the estimate of the size; called where no shard is finished.
        announce: called with the bytes that are expected to be written, before they are.
        progress: called with (targets done, all targets) of this process.
        share: which shards are this process's.

    Raises:
        CacheError: another process builds here, the folder holds a cache of another run, or the disk is full.
    """
    with share.lock(path):
        manifest = read_manifest(path)
        if manifest is not None:
            require_identity(path, manifest["identity"], identity)
        job = _Job(path, identity, shard_targets, share)
        if manifest is not None and job.is_finished:
            return manifest
        needed = job.bytes_needed(sample)
        if announce is not None:
            announce(needed)
        job.require_space(needed)
        own = [number for number in range(len(shard_targets)) if share.owns(number)]
        done = sum(shard_targets[number] for number in own if number in job.found)
        total = sum(shard_targets[number] for number in own)
        for number in own:
            if number in job.found:
                continue
            pieces = []
            for piece in encode(number):
                pieces.append(piece)
                done += len(piece.rows.sizes)
                if progress is not None:
                    progress(done, total)
            job.write(number, pieces)
        return job.finish()


def expected_bytes_per_token(
    layout: Layout, vocab_size: int, entries: float | None = None
) -> float:
    """Bytes per target to expect on disk; an estimate. Without the number of `entries` per target, English text is assumed.

    A rank costs log2 V bits, less what the order of a row's n entries would say, log2(n!) / n, and what common tokens save.
    """
    if entries is None:
        entries = layout.targets.num_entries(vocab_size)
    order_bits = math.lgamma(entries + 1) / math.log(2) / entries
    rank_bytes = max(1.0, math.log2(vocab_size) - order_bits - COMMON_BITS) / 8
    scalars = 1.8 * len(layout.scalars)
    if isinstance(layout.targets, Samples):
        levels = 1.2 * entries + 1.9 if layout.has_levels else 0.0
        return entries * (rank_bytes + 0.33) + 0.7 + levels + scalars
    return entries * (rank_bytes + 0.58) + 5.2 + scalars


class _Job:
    """One build under way."""

    def __init__(
        self, path: Path, identity: Mapping[str, Any], shard_targets: Sequence[int], share: Ranks
    ) -> None:
        self._path = path
        self._identity = identity
        self._shard_targets = shard_targets
        self._layout = Layout.of_identity(identity)
        self._vocab_size = int(identity["vocab_size"])
        self._share = share
        self.found = finished_shards(path, share)
        """The shards that stand, by their numbers."""
        for number, file in self.found.items():
            require_identity(path, read_identity(file), self._note(number))

    def _note(self, number: int) -> dict[str, Any]:
        """What a shard says of itself: enough to put shards together without anything else."""
        return shard_note(self._identity, number, self._shard_targets)

    @property
    def is_finished(self) -> bool:
        return len(self.found) == len(self._shard_targets)

    def bytes_needed(self, sample: Callable[[], float] | None = None) -> int:
        """What the missing shards will take, judged by the finished ones where there are any, else by a sample."""
        done = sum(self._shard_targets[number] for number in self.found)
        if done:
            per_token = sum(path.stat().st_size for path in self.found.values()) / done
        else:
            # Top k says itself how many; how many draws differ, only the teachers do.
            if not isinstance(self._layout.targets, Samples):
                sample = None
            entries = None if sample is None else sample()
            per_token = expected_bytes_per_token(self._layout, self._vocab_size, entries)
        return round((sum(self._shard_targets) - done) * per_token)

    def require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._path).free
        if free < needed * SPARE:
            raise self._full(round(needed * SPARE), free)

    def write(self, number: int, pieces: Sequence[PieceTargets]) -> None:
        """Make one shard visible as a whole."""
        num_targets = sum(len(piece.rows.sizes) for piece in pieces)
        if num_targets != self._shard_targets[number]:
            raise ValueError(
                f"shard {number}: {num_targets} targets instead of {self._shard_targets[number]}"
            )
        data = shard_bytes(pieces, self._layout, self._vocab_size, identity=self._note(number))
        path = self._path / shard_name(number, data)
        try:
            write_bytes(path, data)
        except OSError as error:
            if error.errno not in FULL:
                raise CacheError(f"{path}: cannot be written ({error.strerror})") from error
            free = shutil.disk_usage(self._path).free
            raise self._full(max(self.bytes_needed(), len(data)), free) from error
        self.found[number] = path

    def finish(self) -> dict[str, Any] | None:
        """Write the manifest, which makes the cache one; not before the last process is done."""
        if not self._share.is_single:
            if len(shard_files(self._path)) < len(self._shard_targets):
                return None
            self.found = finished_shards(self._path, self._share)
            if not self.is_finished:
                return None
        files = [self.found[number] for number in range(len(self._shard_targets))]
        with ExitStack() as held:
            try:
                held.enter_context(hold_lock(self._path, ".lock-manifest", ""))
            except CollegiumError:
                return None  # another process has found all shards as well, and is writing it
            try:
                return write_manifest(self._path, self._identity, files, self._shard_targets)
            except OSError as error:
                raise self._full(1 << 20, shutil.disk_usage(self._path).free) from error

    def _full(self, needed: int, free: int) -> CacheError:
        done = len(self.found)
        return CacheError(
            f"{self._path}: the disk is full; about {needed:,} bytes more are needed, {free:,} are free; {done} of "
            f"{len(self._shard_targets)} shards are finished and kept; free space, then run the same command again"
        )


def shard_name(number: int, data: bytes | memoryview) -> str:
    """A name that says what is in the file, so that a finished shard is known without the manifest."""
    return f"shard-{number:05d}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"


def shard_note(
    identity: Mapping[str, Any], number: int, shard_targets: Sequence[int]
) -> dict[str, Any]:
    """What a shard says of the cache that it belongs to."""
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
    """Write the manifest of shards that stand, and return it."""
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
        "identity": json.loads(json.dumps(identity, sort_keys=True)),
        "shards": shards,
        "num_targets": sum(shard_targets),
        "num_bytes": sum(shard["bytes"] for shard in shards),
    }
    manifest["sha256"] = manifest_digest(manifest)
    write_json(path / MANIFEST, manifest)
    return manifest


def shard_files(path: Path) -> dict[int, Path]:
    """The files that have the name of a shard, by its number."""
    found = ((SHARD_NAME.fullmatch(file.name), file) for file in path.glob("shard-*.parquet"))
    return {int(match.group(1)): file for match, file in found if match is not None}


def finished_shards(path: Path, share: Ranks) -> dict[int, Path]:
    """The shards that stand and verify. Of its own, a process removes what an interrupted writing or a bad disk left."""
    for leftover in path.glob(".shard-*.tmp"):
        match = SHARD_NAME.match(leftover.name[1:])
        if match is None or share.owns(int(match.group(1))):
            leftover.unlink(missing_ok=True)
    found: dict[int, Path] = {}
    for number, file in sorted(shard_files(path).items()):
        digest = file.name.rpartition("-")[2].partition(".")[0]
        if sha256_of(file).startswith(digest):
            found[number] = file
        elif share.owns(number):
            file.unlink()
    return found
