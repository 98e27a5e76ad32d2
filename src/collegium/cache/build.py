"""Resumable, deterministic build of a cache, shard by shard."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from collegium.cache.encode import CorpusEncoder
from collegium.cache.manifest import (
    FORMAT,
    MANIFEST,
    SHARD_NAME,
    SIDE_NAME,
    FileEntry,
    Manifest,
    manifest_digest,
    read_manifest,
    require_identity,
)
from collegium.cache.processes import REMEDY, Ranks
from collegium.cache.shards import Codec, EncodedPiece, ShardMetadata, read_metadata, shard_bytes
from collegium.cache.store import SIDE_FILES, load_codec
from collegium.console import progress, say
from collegium.errors import CacheError
from collegium.storage.files import lock_folder, sha256_of, write_bytes, write_json

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
SINGLE_PROCESS = Ranks()
SPACE_MARGIN = 1.05
"""Required free space, as a multiple of the estimate."""


def build_cache(
    path: Path,
    identity: Mapping[str, Any],
    encoder: CorpusEncoder,
    *,
    label: str = "cache",
    ranks: Ranks = SINGLE_PROCESS,
) -> Manifest | None:
    """Write the missing shards, then the manifest, and return the manifest.

    A killed build loses only the shard in progress. The finished cache has the same bytes however
    often the build was interrupted and however many processes ran it. With several processes, all
    but the last to finish return None.

    Args:
        path: the folder, locked during the build.
        identity: everything the content depends on, as plain data. `kind` names the codec.
        encoder: the source of the pieces.
        label: name of the cache in progress messages.
        ranks: rank and world size, which assign shards to processes.

    Raises:
        CacheError: the folder holds a cache of another run, or the disk is full.
        CollegiumError: another process builds in this folder.
    """
    with ranks.lock(path):
        manifest = read_manifest(path)
        if manifest is not None:
            require_identity(path, manifest.identity, identity)
        # Verifies every finished shard, so a damaged one is built again even under a manifest.
        build = _Build(path, identity, encoder, ranks)
        if manifest is None or len(build.shards) < len(encoder.shard_targets):
            build.require_space(label)
            build.write_shards(label)
            manifest = build.finish()
    if manifest is not None:
        say(f"{label}: {manifest.summary()}")
    else:
        say(
            f"{label}: the shards of process {ranks.rank} of {ranks.world_size} are finished; the "
            "last process finishes the cache"
        )
    return manifest


class _Build:
    """State of one build."""

    def __init__(
        self, path: Path, identity: Mapping[str, Any], encoder: CorpusEncoder, ranks: Ranks
    ) -> None:
        self._path = path
        self._identity = identity
        self._encoder = encoder
        self._targets = encoder.shard_targets
        self._ranks = ranks
        self.shards: dict[int, FileEntry] = {}
        self._side = self._side_file()
        side = None if self._side is None else (path / self._side.name).read_bytes()
        self._codec: Codec[Any] = load_codec(identity, side)
        self.shards = finished_shards(path, owner=ranks)
        for number, entry in self.shards.items():
            metadata = read_metadata(path / entry.name, number)
            expected = self._metadata(number).model_dump(exclude_unset=True)
            require_identity(path, metadata.model_dump(exclude_unset=True), expected)

    def require_space(self, label: str) -> None:
        """Announce the size of the missing shards, and refuse a disk that is too small."""
        needed = self._bytes_needed()
        say(
            f"{label}: {sum(self._targets):,} targets, about {needed / 1e6:,.1f} MB to write to "
            f"{self._path}"
        )
        free = shutil.disk_usage(self._path).free
        if free < needed * SPACE_MARGIN:
            raise self._disk_full(round(needed * SPACE_MARGIN))

    def write_shards(self, label: str) -> None:
        """Write the missing shards of this rank."""
        numbers = [number for number in range(len(self._targets)) if self._ranks.owns(number)]
        done = sum(self._targets[number] for number in numbers if number in self.shards)
        total = sum(self._targets[number] for number in numbers)
        with progress(label) as advance:
            for number in numbers:
                if number in self.shards:
                    continue
                pieces = []
                for piece in self._encoder.encode(number, self._codec):
                    pieces.append(piece)
                    done += self._codec.num_targets(piece.columns)
                    advance(done, total)
                self._write_shard(number, pieces)

    def finish(self) -> Manifest | None:
        """Write the manifest, which marks the cache as finished, if every shard exists."""
        if not self._ranks.is_single:
            # Cheap check of the names first; `finished_shards` reads every byte.
            if len(list(self._path.glob("shard-*.parquet"))) < len(self._targets):
                return None
            self.shards = finished_shards(self._path)
        if len(self.shards) < len(self._targets):
            return None
        shards = [self.shards[number] for number in range(len(self._targets))]
        try:
            # Several ranks may find all shards at once; each writes the same manifest.
            with self._exclusive():
                return write_manifest(self._path, self._identity, shards, self._targets, self._side)
        except OSError as error:
            raise self._failed(self._path / MANIFEST, error, 1 << 20) from error

    def _metadata(self, number: int) -> ShardMetadata:
        fields = {
            **self._identity,
            **({} if self._side is None else {"side_file": self._side.sha256}),
            "format": FORMAT,
            "shard": number,
            # A shard of another run may have a number that this run does not reach.
            "num_targets": self._targets[number] if number < len(self._targets) else 0,
            "num_shards": len(self._targets),
        }
        return ShardMetadata.model_validate(fields)

    def _bytes_needed(self) -> int:
        """Estimate the bytes of the missing shards from the finished ones, else from a sample."""
        done = sum(self._targets[number] for number in self.shards)
        if done:
            per_target = sum(entry.bytes for entry in self.shards.values()) / done
        else:
            sample = [piece.columns for piece in self._encoder.sample(self._codec)]
            per_target = self._codec.bytes_per_target(sample)
        return round((sum(self._targets) - done) * per_target)

    def _write_shard(self, number: int, pieces: Sequence[EncodedPiece]) -> None:
        num_targets = sum(self._codec.num_targets(piece.columns) for piece in pieces)
        if num_targets != self._targets[number]:
            raise ValueError(
                f"shard {number}: {num_targets} targets instead of {self._targets[number]}"
            )
        data = shard_bytes(pieces, self._codec, self._metadata(number))
        self.shards[number] = self._write(f"shard-{number:05d}", "parquet", data)

    def _side_file(self) -> FileEntry | None:
        """Return the side file, written by the first rank that takes its lock."""
        stem = SIDE_FILES.get(self._identity["kind"])
        if stem is None:
            return None
        with self._exclusive():
            entry = finished_files(self._path, SIDE_NAME, deletes=lambda _: True).get(stem)
            return entry or self._write(stem, "safetensors", self._encoder.fit())

    def _exclusive(self) -> AbstractContextManager[None]:
        """Wait until no other rank writes a file that all ranks share."""
        return lock_folder(self._path, REMEDY, name=".lock-shared", wait=True)

    def _write(self, stem: str, suffix: str, data: bytes | memoryview) -> FileEntry:
        """Write a file atomically under a name with its digest, which marks it as finished."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._path / f"{stem}-{digest[:16]}.{suffix}"
        try:
            write_bytes(path, data)
        except OSError as error:
            raise self._failed(path, error, len(data)) from error
        return FileEntry(name=path.name, sha256=digest, bytes=len(data))

    def _failed(self, path: Path, error: OSError, num_bytes: int) -> CacheError:
        if error.errno in DISK_FULL:
            needed = self._bytes_needed() if self.shards else 0
            return self._disk_full(max(needed, num_bytes))
        return CacheError(f"{path}: cannot be written ({error.strerror}); make its folder writable")

    def _disk_full(self, needed: int) -> CacheError:
        return CacheError(
            f"{self._path}: the disk is full; about {needed:,} more bytes are needed, "
            f"{shutil.disk_usage(self._path).free:,} are free; {len(self.shards)} of "
            f"{len(self._targets)} shards are finished and kept; free space, then run the same "
            "command again"
        )


