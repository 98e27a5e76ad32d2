"""The verdict of a preflight: the worth of each teacher, in numbers and in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from collegium.evaluate.metrics import Metrics, perplexity
from collegium.fusion.calibration import TemperatureTables
from collegium.fusion.fuse import Fusion
from collegium.fusion.options import describe
from collegium.fusion.rules import BestSingle, Uniform
from collegium.preflight.search import SAME_NLL, Candidate, Search

# Specialists off their domain reach 1 to 3 nats (docs/results/demo.md).
OVERCONFIDENCE_THRESHOLD = 0.3
"""NLL - H in nats above which a teacher is reported as overconfident."""


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
    leave_one_out: Mapping[str, float]
    """Teacher -> increase of the linear pool's NLL without it. Empty with a single member."""
    idle_teachers: Mapping[str, float]
    """Teachers that add nothing -> increase of the NLL without them."""
    overconfidence: Mapping[str, float]
    """NLL - H of each raw teacher."""


def findings_of(
    search: Search, ranked: Sequence[Candidate], chosen: Candidate, metrics: Mapping[str, Metrics]
) -> Findings:
    """Collect the figures behind the verdict.

    `ranked` are the candidates of the search, lowest NLL first. `metrics` are of the raw teachers.
    """
    tables, fusion = search.scalars.tables, chosen.fusion
    weights_KN = tables.weights(fusion.weighting, _weight_temperatures(fusion))
    members = [name for name in tables.teachers if not fusion.weighting.excludes(name)]
    best_single = search.conditions.best_single
    several = [other for other in ranked if not other.fusion.weighting.is_single]
    return Findings(
        fusion_name=describe(fusion),
        num_tokens=len(chosen.nll_N),
        nll=chosen.nll,
        uniform_nll=search.linear_nll(Uniform()),
        best_single=best_single,
        best_single_nll=search.linear_nll(BestSingle(teacher=best_single)),
        best_several_nll=several[0].nll if several and len(metrics) > 1 else None,
        mean_weights=dict(zip(tables.teachers, weights_KN.mean(1).tolist(), strict=True)),
        leave_one_out=_nll_increases(tables, fusion, members) if len(members) > 1 else {},
        idle_teachers=_idle_teachers(tables, fusion, members),
        overconfidence={name: scored.overconfidence for name, scored in metrics.items()},
    )


def _idle_teachers(
    tables: TemperatureTables, fusion: Fusion, members: Sequence[str]
) -> dict[str, float]:
    """Return the teachers that can be dropped together -> NLL increase of each, < 0.002 nats.

    The NLL is that of the linear pool with the chosen weighting and temperatures, even when the
    chosen pool is log-linear.
    """
    # Dropped one after the other, least useful first, so that one of two equal teachers stays.
    kept = list(members)
    idle = {name: 0.0 for name in tables.teachers if name not in kept}
    while len(kept) > 1:
        increases = _nll_increases(tables, fusion, kept)
        least = min(increases, key=lambda name: increases[name])
        # Not decided by weight: the specialist of a rare domain has little weight but is needed.
        if increases[least] >= SAME_NLL:
            break
        idle[least] = increases[least]
        kept.remove(least)
    return idle


def _weight_temperatures(fusion: Fusion) -> Mapping[str, float]:
    # A consensus is measured for the raw teachers only.
    return {} if fusion.weighting.needs_consensus else fusion.temperatures


def _nll_increases(
    tables: TemperatureTables, fusion: Fusion, members: Sequence[str]
) -> dict[str, float]:
    """Return the NLL increase without each member, infinite if some row keeps no weight."""
    weighting, temperatures = fusion.weighting, _weight_temperatures(fusion)
    base_nll = float(tables.linear_nll(weighting, temperatures, members).mean())
    increases = {}
    for name in members:
        others = [other for other in members if other != name]
        increase = float(tables.linear_nll(weighting, temperatures, others).mean()) - base_nll
        # Where no member has weight at some row, its NLL is -inf - -inf = NaN.
        increases[name] = math.inf if math.isnan(increase) else increase
    return increases


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
        f"perplexity {perplexity(several_nll):.1f} against {perplexity(single_nll):.1f}"
    )
    if single_nll - several_nll > SAME_NLL:
        return f"Fusing several teachers beats the best single one, `{single}`: {numbers}."
    return f"Fusing several teachers does not beat the best single one, `{single}`: {numbers}."


def _compared_with(gain: float) -> str:
    # Below 0.0005 nats the difference would print as 0.000.
    if not math.isfinite(gain) or abs(gain) < 0.0005:
        return "level with"
    return f"{abs(gain):.3f} {'below' if gain > 0 else 'above'}"


def _enumerate(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
