"""The cache of one run: what it depends on, building it, and who may read it.

    cache/                         kind fused: one target per position of the training split
    cache/teachers/NAME/train/     kind per_teacher: what this teacher says there
    cache/teachers/NAME/calibration/                 and on the calibration split, for preflight
    cache/features/NAME/           its hidden states on the training split, where feature terms read them

Each is a folder of the same format with a manifest of its own, so a teacher more is two folders more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache as remembered
from pathlib import Path
from typing import Any, Literal

from collegium.cache.build import build_cache
from collegium.cache.feature_build import build_features
from collegium.cache.feature_store import FeatureCache, open_features, read_feature_manifest
from collegium.cache.layout import Layout
from collegium.cache.processes import Ranks
from collegium.cache.store import (
    TargetCache,
    open_cache,
    read_manifest,
    require_identity,
    summary,
)
from collegium.console import progress, say
from collegium.errors import RecipeError
from collegium.evaluate.scoring import spread_windows
from collegium.fusion.describe import to_recipe
from collegium.fusion.fuse import Fusion
from collegium.recipe import plain
from collegium.teachers.cached import BatchKeys, CachedTeacher
from collegium.teachers.cached_features import FeatureEncoder
from collegium.teachers.encoders import (
    SHARD_TARGETS,
    CorpusEncoder,
    FusedEncoder,
    TeacherEncoder,
)
from collegium.teachers.local import LocalTeacher
from collegium.variants import Variant, main_variant
from collegium.workspace import Workspace

Part = Literal["train", "calibration"]
Built = tuple[Path, dict[str, Any] | None]
"""A folder and its manifest; None where other processes are still at work on it."""
CALIBRATION_K = 64
"""Tokens kept per position of the calibration split: they say how far teachers are apart, all else is in the scalars."""


def cache_path(workspace: Workspace) -> Path:
    """The folder of the cache: `cache.path`, else `cache` inside the run folder.

    Raises:
        RecipeError: the cache is elsewhere.
    """
    recipe = workspace.recipe
    if recipe.cache.url is not None:
        raise RecipeError(
            f"cache.url: got {recipe.cache.url}, which is read and never built; build with cache.path, then copy the folder there"
        )
    return recipe.cache.path or recipe.output_dir / "cache"


def teacher_path(workspace: Workspace, name: str, part: Part) -> Path:
    """The folder of one teacher in a per-teacher cache.

    Raises:
        RecipeError: the cache is elsewhere.
    """
    return cache_path(workspace) / _teacher_folder(name, part)


def _teacher_folder(name: str, part: Part) -> str:
    return f"teachers/{name}/{part}"


def _where(workspace: Workspace, folder: str = "") -> Path | str:
    """A folder of the cache to be read."""
    url = workspace.recipe.cache.url
    if url is None:
        return cache_path(workspace) / folder
    return f"{url.rstrip('/')}/{folder}".rstrip("/")


def cache_identity(workspace: Workspace, fusion: Fusion) -> dict[str, Any]:
    """Everything that fused targets depend on, as plain data."""
    recipe = workspace.recipe
    return {
        "kind": "fused",
        "targets": plain(recipe.cache)["targets"],
        **_shared_identity(workspace, "train"),
        "teachers": {name: _teacher_identity(workspace, name) for name in recipe.teachers},
        "fusion": plain(to_recipe(fusion)),
    }


def teacher_cache_identity(workspace: Workspace, name: str, part: Part) -> dict[str, Any]:
    """Everything that what is kept of one teacher depends on: no other teacher, and no fusion."""
    recipe = workspace.recipe
    targets = plain(recipe.cache)["targets"]
    if part == "calibration":
        targets = {"name": "top_k", "k": min(CALIBRATION_K, workspace.vocab_size)}
    return {
        "kind": "per_teacher",
        "targets": targets,
        "temperatures": sorted(recipe.cache.temperatures),
        **_shared_identity(workspace, part),
        "teachers": {name: _teacher_identity(workspace, name)},
    }


def _teacher_identity(workspace: Workspace, name: str) -> dict[str, Any]:
    options = workspace.recipe.teachers[name]
    return {
        "weights": workspace.digest(options.model),
        "revision": options.revision,
        "dtype": options.dtype,
        "attention": options.attention,
        "logit_scale": options.logit_scale,
    }


def _shared_identity(workspace: Workspace, part: Part) -> dict[str, Any]:
    recipe, dataset = workspace.recipe, workspace.datasets[part]
    data = {
        "windows": dataset.fingerprint,
        "documents": _sha256("\0".join(dataset.sample_names)),
        "max_length": recipe.data.max_length,
        "packing": recipe.data.packing,
    }
    if part == "calibration":
        data["max_tokens"] = recipe.preflight.max_tokens
    return {
        "seed": recipe.seed,
        "vocab_size": workspace.vocab_size,
        "tokenizer": _sha256(workspace.tokenizer.backend_tokenizer.to_str()),
        "data": data,
        "shard_targets": SHARD_TARGETS,
    }


def build(workspace: Workspace, fusion: Callable[[], Fusion | None]) -> list[Built]:
    """Build the run's cache, or what is missing of it.

    Args:
        workspace: the run.
        fusion: how its teachers are fused; asked for a fused cache alone.

    Raises:
        CollegiumError: there is nothing to cache, or a folder cannot be used.
    """
    if not workspace.recipe.teachers:
        raise RecipeError(
            "teachers: none given; a cache holds what teachers say, name at least one"
        )
    share = Ranks.from_environment()
    share.set_device()
    if workspace.recipe.cache.kind == "per_teacher":
        parts: tuple[Part, ...] = ("calibration", "train")
        names = workspace.recipe.teachers
        for part in parts:
            _refuse_others(workspace, names, part)
        built = [_build_teacher(workspace, name, part) for name in names for part in parts]
        kept = workspace.kept_taps if share.rank == 0 else ()  # hidden states have one builder
        return built + [build_teacher_features(workspace, name) for name in kept]
    found = fusion()
    assert found is not None  # there are teachers
    return [_build_fused(workspace, found)]


def reads_cache(
    workspace: Workspace, variant: Variant, fusion: Callable[[], Fusion | None]
) -> bool:
    """Whether a student trains from the cache: one with teachers, from a fused cache only under the run's own fusion."""
    is_asked = workspace.recipe.cache.enabled and variant.objective.kd_ratio > 0
    if not is_asked or not variant.teachers:
        return False
    if workspace.recipe.cache.kind == "per_teacher":
        return True
    student = main_variant(workspace.recipe, fusion())
    same_fusion = plain(variant.fusion) == plain(student.fusion)
    return same_fusion and variant.teachers == student.teachers


