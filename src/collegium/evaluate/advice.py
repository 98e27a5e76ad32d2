"""The verdict of a pre-flight in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from collegium.evaluate.metrics import perplexity

OVERCONFIDENT = 0.3
"""Nats of NLL - H from which a teacher is called over-confident."""

WORTH_IT = 0.002
"""Nats by which several teachers must beat the best single one."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The numbers that the verdict speaks of; NLL in nats per token, all on the same tokens."""

    fusion_name: str
    num_tokens: int
    nll: float
    uniform_nll: float
    best_single: str
    best_single_nll: float
    best_several_nll: float | None
    """Of the best fusion that mixes teachers; None with a single teacher."""
    shares: Mapping[str, float]
    """Mean weight of each teacher under the chosen fusion."""
    rises: Mapping[str, float]
    """Teachers that add nothing -> rise of the NLL when they are left out."""
    overconfidence: Mapping[str, float]
    """NLL - H of each raw teacher."""


def verdict_sentences(findings: Findings) -> list[str]:
    """Which fusion to use, which teachers add nothing, and whether several teachers beat the best one."""
    return [_use(findings), _teachers(findings), _several(findings)]


def _use(findings: Findings) -> str:
    over_uniform = _against(findings.uniform_nll - findings.nll)
    over_single = _against(findings.best_single_nll - findings.nll)
    return (
        f"Use {findings.fusion_name}: its fused target has an NLL of {findings.nll:.3f} nats per token on "
        f"{findings.num_tokens:,} tokens, {over_uniform} uniform weights and {over_single} the best single teacher."
    )


def _teachers(findings: Findings) -> str:
    if findings.rises:
        idle = [
            f"`{name}` (weight {findings.shares[name]:.1%}, NLL {rise:+.3f} without it)"
            for name, rise in findings.rises.items()
        ]
        text = f"{_and(idle)} {'adds' if len(idle) == 1 else 'add'} nothing"
    else:
        text = "Every teacher adds something"
    loud = [
        f"`{name}` (NLL - H = {gap:+.2f} nats)"
        for name, gap in findings.overconfidence.items()
        if gap > OVERCONFIDENT
    ]
    return f"{text}; over-confident: {_and(loud)}." if loud else f"{text}."


def _several(findings: Findings) -> str:
    single = findings.best_single
    if findings.best_several_nll is None:
        return f"There is only one teacher, `{single}`, so there is nothing to fuse."
    several_nll, single_nll = findings.best_several_nll, findings.best_single_nll
    numbers = (
        f"NLL {several_nll:.3f} against {single_nll:.3f}, perplexity {_perplexity(several_nll)} against "
        f"{_perplexity(single_nll)}"
    )
    if single_nll - several_nll > WORTH_IT:
        return f"Several teachers beat the best single one, `{single}`: {numbers}."
    return f"Several teachers do not beat the best single one, `{single}`: {numbers}."


def _perplexity(nll: float) -> str:
    return f"{perplexity(nll):.1f}"


def _against(gain: float) -> str:
    if not math.isfinite(gain) or abs(gain) < 0.0005:
        return "level with"
    return f"{abs(gain):.3f} {'below' if gain > 0 else 'above'}"


def _and(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
