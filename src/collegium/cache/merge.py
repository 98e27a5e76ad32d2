"""Merge of cache folders that processes without a shared file system have built."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collegium.cache.build import finished_shards, write_manifest
from collegium.cache.feature_store import (
    FEATURE_MANIFEST,
    feature_folders,
    require_feature_manifest,
)
from collegium.cache.processes import Ranks
from collegium.cache.shards import read_identity
from collegium.cache.store import require_identity
from collegium.errors import CacheError
from collegium.storage.files import fsync

SHARD_FIELDS = ("format", "shard", "num_targets", "num_shards")
"""Metadata fields of a shard in addition to the identity of its cache."""


def merge_all(paths: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Merge fused caches, or each teacher's targets and hidden states of per-teacher caches.

    Raises:
        CacheError: hidden states are of another run, or `merge_caches` fails.
    """
    for path in paths:
        if not path.is_dir():
            raise CacheError(f"{path}: no such folder; must be one in which a cache was built")
    parts = {file.relative_to(path) for path in paths for file in path.glob("teachers/*/*")}
    if not parts:
        return [(paths[0], merge_caches(paths))]
    merged = []
    for part in sorted(parts):
        others = [path / part for path in paths[1:] if (path / part).is_dir()]
        merged.append((paths[0] / part, merge_caches([paths[0] / part, *others])))
    return merged + _merge_features(paths)


def _merge_features(paths: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Copy hidden states that are missing from the first folder."""
    merged = {}
    # One process builds all hidden states of a teacher, so each folder is complete or missing.
    for path in paths:
        for source in map(Path, feature_folders(path)):
            target = paths[0] / source.relative_to(path)
            manifest = require_feature_manifest(source)
            if target in merged:
                require_identity(source, manifest["identity"], merged[target]["identity"])
                continue
            merged[target] = manifest
            if path != paths[0]:
                names = [entry["name"] for entry in (manifest["projection"], *manifest["shards"])]
                target.mkdir(parents=True, exist_ok=True)
                # The manifest last: a folder without one is unfinished.
                for name in (*names, FEATURE_MANIFEST):
                    _copy(source / name, target)
    return sorted(merged.items())


def merge_caches(paths: Sequence[Path]) -> dict[str, Any]:
    """Copy missing shards into the first folder, then write and return its manifest.

    Computes nothing and deletes nothing from the other folders, and keeps the shards of the first.
    The result has the same bytes as a cache built in one folder.

    Raises:
        CacheError: a folder holds no shard or one of another run or format, or a shard is missing.
    """
    first = paths[0]
    # Owns no shard above 0, so that `finished_shards` keeps the files of the other folders.
    reader = Ranks(0, 2**63)
    with Ranks().lock(first):
        shards = {
            path: finished_shards(path, Ranks() if path == first else reader) for path in paths
        }
        # Reversed, so that the earliest folder wins and the first keeps its shards.
        sources = {
            number: file for path in reversed(paths) for number, file in shards[path].items()
        }
        metadata = {number: _shard_metadata(file) for number, file in sources.items()}
        for path in paths[1:]:
            if not shards[path]:
                raise CacheError(
                    f"{path}: holds no shard; must be a folder in which a cache was built; "
                    "leave it out"
                )
        if not metadata:
            raise CacheError(
                f"{first}: holds no shard, and no other folder was given; name the folders to merge"
            )
        example = next(file for path in paths for file in shards[path].values())
        expected = _cache_metadata(_shard_metadata(example))
        for path in paths:
            for file in shards[path].values():
                require_identity(path, _cache_metadata(_shard_metadata(file)), expected)
        num_shards = expected["num_shards"]
        missing = sorted(set(range(num_shards)) - set(sources))
        if missing:
            shown = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            raise CacheError(
                f"{first}: {len(missing)} of {num_shards} shards are in no folder ({shown}); must "
                "be complete; build them again, or name their folders"
            )
        for number, file in sources.items():
            if file.parent != first:
                sources[number] = _copy(file, first)
        files = [sources[number] for number in range(num_shards)]
        counts = [metadata[number]["num_targets"] for number in range(num_shards)]
        identity = {key: value for key, value in expected.items() if key not in SHARD_FIELDS}
        return write_manifest(first, identity, files, counts)


def _shard_metadata(file: Path) -> dict[str, Any]:
    try:
        metadata = read_identity(file)
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{file}: cannot be read ({error}); delete it and build it again"
        ) from error
    if not isinstance(metadata, dict) or not set(SHARD_FIELDS) <= set(metadata):
        raise CacheError(
            f"{file}: has no cache metadata; must be a shard of this format; build it again"
        )
    return metadata


def _cache_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Keep the fields that all shards of a cache share."""
    return {key: value for key, value in metadata.items() if key not in ("shard", "num_targets")}


def _copy(file: Path, folder: Path) -> Path:
    """Copy a file atomically."""
    path, temporary = folder / file.name, folder / f".{file.name}.tmp"
    try:
        shutil.copyfile(file, temporary)
        # fsync before the rename, or a crash could publish a file without its content.
        fsync(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CacheError(
            f"{path}: cannot be written ({error.strerror}); free space, then run the same command "
            "again"
        ) from error
    fsync(folder)
    return path
