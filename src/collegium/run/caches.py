"""Caches of a run: their identities, and how they are built.

    cache/                            kind fused: one target per position of the training split
    cache/teachers/NAME/train/        kind per_teacher: outputs of one teacher on that split
    cache/teachers/NAME/calibration/  the same on the calibration split, for preflight
    cache/features/NAME/              its hidden states, where feature terms read them

Each folder has the same format and its own manifest, so adding a teacher adds folders.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from collegium.cache.build import build_cache
from collegium.cache.feature_build import build_features
from collegium.cache.feature_store import FeatureCache, open_features
from collegium.cache.layout import Layout
from collegium.cache.processes import Ranks
from collegium.cache.store import TargetCache, open_cache, read_manifest, require_identity, summary
from collegium.config.recipe import plain
from collegium.console import progress, say
from collegium.errors import RecipeError
from collegium.evaluate.scoring import spread_windows
from collegium.fusion.describe import to_recipe
from collegium.fusion.fuse import Fusion
from collegium.run.artifact import Artifact
from collegium.run.context import RunContext
from collegium.teachers.cached_features import FeatureEncoder
from collegium.teachers.encoders import SHARD_TARGETS, CorpusEncoder, FusedEncoder, TeacherEncoder

Split = Literal["train", "calibration"]
T_co = TypeVar("T_co", covariant=True)
CALIBRATION_K = 64
"""Tokens stored per position of the calibration split.

