"""The operations that a fusion and an objective require, compared with a source before a run.

Live teachers support everything. A cache lacks the tokens that it did not keep, and a finished
target has its weights built in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from collegium.distributions import Capabilities, Capability, nearest_temperature
from collegium.errors import RecipeError
from collegium.fusion.fuse import Fusion
from collegium.fusion.rules import Entropy
from collegium.fusion.weighting import Weighting


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
    teachers: Collection[str] | None = None
    """The teachers that must meet it, None for every source."""


FIXED_PER_ROW = Capabilities(
    "a fused cache",
    frozenset(Capability) - {Capability.PER_BATCH},
    remedy="set cache.enabled: false",
)
"""Live teachers that a fused cache is built from: any target that depends on its row only."""

REMEDIES = {
    Capability.LOGARITHMS: "set cache.targets: {name: top_k}",
    Capability.FEATURES: "set cache: {kind: per_teacher, features: {}}",
    Capability.ATTENTION: "remove the term",
}
"""Ways to get what a cache lacks, beside those of any source."""


def fusion_requirements(fusion: Fusion) -> list[Requirement]:
    """The requirements of a fusion."""
    weighting, conflict = fusion.weighting, fusion.conflict
    policy = type(conflict).__name__
    is_by_batch = isinstance(weighting, Entropy) and weighting.granularity == "batch"
    logs, per_batch = Capability.LOGARITHMS, Capability.PER_BATCH
    softening, pooled = Capability.ANY_TEMPERATURE, fusion.pooled_temperature
    options = [
        (pooled != 1.0, "pooled_temperature", f"{pooled:g}", "1", softening),
        (conflict.is_active, "conflict", policy, "omitted", logs),
        (conflict.yields_to_labels, "conflict", policy, "omitted", per_batch),
        (is_by_batch, "weighting.granularity", "batch", "token or sequence", per_batch),
    ]
    rule, needs_consensus = type(weighting), weighting.needs_consensus
    return [
        *rule_requirements(rule, fusion.pool, needs_consensus=needs_consensus),
        *(
            Requirement(f"fusion.{key}", value, allowed, capability)
            for is_set, key, value, allowed, capability in options
            if is_set
        ),
        *(
            Requirement(f"fusion.temperatures.{name}", f"{value:g}", "", temperature=value)
            for name, value in fusion.temperatures.items()
        ),
    ]


def rule_requirements(
    rule: type[Weighting], pool: str, *, needs_consensus: bool | None = None
) -> list[Requirement]:
    """The requirements of a rule in a pool.

    Args:
        rule: class of the weighting.
        pool: `linear` or `log_linear`.
        needs_consensus: as of the fitted rule. None before it is fitted: as some rule of its class.
    """
    if needs_consensus is None:
        # A property where it depends on the fit, as that of a gate.
        needs_consensus = rule.needs_consensus is not False
    separate, logs = "a rule that reads each teacher by itself", Capability.LOGARITHMS
    options = [
        (pool != "linear", "pool", pool, "linear"),
        (needs_consensus, "weighting", rule.__name__, separate),
    ]
    return [
        Requirement(f"fusion.{key}", value, allowed, logs)
        for is_set, key, value, allowed in options
        if is_set
    ]


def unmet(requirements: Iterable[Requirement], source: Capabilities) -> list[str]:
    """One message, `key: got value; must be ...; do ...`, per requirement that a source fails."""
    problems = [_problem(requirement, source) for requirement in requirements]
    return [problem for problem in problems if problem is not None]


def check(requirements: Sequence[Requirement], sources: Sequence[Capabilities]) -> None:
    """Refuse options that one of the sources does not support.

    Raises:
        RecipeError: with one line per option.
    """
    _refuse([line for source in sources for line in unmet(requirements, source)])


def check_teachers(
    requirements: Sequence[Requirement], teachers: Mapping[str, Capabilities]
) -> None:
    """Refuse options that a teacher does not support, though they concern it. Raises as `check`."""
    _refuse(
        line
        for name, source in teachers.items()
        for line in unmet([one for one in requirements if _concerns(one, name)], source)
    )


def _concerns(requirement: Requirement, teacher: str) -> bool:
    return requirement.teachers is None or teacher in requirement.teachers


def _refuse(lines: Iterable[str]) -> None:
    if text := "\n".join(dict.fromkeys(lines)):
        raise RecipeError(text)


def _problem(requirement: Requirement, source: Capabilities) -> str | None:
    needed, at = requirement.capability, requirement.temperature
    stored = source.temperatures
    if needed is not None:
        if needed in source.supported:
            return None
        allowed, reason = requirement.allowed, needed.value
        remedy = REMEDIES.get(needed, "change it")
    else:
        if at is None or stored is None or nearest_temperature(at, stored) is not None:
            return None
        allowed = f"one of {', '.join(f'{value:g}' for value in sorted({1.0, *stored}))}"
        reason, remedy = "it stores no other temperature", "add it to cache.temperatures"
    return (
        f"{requirement.key}: got {requirement.value}; must be {allowed} with {source.source} "
        f"({reason}); {remedy}, or {source.remedy}"
    )
