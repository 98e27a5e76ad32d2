"""Putting together what processes without a common folder have built."""

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
from collegium.files import fsync

OWN_FIELDS = ("format", "shard", "num_targets", "num_shards")
"""What a shard says of itself beside the identity of its cache."""


def merge_all(paths: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Merge caches of either kind: their own folders, or those of each teacher that any of them has, with its hidden states.

    Raises:
        CacheError: as `merge_caches`, or hidden states of another run.
    """
    for path in paths:
        if not path.is_dir():
            raise CacheError(f"{path}: no such folder; must be one in which a cache was built")
    parts = {file.relative_to(path) for path in paths for file in path.glob("teachers/*/*")}
    if not parts:
        return [(paths[0], merge_caches(paths))]
    found = []
    for part in sorted(parts):
        others = [path / part for path in paths[1:] if (path / part).is_dir()]
        found.append((paths[0] / part, merge_caches([paths[0] / part, *others])))
    return found + _merge_features(paths)


def _merge_features(paths: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Copy hidden states that the first folder lacks: one process builds all of a teacher, so they are whole or absent."""
    merged = {}
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
                for name in (
                    *names,
                    FEATURE_MANIFEST,
                ):  # the manifest last: without it, nothing is finished
                    _copy(source / name, target)
    return sorted(merged.items())


def merge_caches(paths: Sequence[Path]) -> dict[str, Any]:
    """Copy the shards that the first folder lacks from the others, and write its manifest; returns it.

    Nothing is computed and nothing removed from the other folders; shards that the first has are kept. The result has the same
    bytes as a cache built in one folder.

    Raises:
        CacheError: a folder holds no shard, one of another run or of another format, or some shard is in none of them.
    """
    first = paths[0]
    nobody = Ranks(0, 2**63)  # of no shard the owner: nothing is removed
    with Ranks().lock(first):
        found = {
            path: finished_shards(path, Ranks() if path == first else nobody) for path in paths
        }
        sources = {number: file for path in reversed(paths) for number, file in found[path].items()}
        notes = {number: _note(file) for number, file in sources.items()}
        for path in paths[1:]:
            if not found[path]:
                raise CacheError(
                    f"{path}: holds no shard; must be a folder in which a cache was built; leave it out"
                )
        if not notes:
            raise CacheError(
                f"{first}: holds no shard, and no other folder was given; name those to be merged"
            )
        example = next(file for path in paths for file in found[path].values())
        wanted = _identity(_note(example))
        for path in paths:
            for file in found[path].values():
                require_identity(path, _identity(_note(file)), wanted)
        num_shards = wanted["num_shards"]
        missing = sorted(set(range(num_shards)) - set(sources))
        if missing:
            shown = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            raise CacheError(
                f"{first}: {len(missing)} of {num_shards} shards are in no folder ({shown}); must be all there; run the "
                "processes that build them again, or name their folders"
            )
        for number, file in sources.items():
            if file.parent != first:
                sources[number] = _copy(file, first)
        files = [sources[number] for number in range(num_shards)]
        counts = [notes[number]["num_targets"] for number in range(num_shards)]
        identity = {key: value for key, value in wanted.items() if key not in OWN_FIELDS}
        return write_manifest(first, identity, files, counts)


def _note(file: Path) -> dict[str, Any]:
    try:
        note = read_identity(file)
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{file}: cannot be read ({error}); delete it and build it again"
        ) from error
    if not isinstance(note, dict) or not set(OWN_FIELDS) <= set(note):
        raise CacheError(
            f"{file}: says nothing of its cache; must be a shard of this format; build it again"
        )
    return note


def _identity(note: dict[str, Any]) -> dict[str, Any]:
    """What all shards of a cache have in common."""
    return {key: value for key, value in note.items() if key not in ("shard", "num_targets")}


def _copy(file: Path, folder: Path) -> Path:
    """A copy that is whole or absent."""
    path, temporary = folder / file.name, folder / f".{file.name}.tmp"
    try:
        shutil.copyfile(file, temporary)
        fsync(temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CacheError(
            f"{path}: cannot be written ({error.strerror}); free space, then run the same command again"
        ) from error
    fsync(folder)
    return path
