"""Resumable, deterministic build of a cache, shard by shard, and merge of its parts.

Processes without a shared file system build parts of a cache, each in a folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from collegium.cache.manifest import (
    FOLDERS,
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
from collegium.cache.processes import REMEDY, SINGLE_PROCESS, Ranks
from collegium.cache.shards import Codec, ShardMetadata, read_metadata
from collegium.cache.sources import ShardSource
from collegium.cache.store import SIDE_FILES, load_codec
from collegium.console import progress, say
from collegium.errors import DISK_FULL, CacheError
from collegium.storage.files import lock_folder, sha256_of, write_bytes, write_json

SPACE_MARGIN = 1.05
"""Required free space, as a multiple of the estimate."""


def build_cache(
    path: Path,
    identity: Mapping[str, Any],
    source: ShardSource,
    *,
    label: str = "cache",
    ranks: Ranks = SINGLE_PROCESS,
) -> Manifest | None:
    """Write the missing shards, then the manifest, and return the manifest.

    A killed build loses only the shard in progress. The finished cache has the same bytes however
    often the build was interrupted and however many processes ran it. With several processes, all
    but the last to finish return None. The folder is locked during the build.

    Args:
        identity: everything the content depends on, as plain data. `kind` names the codec.
        label: name of the cache in progress messages.

    Raises:
        CacheError: the folder holds a cache of another run, or the disk is full.
        CollegiumError: another process builds in this folder.
    """
    with ranks.lock(path):
        manifest = read_manifest(path)
        if manifest is not None:
            require_identity(path, manifest.identity, identity)
        # Verifies every finished shard, so a damaged one is built again even under a manifest.
        build = _Build(path, identity, source, ranks)
        if manifest is None or len(build.shards) < len(source.shard_targets):
            build.require_space(label)
            build.write_shards(label)
            manifest = build.finish()
    process = f"process {ranks.rank} of {ranks.world_size}"
    waiting = f"the shards of {process} are finished; the last process finishes the cache"
    say(f"{label}: {manifest.summary() if manifest else waiting}")
    return manifest


@dataclass
class _Build:
    path: Path
    identity: Mapping[str, Any]
    source: ShardSource
    ranks: Ranks

    def __post_init__(self) -> None:
        self._targets = self.source.shard_targets
        self.shards: dict[int, FileEntry] = {}
        self._side = self._side_file()
        side = self._side and (self.path / self._side.name).read_bytes()
        self._codec: Codec[Any] = load_codec(self.identity, side)
        self.shards = finished_shards(self.path, owner=self.ranks)
        for number, entry in self.shards.items():
            metadata = read_metadata(self.path / entry.name, number)
            expected = self._metadata(number).model_dump(exclude_unset=True)
            require_identity(self.path, metadata.model_dump(exclude_unset=True), expected)

    def require_space(self, label: str) -> None:
        """Announce the size of the missing shards, and refuse a disk that is too small."""
        needed = self._bytes_needed()
        size = f"about {needed / 1e6:,.1f} MB to write to {self.path}"
        say(f"{label}: {sum(self._targets):,} targets, {size}")
        if shutil.disk_usage(self.path).free < needed * SPACE_MARGIN:
            raise self._disk_full(round(needed * SPACE_MARGIN))

    def write_shards(self, label: str) -> None:
        """Write the missing shards of this rank."""
        numbers = [number for number in range(len(self._targets)) if self.ranks.owns(number)]
        missing = [number for number in numbers if number not in self.shards]
        total = sum(self._targets[number] for number in numbers)
        done = total - sum(self._targets[number] for number in missing)
        if missing:
            self.source.load()
        with progress(label) as report:
            report(done, total)

            def advance(num_targets: int) -> None:
                nonlocal done
                done += num_targets
                report(done, total)

            metadata = {number: self._metadata(number) for number in missing}
            for number, data in self.source.shards(metadata, self._codec, advance):
                self.shards[number] = self._write(f"shard-{number:05d}", "parquet", data)

    def finish(self) -> Manifest | None:
        """Write the manifest, which marks the cache as finished, if every shard exists."""
        if not self.ranks.is_single:
            # Cheap check of the names first; `finished_shards` reads every byte.
            if len(list(self.path.glob("shard-*.parquet"))) < len(self._targets):
                return None
            self.shards = finished_shards(self.path)
        if len(self.shards) < len(self._targets):
            return None
        shards = [self.shards[number] for number in range(len(self._targets))]
        try:
            # Several ranks may find all shards at once; each writes the same manifest.
            with self._exclusive():
                return write_manifest(self.path, self.identity, shards, self._targets, self._side)
        except OSError as error:
            raise self._failed(self.path / MANIFEST, error, 1 << 20) from error

    def _metadata(self, number: int) -> ShardMetadata:
        fields = {
            **self.identity,
            **({"side_file": self._side.sha256} if self._side else {}),
            "format": FORMAT,
            "shard": number,
            # A shard of another run may have a number that this run does not reach.
            "num_targets": self._targets[number] if number < len(self._targets) else 0,
            "num_shards": len(self._targets),
        }
        return ShardMetadata.model_validate(fields)

    def _bytes_needed(self) -> int:
        """Estimate the bytes of the missing shards from the finished ones, else from a sample."""
        if done := sum(self._targets[number] for number in self.shards):
            per_target = sum(entry.bytes for entry in self.shards.values()) / done
        else:
            per_target = self.source.bytes_per_target(self._codec)
        return round((sum(self._targets) - done) * per_target)

    def _side_file(self) -> FileEntry | None:
        """Return the side file, written by the first rank that takes its lock."""
        stem = SIDE_FILES.get(self.identity["kind"])
        if stem is None:
            return None
        with self._exclusive():
            entry = finished_files(self.path, SIDE_NAME, lambda _: True).get(stem)
            return entry or self._write(stem, "safetensors", self.source.fit())

    def _exclusive(self) -> AbstractContextManager[None]:
        """Wait until no other rank writes a file that all ranks share."""
        return lock_folder(self.path, REMEDY, name=".lock-shared", wait=True)

    def _write(self, stem: str, suffix: str, data: bytes | memoryview) -> FileEntry:
        """Write a file atomically under a name with its digest, which marks it as finished."""
        digest = hashlib.sha256(data).hexdigest()
        path = self.path / f"{stem}-{digest[:16]}.{suffix}"
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
            f"{self.path}: the disk is full; about {needed:,} more bytes are needed, "
            f"{shutil.disk_usage(self.path).free:,} are free; {len(self.shards)} of "
            f"{len(self._targets)} shards are finished and kept; free space, then run the same "
            "command again"
        )


def finished_shards(path: Path, owner: Ranks | None = None) -> dict[int, FileEntry]:
    """Return the shards with a valid checksum. Deletes the partial and damaged ones of `owner`."""
    deletes = (lambda number: owner.owns(int(number))) if owner else None
    shards = finished_files(path, SHARD_NAME, deletes)
    return {int(number): entry for number, entry in shards.items()}


def finished_files(
    path: Path, pattern: str, deletes: Callable[[str], bool] | None = None
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
        elif deletes and deletes(match[1]):
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
    pairs = zip(shards, shard_targets, strict=True)
    fields: dict[str, Any] = {
        "format": FORMAT,
        # Tuples become lists, so the returned manifest equals the one read back.
        "identity": json.loads(json.dumps(identity, sort_keys=True)),
        "shards": [{**shard.model_dump(), "targets": targets} for shard, targets in pairs],
        "num_targets": sum(shard_targets),
        "num_bytes": sum(file.bytes for file in (*shards, *([side] if side else []))),
        **({"side_file": side.model_dump()} if side else {}),
    }
    fields["sha256"] = manifest_digest(fields)
    write_json(path / MANIFEST, fields)
    return Manifest.model_validate(fields)


def merge_all(paths: Sequence[Path]) -> list[tuple[Path, Manifest]]:
    """Merge fused caches, or each folder of per-teacher caches, which must exist."""
    for path in paths:
        if not path.is_dir():
            raise CacheError(f"{path}: no such folder; must be one in which a cache was built")
    folders = {path: [f for pattern in FOLDERS for f in path.glob(pattern)] for path in paths}
    parts = {f.relative_to(path) for path in paths for f in folders[path] if f.is_dir()}
    merged = []
    for part in sorted(parts or {Path()}):
        others = [path / part for path in paths[1:] if (path / part).is_dir()]
        merged.append((paths[0] / part, merge_caches([paths[0] / part, *others])))
    return merged


def merge_caches(paths: Sequence[Path]) -> Manifest:
    """Copy missing files into the first folder, then write and return its manifest.

    Computes nothing and deletes nothing from the other folders, and keeps the shards of the first.
    The result has the same bytes as a cache built in one folder.

    Raises CacheError if a folder holds no shard, or one of another run or format, or if a manifest
    is damaged, or a file is in no folder.
    """
    first = paths[0]
    with Ranks().lock(first):
        for path in paths[1:]:
            # Nothing is taken from it, but a folder that was tampered with is refused.
            read_manifest(path)
        shards = {first: finished_shards(first, owner=Ranks())}
        shards |= {path: finished_shards(path) for path in paths[1:]}
        for path, entries in shards.items():
            if not entries and (path != first or len(paths) == 1):
                raise CacheError(
                    f"{path}: holds no shard; must be a folder in which a cache was built; name "
                    "the folders that hold some"
                )
        metadata = {
            (path, number): read_metadata(path / entry.name, number)
            for path, entries in shards.items()
            for number, entry in entries.items()
        }
        example = next(iter(metadata.values()))
        for (path, _), other in metadata.items():
            require_identity(path, other.of_cache(), example.of_cache())
        # Reversed, so that the earliest folder wins and the first keeps its shards.
        sources = {number: path for path in reversed(paths) for number in shards[path]}
        if num_missing := example.num_shards - len(sources):
            # Lazy: a damaged shard may claim any number of them.
            missing = (str(n) for n in range(example.num_shards) if n not in sources)
            shown = ", ".join(islice(missing, 8)) + " ..." * (num_missing > 8)
            raise CacheError(
                f"{first}: {num_missing} of {example.num_shards} shards are in no folder "
                f"({shown}); must be complete; build them again, or name their folders"
            )
        places = [(sources[number], number) for number in range(example.num_shards)]
        side = None
        if example.side_file is not None:
            side = _copy(*_find_side_file(paths, example.side_file), first)
        entries = [_copy(path, shards[path][number], first) for path, number in places]
        counts = [metadata[place].num_targets for place in places]
        return write_manifest(first, example.model_extra or {}, entries, counts, side)


def _find_side_file(paths: Sequence[Path], sha256: str) -> tuple[Path, FileEntry]:
    for path in paths:
        for entry in finished_files(path, SIDE_NAME).values():
            if entry.sha256 == sha256:
                return path, entry
    raise CacheError(
        f"{paths[0]}: the side file of its shards is in no folder; must be next to them; name the "
        "folder in which they were built"
    )


def _copy(path: Path, entry: FileEntry, folder: Path) -> FileEntry:
    """Copy a file atomically, unless it is already there."""
    if path != folder:
        try:
            write_bytes(folder / entry.name, (path / entry.name).read_bytes())
        except OSError as error:
            raise CacheError(
                f"{folder / entry.name}: cannot be written ({error.strerror}); free space, then "
                "run the same command again"
            ) from error
    return entry
