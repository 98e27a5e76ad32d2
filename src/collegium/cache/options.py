"""The `cache` section of a recipe."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from collegium.cache.codec import Samples, Targets
from collegium.cache.features import FeatureCacheOptions
from collegium.cache.layout import Kind
from collegium.types import STRICT

_TARGETS = Samples()
_TEACHER_DRAWS = 24


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CacheOptions:
    """Targets written once by the teachers and read by every student that shares them."""

    enabled: bool = False
    """Train from the cache, and build it first where it is not there; otherwise teachers answer at every step."""
    path: Path | None = None
    """Its folder; `cache` inside the run folder by default. Runs that agree in all that a target depends on may share it."""
    url: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://")] | None = None
    """A finished cache elsewhere, as any URL that fsspec opens (`s3://bucket/cache`): read instead of `path`, never built."""
    kind: Kind = "fused"
    """fused: one target for all teachers, under the run's own fusion. per_teacher: what each teacher says, so that weights can change
    and teachers can be added without asking the old ones again; for linear pools."""
    targets: Targets = _TARGETS
    """What is kept of each distribution: 50 draws by default, 24 of each teacher in a per-teacher cache."""
    temperatures: list[Annotated[float, Field(gt=0)]] = field(default_factory=list)
    """Of a per-teacher cache: temperatures at which a teacher may be read later, beside 1 (`[1.25, 1.6]`); each costs about 3.4 bytes
    per token and teacher."""
    features: FeatureCacheOptions | None = None
    """Of a per-teacher cache: also keep the hidden states that the feature terms of the objective read; none leaves those terms out."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Windows that the teachers read at a time."""

    @model_validator(mode="after")
    def _has_one_place(self) -> CacheOptions:
        if self.url is not None and self.path is not None:
            raise ValueError("url: got both url and path; must be one of them; leave one out")
        return self

    @model_validator(mode="after")
    def _temperatures_are_of_use(self) -> CacheOptions:
        given = self.temperatures
        if self.kind == "fused" and given:
            raise ValueError(
                "temperatures: got some with kind `fused`; must be left out unless the kind is `per_teacher`; leave it out"
            )
        if len({f"{value:g}" for value in (1.0, *given)}) != len(given) + 1:
            raise ValueError(
                f"temperatures: got {', '.join(f'{value:g}' for value in given)}; must be different ones, and 1 is always "
                "kept; leave out what is there twice"
            )
        return self

    @model_validator(mode="after")
    def _features_are_of_one_teacher(self) -> CacheOptions:
        if self.features is not None and self.kind == "fused":
            raise ValueError(
                "features: got some with kind `fused`; must be left out unless the kind is `per_teacher`, for hidden states "
                "belong to single teachers; leave it out, or set cache.kind: per_teacher"
            )
        return self

    def __post_init__(self) -> None:
        if self.kind == "per_teacher" and self.targets is _TARGETS:
            object.__setattr__(self, "targets", Samples(draws=_TEACHER_DRAWS))
