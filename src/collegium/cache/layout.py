"""Which columns a cache has beside its keys: how targets are kept, and what is kept of each position.

A cache of kind `fused` holds one target per position. A per-teacher cache is one such folder per teacher, which holds what
this teacher says at temperature 1 and what it takes to read it at a few other temperatures:

    P_T(v) = P(v)^(1/T) / Z_T,   log Z_T = log sum_v P(v)^(1/T),   H_T = log Z_T - (1/T) sum_v P_T(v) log P(v)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from collegium.cache.codec import SCALARS, TARGETS, Samples, Targets

Kind = Literal["fused", "per_teacher"]
TEACHER_SCALARS = ("entropy", "label_logp", "max_logp")
"""Per row of one teacher at temperature 1, in nats: H(P), log P(label), max log P."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The columns of a cache."""

    kind: Kind
    targets: Targets
    """How a distribution is kept."""
    temperatures: tuple[float, ...] = ()
    """Those at which a per-teacher cache can be read beside 1."""

    @classmethod
    def of_identity(cls, identity: Mapping[str, Any]) -> Layout:
        """The columns of the cache that says this of itself."""
        temperatures: Sequence[float] = identity.get("temperatures", ())
        return cls(identity["kind"], decode_targets(identity["targets"]), tuple(temperatures))

    @property
    def scalars(self) -> tuple[str, ...]:
        """What is kept of each row beside its distribution, in nats."""
        if self.kind == "fused":
            return SCALARS
        names = (log_z_name, entropy_name)
        return (*TEACHER_SCALARS, *(name(value) for value in self.temperatures for name in names))

    @property
    def has_levels(self) -> bool:
        """Whether drawn tokens come with their log-probabilities."""
        return self.kind == "per_teacher" and isinstance(self.targets, Samples)


def log_z_name(temperature: float) -> str:
    """Column of log Z_T."""
    return f"log_z_{temperature:g}"


def entropy_name(temperature: float) -> str:
    """Column of H_T; of temperature 1 the plain entropy."""
    return "entropy" if temperature == 1.0 else f"entropy_{temperature:g}"


def decode_targets(snippet: Mapping[str, Any]) -> Targets:
    """The codec out of a manifest."""
    options = {key: value for key, value in snippet.items() if key != "name"}
    return TARGETS[snippet["name"]](**options)
