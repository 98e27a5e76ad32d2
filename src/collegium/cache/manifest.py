"""The manifest of a cache folder: the identity of its content, and the checksum of each file.

docs/cache-format.md documents it for other readers. It is written last, so a folder without one is
unfinished. A cache with another identity than the run's is refused, and so is a file that fails its
checksum.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from collegium.errors import CacheError
from collegium.storage.files import differing_fields, fingerprint
from collegium.storage.location import Location
from collegium.storage.records import MAX_BYTES

FORMAT = 2
"""Version of docs/cache-format.md. Any other is refused."""
MANIFEST = "manifest.json"
OLD_HIDDEN_MANIFEST = "features.json"
"""Manifest of hidden states in format 1."""
SHARD_NAME = r"shard-(\d{5,})-([0-9a-f]{16})\.parquet"
SIDE_NAME = r"([a-z]+)-([0-9a-f]{16})\.safetensors"
FOLDERS = ("teachers/*/*/", "features/*/")
"""Folders of a per-teacher cache: outputs of teachers, and hidden states."""
REBUILD = "delete it and build the cache again"
MAX_FIELDS = 8
"""Differing identity fields shown in one message."""


Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class FileEntry(_Record):
    """A file that a builder wrote. The patterns of names exclude every path."""

    name: Annotated[str, Field(pattern=f"^(?:{SHARD_NAME}|{SIDE_NAME})$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Count


class ShardEntry(FileEntry):
    """A shard, and its number of targets."""

    targets: Count


class Manifest(_Record):
    """Content of a manifest."""

    format: Literal[2]
    identity: dict[str, Any]
    """Everything the content depends on, as plain data."""
    shards: list[ShardEntry]
    num_targets: Count
    num_bytes: Count
    sha256: str
    """Digest of all other fields, and so of every byte of the cache."""
    side_file: FileEntry | None = None

    @model_validator(mode="after")
    def _adds_up(self) -> Manifest:
        files = [*self.shards, *([self.side_file] if self.side_file else [])]
        sums = sum(one.targets for one in self.shards), sum(one.bytes for one in files)
        if sums != (self.num_targets, self.num_bytes):
            raise ValueError(f"num_targets, num_bytes: must be {sums[0]}, {sums[1]}")
        return self

    def summary(self) -> str:
        """Describe the size of a finished cache in one line."""
        count, size = self.num_targets, f"{self.num_bytes / 1e6:,.1f} MB"
        per_target = f"{self.num_bytes / max(count, 1):.1f} bytes per target"
        shards = f"{len(self.shards)} shard{'s' * (len(self.shards) != 1)}"
        return f"{count:,} targets in {shards}, {size}, {per_target}"


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the digest of all manifest fields except the digest itself."""
    return fingerprint({key: value for key, value in manifest.items() if key != "sha256"})


def read_manifest(where: Path | str) -> Manifest | None:
    """Read the manifest of a finished cache, None without one. Raises CacheError for a bad one."""
    location = Location.of(where)
    file = location.path_of(MANIFEST)
    try:
        if (size := location.size(MANIFEST) or 0) > MAX_BYTES:
            raise CacheError(
                f"{file}: got {size:,} bytes; must be at most {MAX_BYTES:,}; {REBUILD}"
            )
        data = location.read_bytes(MANIFEST)
        if data is None:
            if location.size(OLD_HIDDEN_MANIFEST) is not None:
                raise CacheError(
                    f"{location.path_of(OLD_HIDDEN_MANIFEST)}: got hidden states of format 1; must "
                    f"be of format {FORMAT}; delete the folder and build the cache again"
                )
            return None
        values = from_json(data)
    except (OSError, ValueError) as error:
        raise CacheError(f"{file}: damaged ({error}); build the cache again") from error
    if not isinstance(values, dict) or values.get("sha256") != manifest_digest(values):
        raise CacheError(f"{file}: fails its own sha256; {REBUILD}")
    version = values.get("format")
    if isinstance(version, int) and version != FORMAT:
        rebuild = "delete the folder and build the cache again"
        remedy = "upgrade collegium" if version > FORMAT else rebuild
        raise CacheError(f"{file}: got format {version}; must be {FORMAT}; {remedy}")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise CacheError(f"{file}: {first_error(error)}; {REBUILD}") from error


def require_manifest(where: Path | str) -> Manifest:
    """Read the manifest of a finished cache. Raises CacheError if there is none, or a bad one."""
    manifest = read_manifest(where)
    if manifest is None:
        raise CacheError(
            f"{where}: no finished cache; must hold {MANIFEST}; build it with `collegium cache`"
        )
    return manifest


def first_error(error: ValueError) -> str:
    """Describe the first field of another shape than in docs/cache-format.md."""
    if not isinstance(error, ValidationError):
        return str(error)
    detail = error.errors(include_url=False)[0]
    if not detail["loc"]:
        return f"{detail['msg']}, as in its files"
    got = "is missing" if detail["type"] == "missing" else f"got {detail['input']!r:.60}"
    return f"{'.'.join(map(str, detail['loc']))}: {got}; must be as in docs/cache-format.md"


def require_identity(where: Path | str, actual: Any, expected: Mapping[str, Any]) -> None:
    """Raise CacheError with the fields that differ, as `field: in the cache -> in the run`."""
    fields = differing_fields(actual, expected)
    if fields:
        more = f" and {len(fields) - MAX_FIELDS} more" if len(fields) > MAX_FIELDS else ""
        raise CacheError(
            f"{where}: built for another run ({'; '.join(fields[:MAX_FIELDS])}{more}); must agree "
            "in every field; set another cache.path, or delete that folder"
        )


def verify_file(location: Location, entry: FileEntry) -> None:
    """Verify size and checksum of a file. Raises CacheError if it is missing or differs."""
    # The size first: a truncated file is found without reading it.
    verify_size(location, entry)
    if location.sha256(entry.name) != entry.sha256:
        raise damaged(location, entry.name, "fails its sha256")


def verify_size(location: Location, entry: FileEntry) -> None:
    """Verify the size of a file. Raises CacheError if it is missing or differs."""
    num_bytes = location.size(entry.name)
    if num_bytes is None:
        raise damaged(location, entry.name, "missing")
    if num_bytes != entry.bytes:
        raise damaged(location, entry.name, f"has {num_bytes} bytes instead of {entry.bytes}")


def damaged(location: Location, name: str, problem: str) -> CacheError:
    """Return the error for a file that is not the one of the manifest."""
    return CacheError(
        f"{location.path_of(name)}: {problem}; must be the file that the cache was built with; "
        f"{REBUILD}, all other shards are kept"
    )


def cache_folders(where: Path | str) -> list[str]:
    """Return the folder of a fused cache, or all folders of a per-teacher cache."""
    location = Location.of(where)
    patterns = [folder + MANIFEST for folder in FOLDERS] + [f"features/*/{OLD_HIDDEN_MANIFEST}"]
    folders = [folder for pattern in patterns for folder in location.folders(pattern)]
    return folders or [str(where)]
