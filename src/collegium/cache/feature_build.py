"""Writing hidden states shard by shard: what is finished is kept, whatever ends the process."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from collegium.cache.feature_shards import PieceFeatures, feature_shard_bytes
from collegium.cache.feature_store import FEATURE_FORMAT, FEATURE_MANIFEST, read_feature_manifest
from collegium.cache.features import Projection, projections_bytes, read_projections
from collegium.cache.store import manifest_digest, require_identity
from collegium.errors import CacheError
from collegium.storage.files import lock_folder, sha256_of, write_bytes, write_json

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NAME = re.compile(r"(?:projection|shard-(\d{5,}))-([0-9a-f]{16})\.(?:parquet|safetensors)")
Fit = Callable[[], Mapping[str, Projection]]
Encode = Callable[[int, Mapping[str, Projection]], Iterable[PieceFeatures]]


def build_features(
    path: Path,
    identity: Mapping[str, Any],
    fit: Fit,
    encode: Encode,
    *,
    shard_targets: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the projection and the shards that are missing, then the manifest; returns it.

    A killed build loses the shard that it was at; the finished folder has the same bytes as an unbroken one, for the
    projection is read back, not fitted anew.

    Args:
        path: the folder; its lock is held meanwhile.
        identity: what the states depend on, as plain data, with `layers`.
        fit: fits the projection of each tap; called where it is missing.
        encode: number of a shard and projections -> its pieces; called for the missing ones alone.
        shard_targets: the number of targets of each shard.
        progress: called with (targets done, all targets).

    Raises:
        CacheError: the folder holds the states of another run, or the disk is full.
        CollegiumError: another process builds here.
    """
    with lock_folder(path, "wait for it, or set another cache.path"):
        manifest = read_feature_manifest(path)
        if manifest is not None:
            require_identity(path, manifest["identity"], identity)
        _remove_broken(path)
        projection = _projection_file(path, fit)
        projections = read_projections(projection.read_bytes())
        note = {**identity, "projection": sha256_of(projection)}
        files = _finished_shards(path, note)
        is_whole = len(files) == len(shard_targets)
        if manifest is not None and is_whole and manifest["projection"]["name"] == projection.name:
            return manifest
        done = sum(shard_targets[number] for number in files)
        for number, num_targets in enumerate(shard_targets):
            if number in files:
                continue
            pieces = list(encode(number, projections))
            found = sum(map(len, pieces))
            if found != num_targets:
                raise ValueError(f"shard {number}: {found} targets instead of {num_targets}")
            data = feature_shard_bytes(pieces, identity["layers"], note={**note, "shard": number})
            files[number] = _write(path, f"shard-{number:05d}", data, "parquet")
            done += num_targets
            if progress is not None:
                progress(done, sum(shard_targets))
        return _finish(path, identity, projection, files, shard_targets)


def _projection_file(path: Path, fit: Fit) -> Path:
    found = sorted(path.glob("projection-*.safetensors"))
    if found:
        return found[0]
    return _write(path, "projection", projections_bytes(fit()), "safetensors")


def _finish(
    path: Path,
    identity: Mapping[str, Any],
    projection: Path,
    files: Mapping[int, Path],
    shard_targets: Sequence[int],
) -> dict[str, Any]:
    """Write the manifest, which makes the folder one to be read."""
    shards = [{**_entry(files[number]), "targets": num} for number, num in enumerate(shard_targets)]
    entry = _entry(projection)
    manifest: dict[str, Any] = {
        "format": FEATURE_FORMAT,
        "identity": dict(identity),
        "projection": entry,
        "shards": shards,
        "num_targets": sum(shard_targets),
        "num_bytes": sum(shard["bytes"] for shard in shards) + entry["bytes"],
    }
    manifest["sha256"] = manifest_digest(manifest)
    try:
        write_json(path / FEATURE_MANIFEST, manifest)
    except OSError as error:
        raise _failed(path, error) from error
    return manifest


def _entry(file: Path) -> dict[str, Any]:
    return {"name": file.name, "sha256": sha256_of(file), "bytes": file.stat().st_size}


def _write(path: Path, stem: str, data: bytes | memoryview, ending: str) -> Path:
    """A file whose name says what is in it, so that a finished one is known without the manifest."""
    file = path / f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}.{ending}"
    try:
        write_bytes(file, data)
    except OSError as error:
        raise _failed(file, error) from error
    return file


def _failed(file: Path, error: OSError) -> CacheError:
    if error.errno in FULL:
        return CacheError(
            f"{file}: the disk is full; finished shards are kept; free space, then run the same command again"
        )
    return CacheError(f"{file}: cannot be written ({error.strerror}); make the folder writable")


def _remove_broken(path: Path) -> None:
    """What an interrupted writing or a bad disk left."""
    for leftover in (*path.glob(".shard-*.tmp"), *path.glob(".projection-*.tmp")):
        leftover.unlink()
    for file in path.iterdir():
        match = _NAME.fullmatch(file.name)
        if match is not None and not sha256_of(file).startswith(match.group(2)):
            file.unlink()


def _finished_shards(path: Path, note: Mapping[str, Any]) -> dict[int, Path]:
    """The shards that stand.

    Raises:
        CacheError: one is of another run, or of another projection.
    """
    found: dict[int, Path] = {}
    for file in sorted(path.glob("shard-*.parquet")):
        match = _NAME.fullmatch(file.name)
        if match is None:
            continue
        number = int(match.group(1))
        text = (pq.read_schema(file).metadata or {}).get(b"collegium")
        require_identity(
            path, None if text is None else json.loads(text), {**note, "shard": number}
        )
        found[number] = file
    return found