They only measure how far teachers are apart; everything else is in the scalars.
"""


class Cache(Artifact[T_co]):
    """A folder of stored teacher outputs, or a URL of one that is only read."""

    @property
    @abstractmethod
    def folder(self) -> str:
        """Folder relative to the root of the cache."""

    @property
    def name(self) -> str:
        return f"cache {self.folder}".rstrip()

    @property
    def location(self) -> Path | str:
        """Folder or URL to read from."""
        url = self.context.recipe.cache.url
        return self.path if url is None else f"{url.rstrip('/')}/{self.folder}".rstrip("/")

    @property
    def path(self) -> Path:
        """Folder: inside `cache.path`, which defaults to `cache` in the run folder.

        Raises:
            RecipeError: the cache is at a URL, and cannot be built.
        """
        options = self.context.recipe.cache
        if options.url is not None:
            raise RecipeError(
                f"cache.url: got {options.url}, which is read and never built; build with "
                "cache.path, then copy the folder there"
            )
        return (options.path or self.context.recipe.output_dir / "cache") / self.folder

    def is_done(self) -> bool:
        """Return True if the manifest exists; its shards are verified when they are read.

        Raises:
            CacheError: the folder belongs to another run, or its manifest is damaged.
        """
        manifest = read_manifest(self.location)
        if manifest is not None:
            require_identity(self.location, manifest["identity"], self.identity())
        return manifest is not None

    def log(self) -> AbstractContextManager[None]:
        """Record the stage, unless several processes build together and share no log."""
        return super().log() if Ranks.from_environment().is_single else nullcontext()


@dataclass(frozen=True, eq=False)
class FusedCache(Cache[TargetCache]):
    """Fused targets of all teachers on the training split."""

    fusion: Fusion

    @property
    def folder(self) -> str:
        return ""

    def identity(self) -> dict[str, Any]:
        recipe = self.context.recipe
        return {
            "kind": "fused",
            "targets": plain(recipe.cache)["targets"],
            **corpus_identity(self.context, "train"),
            "teachers": {name: self.context.teacher_identity(name) for name in recipe.teachers},
            "fusion": plain(to_recipe(self.fusion)),
        }

    def build(self) -> None:
        context, recipe = self.context, self.context.recipe
        encoder = FusedEncoder(
            lambda: context.teachers(list(recipe.teachers)),
            self.fusion,
            context.datasets["train"],
            options=recipe.cache,
            seed=recipe.seed,
            vocab_size=context.vocab_size,
        )
        build_targets(self, encoder)

    def open(self) -> TargetCache:
        return open_cache(self.location, self.identity())


@dataclass(frozen=True, eq=False)
class TeacherCache(Cache[TargetCache]):
    """Outputs of one teacher on one split."""

    teacher: str
    split: Split

    @property
    def folder(self) -> str:
        return f"teachers/{self.teacher}/{self.split}"

    def identity(self) -> dict[str, Any]:
        context, options = self.context, self.context.recipe.cache
        targets = plain(options)["targets"]
        if self.split == "calibration":
            targets = {"name": "top_k", "k": min(CALIBRATION_K, context.vocab_size)}
        return {
            "kind": "per_teacher",
            "targets": targets,
            "temperatures": sorted(options.temperatures),
            **corpus_identity(context, self.split),
            "teachers": {self.teacher: context.teacher_identity(self.teacher)},
        }

    def build(self) -> None:
        context, recipe = self.context, self.context.recipe
        dataset = context.datasets[self.split]
        windows = None
        if self.split == "calibration":
            windows = spread_windows(dataset, recipe.preflight.max_tokens)
        encoder = TeacherEncoder(
            self.teacher,
            lambda: context.teachers([self.teacher])[0],
            dataset,
            layout=Layout.of_identity(self.identity()),
            batch_size=recipe.cache.batch_size,
            seed=recipe.seed,
            vocab_size=context.vocab_size,
            windows=windows,
        )
        build_targets(self, encoder)

    def open(self) -> TargetCache:
        return open_cache(self.location, self.identity())


@dataclass(frozen=True, eq=False)
class HiddenCache(Cache[FeatureCache]):
    """Hidden states of one teacher on the training split."""

    teacher: str

    @property
    def folder(self) -> str:
        return f"features/{self.teacher}"

    def identity(self) -> dict[str, Any]:
        context = self.context
        return {
            "kind": "features",
            "layers": context.kept_taps[self.teacher],
            **plain(context.recipe.cache)["features"],
            **corpus_identity(context, "train"),
            "teachers": {self.teacher: context.teacher_identity(self.teacher)},
        }

    def build(self) -> None:
        context, recipe = self.context, self.context.recipe
        options, identity = recipe.cache.features, self.identity()
        assert options is not None  # or no tap would be kept
        encoder = FeatureEncoder(
            lambda: context.teachers([self.teacher])[0],
            context.datasets["train"],
            identity["layers"],
            options=options,
            batch_size=recipe.cache.batch_size,
            seed=recipe.seed,
        )
        num_targets = sum(encoder.shard_targets)
        max_bytes = num_targets * len(identity["layers"]) * (options.rank + 4)
        say(
            f"{self.name}: {num_targets:,} targets, at most {max_bytes / 1e6:,.1f} MB at {self.path}"
        )
        with progress(self.name) as advance:
            manifest = build_features(
                self.path,
                identity,
                encoder.fit,
                encoder.encode,
                shard_targets=encoder.shard_targets,
                progress=advance,
            )
        say(f"{self.name}: {summary(manifest)}")

    def open(self) -> FeatureCache:
        return open_features(self.location, self.identity())


def build_targets(artifact: Cache[TargetCache], encoder: CorpusEncoder) -> None:
    """Build the shards of this process, and say how many and how large they are.

    Raises:
        CacheError: the folder belongs to another run, or the disk is full.
    """
    name, path, ranks = artifact.name, artifact.path, Ranks.from_environment()
    num_targets = sum(encoder.shard_targets)
    with progress(name) as advance:
        manifest = build_cache(
            path,
            artifact.identity(),
            encoder.encode,
            shard_targets=encoder.shard_targets,
            sample=encoder.sample_entries,
            announce=lambda size: say(
                f"{name}: {num_targets:,} targets, about {size / 1e6:,.1f} MB to write to {path}"
            ),
            progress=advance,
            ranks=ranks,
        )
    if manifest is None:
        say(f"{name}: rank {ranks.rank} of {ranks.world_size} is done; the last one ends the cache")
    else:
        say(f"{name}: {summary(manifest)}")


def corpus_identity(context: RunContext, split: Split) -> dict[str, Any]:
    """Return the identity of the text and of the draws that stored outputs depend on."""
    recipe, dataset = context.recipe, context.datasets[split]
    data = {
        "windows": dataset.fingerprint,
        "documents": _sha256("\0".join(dataset.sample_names)),
        "max_length": recipe.data.max_length,
        "packing": recipe.data.packing,
    }
    if split == "calibration":
        data["max_tokens"] = recipe.preflight.max_tokens
    return {
        "seed": recipe.seed,
        "vocab_size": context.vocab_size,
        "tokenizer": _sha256(context.tokenizer.backend_tokenizer.to_str()),
        "data": data,
        "shard_targets": SHARD_TARGETS,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
