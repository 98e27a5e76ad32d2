"""The cache of one run: what its targets depend on, building it, and who may read it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collegium.cache.build import build_cache, expected_bytes_per_token
from collegium.cache.store import TargetCache, open_cache, read_manifest, summary
from collegium.console import progress, say
from collegium.errors import RecipeError
from collegium.fusion.pooling import Fusion, to_recipe
from collegium.recipe import plain
from collegium.teachers.cached import SHARD_TARGETS, FusedEncoder, require_static
from collegium.variants import Variant, main_variant
from collegium.workspace import Workspace


def cache_path(workspace: Workspace) -> Path:
    """The folder of the cache: `cache.path`, else `cache` inside the run folder."""
    recipe = workspace.recipe
    return recipe.cache.path or recipe.output_dir / "cache"


def cache_identity(workspace: Workspace, fusion: Fusion) -> dict[str, Any]:
    """Everything that the targets depend on, as plain data."""
    recipe, dataset = workspace.recipe, workspace.datasets["train"]
    names = "\0".join(dataset.sample_names)
    return {
        "kind": recipe.cache.kind,
        "targets": plain(recipe.cache)["targets"],
        "seed": recipe.seed,
        "vocab_size": workspace.vocab_size,
        "tokenizer": _sha256(workspace.tokenizer.backend_tokenizer.to_str()),
        "teachers": {
            name: {
                "weights": workspace.digest(options.model),
                "revision": options.revision,
                "dtype": options.dtype,
                "attention": options.attention,
                "logit_scale": options.logit_scale,
            }
            for name, options in recipe.teachers.items()
        },
        "fusion": plain(to_recipe(fusion)),
        "data": {
            "windows": dataset.fingerprint,
            "documents": _sha256(names),
            "max_length": recipe.data.max_length,
            "packing": recipe.data.packing,
        },
        "shard_targets": SHARD_TARGETS,
    }


def build(workspace: Workspace, fusion: Fusion | None) -> tuple[Path, dict[str, Any]]:
    """Build the run's cache, or what is missing of it; returns its folder and manifest.

    Raises:
        CollegiumError: there is nothing to cache, or the folder cannot be used.
    """
    if fusion is None:
        raise RecipeError(
            "teachers: none given; a cache holds what teachers say, name at least one"
        )
    path, recipe = cache_path(workspace), workspace.recipe
    require_static(fusion)
    num_targets = workspace.datasets["train"].num_target_tokens
    per_token = expected_bytes_per_token(recipe.cache.targets, workspace.vocab_size)
    say(f"cache: {num_targets:,} targets, about {num_targets * per_token / 1e6:,.1f} MB at {path}")
    with progress("cache") as advance:
        encoder = FusedEncoder(
            lambda: workspace.teachers,
            fusion,
            workspace.datasets["train"],
            options=recipe.cache,
            seed=recipe.seed,
            vocab_size=workspace.vocab_size,
        )
        manifest = build_cache(
            path,
            cache_identity(workspace, fusion),
            encoder.encode,
            shard_targets=encoder.shard_targets,
            progress=advance,
        )
    say(f"cache: {summary(manifest)}")
    return path, manifest


def reads_cache(
    workspace: Workspace, variant: Variant, fusion: Callable[[], Fusion | None]
) -> bool:
    """Whether a student trains from the cache: the main one, and every control with its teachers and its fusion."""
    is_asked = workspace.recipe.cache.enabled and variant.objective.kd_ratio > 0
    if not is_asked or not variant.teachers:
        return False
    student = main_variant(workspace.recipe, fusion())
    same_fusion = plain(variant.fusion) == plain(student.fusion)
    return same_fusion and variant.teachers == student.teachers


def open_or_build(workspace: Workspace, fusion: Fusion) -> TargetCache:
    """The run's cache, built first where it is not there.

    Raises:
        CacheError: it cannot be built, is of another run, or is damaged.
    """
    path = cache_path(workspace)
    if read_manifest(path) is None:
        build(workspace, fusion)
    return open_cache(path, cache_identity(workspace, fusion))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
