"""The `cache` section of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from collegium.cache.codec import Samples, Targets
from collegium.types import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CacheOptions:
    """Targets written once by the teachers and read by every student that shares them."""

    enabled: bool = False
    """Train from the cache, and build it first where it is not there; otherwise teachers answer at every step."""
    path: Path | None = None
    """Its folder; `cache` inside the run folder by default. Runs that agree in all that a target depends on may share it."""
    kind: Literal["fused"] = "fused"
    """fused: one target for all teachers, under the run's own fusion."""
    targets: Targets = Samples()
    """What is kept of each target."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Windows that the teachers read at a time."""
