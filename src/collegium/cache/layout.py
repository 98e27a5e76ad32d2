"""Columns of a cache: the codec of its targets, and the scalars of each position.

A `fused` cache holds one target per position. A per-teacher cache is one such folder per teacher.
It holds the teacher's distribution at temperature 1, and the scalars to read it at a few others:

    P_T(v) = P(v)^(1/T) / Z_T,   log Z_T = log sum_v P(v)^(1/T),
    H_T = log Z_T - (1/T) sum_v P_T(v) log P(v)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from collegium.cache.codec import SCALARS, TARGETS, Samples, Targets
from collegium.distributions import Capabilities, Capability

Kind = Literal["fused", "per_teacher"]
TEACHER_SCALARS = ("entropy", "label_logp", "max_logp")
"""Per row of one teacher at temperature 1, in nats: H(P), log P(label), max log P."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Columns of a cache."""

    kind: Kind
    targets: Targets
    """Codec of the distributions."""
    temperatures: tuple[float, ...] = ()
    """Temperatures other than 1 at which a per-teacher cache can be read."""

    @classmethod
    def of_identity(cls, identity: Mapping[str, Any]) -> Layout:
        """Return the columns of a cache with this identity."""
        # The identity of a fused cache has none.
        temperatures: Sequence[float] = identity.get("temperatures", ())
        return cls(identity["kind"], decode_targets(identity["targets"]), tuple(temperatures))

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the scalars of each row, in nats."""
        if self.kind == "fused":
            return SCALARS
        names = (log_z_name, entropy_name)
        return (*TEACHER_SCALARS, *(name(value) for value in self.temperatures for name in names))

    @property
    def is_sampled(self) -> bool:
        """True if targets are random draws."""
        return isinstance(self.targets, Samples)

    def capabilities(self, *, has_features: bool = False) -> Capabilities:
        """The operations that targets or teachers read from this cache support."""
        supported: set[Capability] = set()
        if not self.is_sampled:
            supported.add(Capability.LOGARITHMS)
        if self.kind == "per_teacher":
            supported |= {Capability.REFUSION, Capability.PER_BATCH}
        if has_features:
            supported.add(Capability.FEATURES)
        content = "draws" if self.is_sampled else "top-k targets"
        return Capabilities(
            f"a {self.kind.replace('_', '-')} cache of {content}",
            frozenset(supported),
            self.temperatures,
            "set cache.enabled: false",
        )

    @property
    def has_levels(self) -> bool:
        """True if drawn tokens are stored with their log-probabilities."""
        return self.kind == "per_teacher" and isinstance(self.targets, Samples)


def log_z_name(temperature: float) -> str:
    """Return the column name of log Z_T."""
    return f"log_z_{temperature:g}"


def entropy_name(temperature: float) -> str:
    """Return the column name of H_T, which is `entropy` at temperature 1."""
    return "entropy" if temperature == 1.0 else f"entropy_{temperature:g}"


def decode_targets(snippet: Mapping[str, Any]) -> Targets:
    """Build the codec from its manifest entry."""
    options = {key: value for key, value in snippet.items() if key != "name"}
    return TARGETS[snippet["name"]](**options)
