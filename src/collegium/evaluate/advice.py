"""The verdict of a preflight in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from collegium.evaluate.metrics import perplexity

# Specialists off their domain reach 1 to 3 nats (docs/results/demo.md).
OVERCONFIDENCE_THRESHOLD = 0.3
"""NLL - H in nats above which a teacher is reported as overconfident."""

MIN_NLL_GAIN = 0.002
"""Nats per token by which several teachers must beat the best single one."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The figures behind the verdict. NLL is in nats per token, all on the same tokens."""

    fusion_name: str
    num_tokens: int
    nll: float
    uniform_nll: float
    best_single: str
    best_single_nll: float
    best_several_nll: float | None
    """NLL of the best fusion that mixes teachers, or None with a single teacher."""
    mean_weights: Mapping[str, float]
    """Mean weight of each teacher under the chosen fusion."""
    idle_teachers: Mapping[str, float]
    """Teachers that add nothing -> increase of the NLL without them."""
    overconfidence: Mapping[str, float]
    """NLL - H of each raw teacher."""


def verdict_sentences(findings: Findings) -> list[str]:
    """Return three sentences: the fusion to use, idle teachers, and whether fusing pays."""
    return [_fusion_sentence(findings), _teacher_sentence(findings), _gain_sentence(findings)]


def _fusion_sentence(findings: Findings) -> str:
    over_uniform = _compared_with(findings.uniform_nll - findings.nll)
    over_single = _compared_with(findings.best_single_nll - findings.nll)
    return (
        f"Use {findings.fusion_name}: its fused target has an NLL of {findings.nll:.3f} nats per "
        f"token on {findings.num_tokens:,} tokens, {over_uniform} uniform weights and "
        f"{over_single} the best single teacher."
    )


def _teacher_sentence(findings: Findings) -> str:
    if findings.idle_teachers:
        idle = [
            f"`{name}` (weight {findings.mean_weights[name]:.1%}, NLL {increase:+.3f} without it)"
            for name, increase in findings.idle_teachers.items()
        ]
        text = f"{_enumerate(idle)} {'adds' if len(idle) == 1 else 'add'} nothing"
    else:
        text = "Every teacher adds something"
    overconfident = [
        f"`{name}` (NLL - H = {gap:+.2f} nats)"
        for name, gap in findings.overconfidence.items()
        if gap > OVERCONFIDENCE_THRESHOLD
    ]
    return f"{text}; overconfident: {_enumerate(overconfident)}." if overconfident else f"{text}."


def _gain_sentence(findings: Findings) -> str:
    single = findings.best_single
    if findings.best_several_nll is None:
        return f"There is only one teacher, `{single}`, so there is nothing to fuse."
    several_nll, single_nll = findings.best_several_nll, findings.best_single_nll
    numbers = (
        f"NLL {several_nll:.3f} against {single_nll:.3f}, "
        f"perplexity {_perplexity(several_nll)} against {_perplexity(single_nll)}"
    )
    if single_nll - several_nll > MIN_NLL_GAIN:
        return f"Fusing several teachers beats the best single one, `{single}`: {numbers}."
    return f"Fusing several teachers does not beat the best single one, `{single}`: {numbers}."


def _perplexity(nll: float) -> str:
    return f"{perplexity(nll):.1f}"


def _compared_with(gain: float) -> str:
    # Below 0.0005 nats the difference would print as 0.000.
    if not math.isfinite(gain) or abs(gain) < 0.0005:
        return "level with"
    return f"{abs(gain):.3f} {'below' if gain > 0 else 'above'}"


def _enumerate(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
