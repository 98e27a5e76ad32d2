"""Merge of cache folders that processes without a shared file system have built."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from collegium.cache.build import finished_files, finished_shards, write_manifest
from collegium.cache.manifest import (
    FOLDERS,
    SIDE_NAME,
    FileEntry,
    Manifest,
    read_manifest,
    require_identity,
)
from collegium.cache.processes import Ranks
from collegium.cache.shards import read_metadata
from collegium.errors import CacheError
from collegium.storage.files import write_bytes


def merge_all(paths: Sequence[Path]) -> list[tuple[Path, Manifest]]:
    """Merge fused caches, or each folder of per-teacher caches.

    Raises:
        CacheError: a folder does not exist, or `merge_caches` fails.
    """
    for path in paths:
        if not path.is_dir():
            raise CacheError(f"{path}: no such folder; must be one in which a cache was built")
    parts = {
        folder.relative_to(path)
        for path in paths
        for pattern in FOLDERS
        for folder in path.glob(pattern)
        if folder.is_dir()
    }
    merged = []
    for part in sorted(parts or {Path()}):
        others = [path / part for path in paths[1:] if (path / part).is_dir()]
        merged.append((paths[0] / part, merge_caches([paths[0] / part, *others])))
    return merged


def merge_caches(paths: Sequence[Path]) -> Manifest:
    """Copy missing files into the first folder, then write and return its manifest.

    Computes nothing and deletes nothing from the other folders, and keeps the shards of the first.
    The result has the same bytes as a cache built in one folder.

    Raises:
        CacheError: a folder holds no shard, or one of another run or format, or a manifest is
            damaged, or a file is in no folder.
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
        num_missing = example.num_shards - len(sources)
        if num_missing:
            missing = (n for n in range(example.num_shards) if n not in sources)
            shown = ", ".join(map(str, islice(missing, 8))) + (" ..." if num_missing > 8 else "")
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