def identities(workspace: Workspace, variant: Variant) -> dict[str, dict[str, Any]]:
    """The identity of each folder that a student reads, by the name of its teacher; "" for the fused one."""
    assert variant.fusion is not None  # `reads_cache` has looked
    if workspace.recipe.cache.kind == "fused":
        return {"": cache_identity(workspace, variant.fusion)}
    found = {name: teacher_cache_identity(workspace, name, "train") for name in variant.teachers}
    kept = [name for name in workspace.kept_taps if name in variant.teachers]
    return found | {f"features {name}": feature_identity(workspace, name) for name in kept}


def open_or_build(workspace: Workspace, variant: Variant) -> dict[str, TargetCache]:
    """What a student reads instead of its teachers, built first where it is not there; named as in `identities`.

    Raises:
        CacheError: a folder cannot be built, is of another run, or is damaged.
    """
    assert variant.fusion is not None  # `reads_cache` has looked
    if workspace.recipe.cache.kind == "per_teacher":
        _refuse_others(workspace, variant.teachers, "train")
        return {name: _open_teacher(workspace, name, "train") for name in variant.teachers}
    where = _where(workspace)
    if read_manifest(where) is None:
        _build_fused(workspace, variant.fusion)
    return {"": open_cache(where, cache_identity(workspace, variant.fusion))}


def feature_identity(workspace: Workspace, name: str) -> dict[str, Any]:
    """Everything that the kept hidden states of one teacher depend on."""
    return {
        "kind": "features",
        "layers": workspace.kept_taps[name],
        **plain(workspace.recipe.cache)["features"],
        **_shared_identity(workspace, "train"),
        "teachers": {name: _teacher_identity(workspace, name)},
    }


def open_or_build_features(workspace: Workspace, variant: Variant) -> dict[str, FeatureCache]:
    """The hidden states that a student's feature terms read, by teacher; built first where they are not there.

    Raises:
        CacheError: a folder cannot be built, is of another run, or is damaged.
    """
    found = {}
    for name in workspace.kept_taps:
        if name in variant.teachers:
            where = _where(workspace, f"features/{name}")
            if read_feature_manifest(where) is None:
                build_teacher_features(workspace, name)
            found[name] = open_features(where, feature_identity(workspace, name))
    return found


def feature_path(workspace: Workspace, name: str) -> Path:
    """The folder of one teacher's hidden states.

    Raises:
        RecipeError: the cache is elsewhere.
    """
    return cache_path(workspace) / "features" / name


