"""Caches of a run: their identities, and how they are built.

    cache/                            kind fused: one target per position of the training split
    cache/teachers/NAME/train/        kind per_teacher: outputs of one teacher on that split
    cache/teachers/NAME/calibration/  the same on the calibration split, for preflight
    cache/features/NAME/              its hidden states, where feature terms read them

Each folder has the same format and its own manifest, so adding a teacher adds folders.
"""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor

from collegium.cache.build import build_cache
from collegium.cache.cluster import RayShards, connected
from collegium.cache.encode import (
    SHARD_TARGETS,
    CorpusEncoder,
    FusedEncoder,
    HiddenEncoder,
    TeacherEncoder,
)
from collegium.cache.keys import document_hash
from collegium.cache.manifest import read_manifest, require_identity
from collegium.cache.options import ActorOptions, RayOptions
from collegium.cache.processes import Ranks
from collegium.cache.sources import LocalShards, ShardSource
from collegium.cache.store import CacheReader, open_cache, verify_cache
from collegium.config.recipe import plain
from collegium.console import progress
from collegium.distributions import NamedRows
from collegium.errors import CacheError, RecipeError
from collegium.evaluate.scoring import spread_windows
from collegium.fusion.fuse import Fusion
from collegium.fusion.options import to_recipe
from collegium.run.artifact import Artifact
from collegium.run.context import RunContext
from collegium.storage.files import differing_fields
from collegium.storage.records import FileDigest, Stage

_log = logging.getLogger(__name__)
Split = Literal["train", "calibration"]
T = TypeVar("T")
# They only measure how far teachers are apart. Everything else is in the scalars.
CALIBRATION_K = 64
"""Tokens stored per position of the calibration split."""


class Cache(Artifact[CacheReader[T]]):
    """A folder of stored teacher outputs, or a URL of one that is only read."""

    is_shared = True

    @property
    def folder(self) -> str:
        """Folder relative to the root of the cache, which is that of fused targets."""
        return ""

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
        """Folder in `cache.path` or in the run folder. Raises RecipeError for a cache at a URL."""
        options = self.context.recipe.cache
        if options.url is not None:
            raise RecipeError(
                f"cache.url: got {options.url}, which is read and never built; build with "
                "cache.path, then copy the folder there"
            )
        return (options.path or self.context.recipe.output_dir / "cache") / self.folder

    @property
    def is_own(self) -> bool:
        """Whether it is in the run folder, and not shared with other runs."""
        options = self.context.recipe.cache
        return options.path is None and options.url is None

    def is_done(self) -> bool:
        """Return True if it is finished. Raises CacheError if it is shared, and another cache."""
        manifest = read_manifest(self.location)
        if manifest is None:
            return False
        identity = self.identity()
        if self.is_own and differing_fields(manifest.identity, identity):
            return False
        require_identity(self.location, manifest.identity, identity)
        return True

    def products(self, stage: Stage) -> Sequence[Path]:
        if not self.is_own:
            return []
        if self.folder:
            return [self.path]
        # Caches of another kind may be in folders inside of it.
        files = (path for path in self.path.glob("[!.]*") if path.is_file())
        return sorted(files)

    def digests(self) -> Mapping[str, FileDigest]:
        """Return nothing: its manifest has the digests, which several runs share."""
        return {}

    def restore(self) -> None:
        """Verify every file of a finished cache, and build the damaged ones again."""
        try:
            verify_cache(self.path)
        except CacheError as error:
            _log.warning("%s", error)
            with self.log(), self.sharing():
                self.build()

    @abstractmethod
    def encoder(self) -> CorpusEncoder:
        """Return the source of its content."""

    @abstractmethod
    def cost(self) -> float:
        """Relative time of its build: targets times parameters of the models that are read."""

    def _cost(self, split: Split, teachers: Sequence[str], max_tokens: int | None = None) -> float:
        num_targets = int(self.context.datasets[split].targets_per_window().sum())
        parameters = self.context.teacher_parameters
        # Of a teacher without a model here, the parameters are not known.
        num_parameters = sum(parameters[name] or 1_000_000_000 for name in teachers)
        return float(min(num_targets, max_tokens or num_targets) * num_parameters)

    def build(self) -> None:
        """Build the shards of this process. Raises CacheError if the folder cannot be used."""
        ranks = Ranks.from_environment()
        with self._source() as source:
            build_cache(self.path, self.identity(), source, label=self.name, ranks=ranks)

    @contextmanager
    def _source(self) -> Iterator[ShardSource]:
        local, options = LocalShards(self.encoder()), self.context.recipe.cache.ray
        if options is None:
            yield local
            return
        pool, targets = self._pool(options), local.shard_targets
        with connected(options), closing(RayShards(self, targets, pool, name=self.name)) as actors:
            yield actors

    def _pool(self, options: RayOptions) -> ActorOptions:
        return options

    def join(self) -> None:
        self.build()

    def open(self) -> CacheReader[T]:
        return open_cache(self.location, self.identity())

    def log(self) -> AbstractContextManager[None]:
        """Record the stage, unless processes that share no log build together."""
        return nullcontext() if self.context.is_uncoordinated else super().log()