def finished_shards(path: Path, owner: Ranks | None = None) -> dict[int, FileEntry]:
    """Return the shards with a valid checksum. Deletes the partial and damaged ones of `owner`."""
    shards = finished_files(
        path, SHARD_NAME, deletes=lambda number: owner is not None and owner.owns(int(number))
    )
    return {int(number): entry for number, entry in shards.items()}


def finished_files(
    path: Path, pattern: str, *, deletes: Callable[[str], bool] = lambda _: False
) -> dict[str, FileEntry]:
    """Return the files with a valid checksum, by the first group of the pattern of their names.

    Partial and damaged files are deleted where `deletes` accepts that group.
    """
    files: dict[str, FileEntry] = {}
    for file in sorted(path.iterdir()):
        # A leftover of `write_bytes`. That of another rank may be a write in progress.
        name = file.name.removeprefix(".").removesuffix(".tmp")
        match = re.fullmatch(pattern, name)
        if match is None or not file.is_file():
            continue
        sha256 = sha256_of(file)
        if name == file.name and sha256.startswith(match[2]):
            files[match[1]] = FileEntry(name=name, sha256=sha256, bytes=file.stat().st_size)
        elif deletes(match[1]):
            file.unlink()
    return files


def write_manifest(
    path: Path,
    identity: Mapping[str, Any],
    shards: Sequence[FileEntry],
    shard_targets: Sequence[int],
    side: FileEntry | None,
) -> Manifest:
    """Write the manifest of finished shards, and return it."""
    files = shards if side is None else [*shards, side]
    fields: dict[str, Any] = {
        "format": FORMAT,
        # Tuples become lists, so the returned manifest equals the one read back.
        "identity": json.loads(json.dumps(identity, sort_keys=True)),
        "shards": [
            {**shard.model_dump(), "targets": num_targets}
            for shard, num_targets in zip(shards, shard_targets, strict=True)
        ],
        "num_targets": sum(shard_targets),
        "num_bytes": sum(file.bytes for file in files),
    }
    if side is not None:
        fields["side_file"] = side.model_dump()
    fields["sha256"] = manifest_digest(fields)
    write_json(path / MANIFEST, fields)
    return Manifest.model_validate(fields)