def build_teacher_features(workspace: Workspace, name: str) -> Built:
    """Keep one teacher's hidden states; it alone is in memory, and not even that where nothing is missing.

    Raises:
        CacheError: the folder cannot be used.
    """
    recipe, options = workspace.recipe, workspace.recipe.cache.features
    assert options is not None  # or no tap would be kept

    @remembered
    def teacher() -> LocalTeacher:
        return workspace.load_teacher(name)

    identity, path = feature_identity(workspace, name), feature_path(workspace, name)
    encoder = FeatureEncoder(
        teacher,
        workspace.datasets["train"],
        identity["layers"],
        options=options,
        batch_size=recipe.cache.batch_size,
        seed=recipe.seed,
    )
    what = f"cache, hidden states of {name}"
    num_targets = sum(encoder.shard_targets)
    most = num_targets * len(identity["layers"]) * (options.rank + 4)
    say(f"{what}: {num_targets:,} targets, at most {most / 1e6:,.1f} MB at {path}")
    with progress(what) as advance:
        manifest = build_features(
            path,
            identity,
            encoder.fit,
            encoder.encode,
            shard_targets=encoder.shard_targets,
            progress=advance,
        )
    say(f"{what}: {summary(manifest)}")
    return path, manifest


def calibration_identities(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """The identity of each teacher's folder of the calibration split, by name."""
    names = workspace.recipe.teachers
    return {name: teacher_cache_identity(workspace, name, "calibration") for name in names}


def calibration_teachers(workspace: Workspace) -> list[CachedTeacher]:
    """What each teacher says on the calibration split, for a run with a per-teacher cache; built where it is not there.

    Raises:
        CacheError: as `open_or_build`.
    """
    _refuse_others(workspace, workspace.recipe.teachers, "calibration")
    keys = BatchKeys(workspace.datasets["calibration"].sample_names)
    return [
        CachedTeacher(name, _open_teacher(workspace, name, "calibration"), keys)
        for name in workspace.recipe.teachers
    ]


def _refuse_others(workspace: Workspace, names: Iterable[str], part: Part) -> None:
    """Compare every finished folder with the run before the first missing one is built.

    Raises:
        CacheError: a folder is of another run.
    """
    for name in names:
        where = _where(workspace, _teacher_folder(name, part))
        manifest = read_manifest(where)
        if manifest is not None:
            expected = teacher_cache_identity(workspace, name, part)
            require_identity(where, manifest["identity"], expected)


def _open_teacher(workspace: Workspace, name: str, part: Part) -> TargetCache:
    where = _where(workspace, _teacher_folder(name, part))
    if read_manifest(where) is None:
        _build_teacher(workspace, name, part)
    return open_cache(where, teacher_cache_identity(workspace, name, part))


def _build_fused(workspace: Workspace, fusion: Fusion) -> Built:
    recipe = workspace.recipe
    encoder = FusedEncoder(
        lambda: workspace.teachers,
        fusion,
        workspace.datasets["train"],
        options=recipe.cache,
        seed=recipe.seed,
        vocab_size=workspace.vocab_size,
    )
    identity = cache_identity(workspace, fusion)
    return _build(cache_path(workspace), identity, encoder, what="cache")


def _build_teacher(workspace: Workspace, name: str, part: Part) -> Built:
    """One teacher alone is in memory, and none where nothing is missing."""
    recipe, dataset = workspace.recipe, workspace.datasets[part]

    @remembered
    def teacher() -> LocalTeacher:
        return workspace.load_teacher(name)

    identity = teacher_cache_identity(workspace, name, part)
    is_part = part == "calibration"
    encoder = TeacherEncoder(
        name,
        teacher,
        dataset,
        layout=Layout.of_identity(identity),
        batch_size=recipe.cache.batch_size,
        seed=recipe.seed,
        vocab_size=workspace.vocab_size,
        windows=spread_windows(dataset, recipe.preflight.max_tokens) if is_part else None,
    )
    path = teacher_path(workspace, name, part)
    return _build(path, identity, encoder, what=f"cache, {name}, {part}")


def _build(path: Path, identity: Mapping[str, Any], encoder: CorpusEncoder, *, what: str) -> Built:
    num_targets = sum(encoder.shard_targets)
    share = Ranks.from_environment()
    with progress(what) as advance:
        manifest = build_cache(
            path,
            identity,
            encoder.encode,
            shard_targets=encoder.shard_targets,
            sample=encoder.sample_entries,
            announce=lambda size: say(
                f"{what}: {num_targets:,} targets, about {size / 1e6:,.1f} MB to write to {path}"
            ),
            progress=advance,
            ranks=share,
        )
    if manifest is None:
        say(
            f"{what}: the shards of process {share.rank} of {share.world_size} are finished; the last process ends the cache"
        )
    else:
        say(f"{what}: {summary(manifest)}")
    return path, manifest


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