@dataclass(frozen=True, eq=False)
class FusedCache(Cache[NamedRows]):
    """Fused targets of all teachers on the training split."""

    fusion: Fusion

    def cost(self) -> float:
        return self._cost("train", list(self.context.recipe.teachers))

    def identity(self) -> dict[str, Any]:
        recipe = self.context.recipe
        return {
            "kind": "fused",
            "targets": plain(recipe.cache)["targets"],
            **corpus_identity(self.context, "train"),
            "teachers": {name: self.context.teacher_identity(name) for name in recipe.teachers},
            "fusion": plain(to_recipe(self.fusion)),
        }

    def encoder(self) -> FusedEncoder:
        context, recipe = self.context, self.context.recipe
        return FusedEncoder(
            dataset=context.datasets["train"],
            batch_size=recipe.cache.batch_size,
            seed=recipe.seed,
            teachers=lambda: context.teachers(list(recipe.teachers)),
            fusion=self.fusion,
        )


@dataclass(frozen=True, eq=False)
class TeacherCache(Cache[NamedRows]):
    """Outputs of one teacher on one split."""

    teacher: str
    split: Split

    @property
    def folder(self) -> str:
        return f"teachers/{self.teacher}/{self.split}"

    def cost(self) -> float:
        limit = None if self.split == "train" else self.context.recipe.preflight.max_tokens
        return self._cost(self.split, [self.teacher], limit)

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

    def _pool(self, options: RayOptions) -> ActorOptions:
        return options.teachers.get(self.teacher, options)

    def encoder(self) -> TeacherEncoder:
        context, recipe = self.context, self.context.recipe
        dataset, max_tokens = context.datasets[self.split], recipe.preflight.max_tokens
        return TeacherEncoder(
            dataset=dataset,
            batch_size=recipe.cache.batch_size,
            # Teachers that agree must not share their draws, or their errors would add up.
            seed=recipe.seed ^ document_hash(self.teacher),
            windows=None if self.split == "train" else spread_windows(dataset, max_tokens),
            teacher=lambda: context.teachers([self.teacher])[0],
        )


@dataclass(frozen=True, eq=False)
class HiddenCache(Cache[dict[str, Tensor]]):
    """Hidden states of one teacher on the training split."""

    teacher: str

    @property
    def folder(self) -> str:
        return f"features/{self.teacher}"

    def cost(self) -> float:
        return self._cost("train", [self.teacher])

    def identity(self) -> dict[str, Any]:
        context = self.context
        return {
            "kind": "features",
            "layers": context.kept_taps[self.teacher],
            **plain(context.recipe.cache)["features"],
            **corpus_identity(context, "train"),
            "teachers": {self.teacher: context.teacher_identity(self.teacher)},
        }

    def _pool(self, options: RayOptions) -> ActorOptions:
        return options.teachers.get(self.teacher, options)

    def encoder(self) -> HiddenEncoder:
        context, recipe = self.context, self.context.recipe
        options = recipe.cache.features
        assert options is not None  # or no tap would be kept
        return HiddenEncoder(
            dataset=context.datasets["train"],
            batch_size=recipe.cache.batch_size,
            seed=recipe.seed,
            teacher=lambda: context.teachers([self.teacher])[0],
            taps=context.kept_taps[self.teacher],
            options=options,
        )


@contextmanager
def building(caches: Iterable[Artifact[Any]]) -> Iterator[None]:
    """Show the builds of several caches as one piece of work, on one connection to a cluster."""
    missing = [cache for cache in caches if isinstance(cache, Cache)]
    with ExitStack() as held:
        if missing:
            held.enter_context(progress("cache", {one.name: one.cost() for one in missing}))
            if (options := missing[0].context.recipe.cache.ray) is not None:
                held.enter_context(connected(options))
        yield


def corpus_identity(context: RunContext, split: Split) -> dict[str, Any]:
    """Return the identity of the text and of the draws that stored outputs depend on."""
    recipe, dataset = context.recipe, context.datasets[split]
    limit = {"max_tokens": recipe.preflight.max_tokens} if split == "calibration" else {}
    return {
        "seed": recipe.seed,
        "vocab_size": context.vocab_size,
        "tokenizer": _sha256(context.tokenizer.backend_tokenizer.to_str()),
        "data": {
            "windows": dataset.fingerprint,
            "documents": dataset.names_digest,
            "max_length": recipe.data.max_length,
            "packing": recipe.data.packing,
            **limit,
        },
        "shard_targets": SHARD_TARGETS,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
