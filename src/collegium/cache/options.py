"""The `cache` section of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from collegium.distributions import Capabilities, Capability
from collegium.options import OneOf, option
from collegium.storage.credentials import URL

MAX_DRAWS = 2**16 - 1


@option
class Samples:
    """Independent draws from the distribution, stored as tokens with counts. Unbiased.

    t_i = count_i / N. Supports only forward KL and cross-entropy, at temperature 1.

    Source: Anshumann et al. 2025, arXiv 2503.16870.
    """

    draws: Annotated[int, Field(ge=1, le=MAX_DRAWS)] = 50
    """Draws per token of text."""


@option
class TopK:
    """The k most likely tokens, with all others as one bucket of exact mass."""

    k: Annotated[int, Field(ge=1, le=MAX_DRAWS)] = 50
    """Tokens kept per token of text."""
    renormalized: bool = False
    """Drop the tail and renormalize the kept tokens. Biased: a baseline for comparisons."""


Targets = Samples | TopK
TARGETS: dict[str, type[Samples] | type[TopK]] = {"samples": Samples, "top_k": TopK}
"""Forms of stored distributions by their names in recipes and manifests."""
TargetKind = Literal["fused", "per_teacher"]


@option
class FeatureCacheOptions:
    """Hidden states of the teachers, cached for feature terms."""

    rank: Annotated[int, Field(ge=1)] = 256
    """Coefficients of one byte per row, teacher and layer, at most the teacher's width."""
    fit_rows: Annotated[int, Field(ge=2)] = 4096
    """Rows, from the first windows, that the projection is fitted on."""


Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@option
class ActorOptions:
    """A pool of Ray actors, each with the models of one cache in its memory."""

    actors: Annotated[int, Field(ge=1)] = 1
    """Actors that build one cache, each a shard at a time."""
    num_cpus: Amount = 1
    """CPU cores of each actor, and its threads."""
    num_gpus: Amount = 0
    """GPUs of each actor. 0.5 puts two actors on one GPU, 0 none on any."""
    resources: dict[str, Amount] = field(default_factory=dict)
    """Custom resources of each actor, as in `ray start --resources`."""


@option
class RayOptions(ActorOptions):
    """Caches built by the actors of a Ray cluster. Only this process writes files."""

    address: str | None = None
    """Address of the cluster: `auto`, `HOST:6379` or `ray://HOST:10001`. Defaults to the variable
    RAY_ADDRESS, and without it to Ray on this machine for the time of the build."""
    teachers: dict[str, ActorOptions] = field(default_factory=dict)
    """Other pools for the per-teacher caches of some teachers, such as `{big: {num_gpus: 4}}`."""


_TARGETS = Samples()
# Measured: 35.2 bytes per target at V = 49,152, of a budget of 36 (docs/results/cache.md).
_TEACHER_DRAWS = 24


@option
class CacheOptions:
    """Teacher targets, computed once and read by every student that shares them."""

    enabled: bool = False
    """Train from the cache, which is built first if missing. Otherwise teachers run every step."""
    path: Path | None = None
    """Folder. Defaults to `cache` in the run folder. Runs with equal identities can share it."""
    url: URL | None = None
    """fsspec URL of a finished cache (`s3://bucket/cache`), read instead of `path`, never built."""
    kind: TargetKind = "fused"
    """fused: one target for all teachers, under this run's fusion. per_teacher: the outputs of each
    teacher, so that weights can change and teachers can be added without rerunning the others.
    Draws are for linear pools only."""
    targets: Annotated[Targets, OneOf(TARGETS)] = _TARGETS
    """Codec of the distributions. Defaults to 50 draws, or to 24 in a per-teacher cache."""
    temperatures: list[Annotated[float, Field(gt=0)]] = field(default_factory=list)
    """Per-teacher caches only: temperatures other than 1 at which teachers can be read, such as
    `[1.25, 1.6]`. Each costs about 3.4 bytes per token and teacher."""
    features: FeatureCacheOptions | None = None
    """Per-teacher caches only: also keep the hidden states that the objective's feature terms read.
    Without them, those terms are skipped."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Windows per teacher batch."""
    ray: RayOptions | None = None
    """Build caches on a Ray cluster. Has no effect on their content."""

    @model_validator(mode="after")
    def _agrees(self) -> CacheOptions:
        if self.url is not None and self.path is not None:
            raise ValueError("url: got both url and path; must be one of them; leave one out")
        temperatures = self.temperatures
        if self.kind == "fused" and temperatures:
            raise ValueError(
                "temperatures: got some with kind `fused`; must be empty unless the kind is "
                "`per_teacher`; leave it out"
            )
        # Compared as formatted, because that is how they name the columns of a shard.
        if len({f"{value:g}" for value in (1.0, *temperatures)}) != len(temperatures) + 1:
            raise ValueError(
                f"temperatures: got {', '.join(f'{value:g}' for value in temperatures)}; must be "
                "distinct, and 1 is always kept; leave out the duplicates"
            )
        if self.features is not None and self.kind == "fused":
            raise ValueError(
                "features: got some with kind `fused`; must be empty unless the kind is "
                "`per_teacher`, because hidden states belong to single teachers; leave it out, or "
                "set cache.kind: per_teacher"
            )
        if self.ray is not None and self.ray.teachers and self.kind == "fused":
            raise ValueError(
                "ray.teachers: got some with kind `fused`; must be empty unless the kind is "
                "`per_teacher`, because its actors hold all teachers; leave it out"
            )
        return self

    @property
    def capabilities(self) -> Capabilities:
        """The operations that this cache supports."""
        given = self.kind, self.targets, self.temperatures
        return capabilities_of(*given, has_features=self.features is not None)

    def __post_init__(self) -> None:
        # By identity, not equality: 50 draws set in the recipe are kept.
        if self.kind == "per_teacher" and self.targets is _TARGETS:
            object.__setattr__(self, "targets", Samples(draws=_TEACHER_DRAWS))


def capabilities_of(
    kind: TargetKind, targets: Targets, temperatures: Sequence[float], *, has_features: bool = False
) -> Capabilities:
    """Return the operations that such a cache supports in the place of teachers."""
    form = "draws" if isinstance(targets, Samples) else "top-k targets"
    supported = set() if isinstance(targets, Samples) else {Capability.LOGARITHMS}
    if kind == "per_teacher":
        supported |= {Capability.REFUSION, Capability.PER_BATCH}
    if has_features:
        supported.add(Capability.FEATURES)
    name, remedy = f"a {kind.replace('_', '-')} cache of {form}", "set cache.enabled: false"
    return Capabilities(name, frozenset(supported), tuple(temperatures), remedy)
