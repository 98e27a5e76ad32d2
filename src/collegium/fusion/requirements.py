"""The operations that a fusion and an objective require, compared with a source before a run.

Live teachers support everything. A cache lacks the tokens that it did not keep, and a finished
target has its weights built in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from collegium.distributions import Capabilities, Capability, nearest_temperature
from collegium.errors import RecipeError
from collegium.fusion.fuse import Fusion
from collegium.fusion.rules import Entropy


@dataclass(frozen=True, slots=True)
class Requirement:
    """One option that needs more of its source than linear pools of stored distributions."""

    key: str
    """Path of the option in a recipe."""
    value: str
    allowed: str
    """The values that every source supports."""
    capability: Capability | None = None
    temperature: float | None = None
    """A temperature of one teacher that the source must store."""


FIXED_PER_ROW = Capabilities(
    "a fused cache",
    frozenset(Capability) - {Capability.PER_BATCH},
    remedy="set cache.enabled: false",
)
"""Live teachers that a fused cache is built from: any target that depends on its row only."""

REASONS = {
    Capability.LOGARITHMS: "random draws are biased inside a logarithm",
    Capability.ANY_TEMPERATURE: "softening needs the tokens that were not kept",
    Capability.REFUSION: "its weights were fixed when it was built",
    Capability.PER_BATCH: "it would depend on the batch or the step",
    Capability.FEATURES: "it holds no hidden states",
}
REMEDIES = {
    Capability.LOGARITHMS: "set cache.targets: {name: top_k}",
    Capability.FEATURES: "set cache: {kind: per_teacher, features: {}}",
}
"""Ways to get what a cache lacks, beside those of any source."""


def fusion_requirements(fusion: Fusion) -> list[Requirement]:
    """The requirements of a fusion."""
    weighting, conflict = fusion.weighting, fusion.conflict
    logs = Capability.LOGARITHMS
    needs = []
    if fusion.pool != "linear":
        needs.append(Requirement("fusion.pool", fusion.pool, "linear", logs))
    if fusion.pooled_temperature != 1.0:
        value = f"{fusion.pooled_temperature:g}"
        needs.append(
            Requirement("fusion.pooled_temperature", value, "1", Capability.ANY_TEMPERATURE)
        )
    if conflict.is_active:
        needs.append(Requirement("fusion.conflict", _name(conflict), "omitted", logs))
    if conflict.yields_to_labels:
        needs.append(
            Requirement("fusion.conflict", _name(conflict), "omitted", Capability.PER_BATCH)
        )
    if weighting.needs_consensus:
        allowed = "a rule that reads each teacher by itself"
        needs.append(Requirement("fusion.weighting", _name(weighting), allowed, logs))
    if isinstance(weighting, Entropy) and weighting.granularity == "batch":
        key, allowed = "fusion.weighting.granularity", "token or sequence"
        needs.append(Requirement(key, "batch", allowed, Capability.PER_BATCH))
    for name, value in fusion.temperatures.items():
        key = f"fusion.temperatures.{name}"
        needs.append(Requirement(key, f"{value:g}", "", temperature=value))
    return needs


def unmet(requirements: Iterable[Requirement], source: Capabilities) -> list[str]:
    """One message, `key: got value; must be ...; do ...`, per requirement that a source fails."""
    return [
        message
        for requirement in requirements
        if (message := _problem(requirement, source)) is not None
    ]


def check(requirements: Iterable[Requirement], sources: Sequence[Capabilities]) -> None:
    """Refuse options that one of the sources does not support.

    Raises:
        RecipeError: with one line per option.
    """
    requirements = list(requirements)
    lines = [line for source in sources for line in unmet(requirements, source)]
    if lines:
        raise RecipeError("\n".join(dict.fromkeys(lines)))


def _problem(requirement: Requirement, source: Capabilities) -> str | None:
    if requirement.temperature is not None:
        stored = source.temperatures
        if stored is None or nearest_temperature(requirement.temperature, stored) is not None:
            return None
        values = ", ".join(f"{value:g}" for value in sorted({1.0, *stored}))
        allowed, reason = f"one of {values}", "it stores no other temperature"
        remedy = "add it to cache.temperatures"
    elif requirement.capability in source.supported:
        return None
    else:
        assert requirement.capability is not None
        allowed, reason = requirement.allowed, REASONS[requirement.capability]
        remedy = REMEDIES.get(requirement.capability, "change it")
    return (
        f"{requirement.key}: got {requirement.value}; must be {allowed} with {source.source} "
        f"({reason}); {remedy}, or {source.remedy}"
    )


def _name(option: object) -> str:
    return type(option).__name__
