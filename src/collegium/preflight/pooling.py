"""Sweep of a preflight over many fusions of the same teachers: the NLL of each fused target.

Shapes: N rows of the chosen windows, n rows of one strip, V vocabulary, K teachers, G pooled
temperatures, F fusions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from collegium.distributions import Answer, Teacher
from collegium.evaluate.scoring import Windows
from collegium.fusion.buffered import buffered, strips_of
from collegium.fusion.calibration import NEGLIGIBLE
from collegium.fusion.fuse import Fusion
from collegium.fusion.pools import TeacherReader, masked_scores
from collegium.fusion.weighting import RowStats
from collegium.kernels.rows import RawRows, Workspace, floor_, to_logits
from collegium.preflight.sweeps import NUM_BYTES, buffer_sizes
from collegium.types import Rows

Temperatures = tuple[tuple[str, float], ...]
"""Temperature of each teacher that is not raw, by name."""


@dataclass(frozen=True, eq=False)
class SweptFusion:
    """A fusion whose parameters were fitted on each fold, to be scored on the other one."""

    first: Fusion
    """Scores the first fold."""
    second: Fusion
    """Scores the second fold."""
    weights_KN: Tensor | None = None
    """(K, N) float64 weights. None where no known scalars determine them."""


@torch.no_grad()
def sweep_fusions(
    teachers: Sequence[Teacher],
    split: Windows,
    fusions: Sequence[SweptFusion],
    is_second_N: Tensor,
    pooled_temperatures: Sequence[float],
    *,
    num_bytes: int = NUM_BYTES,
) -> Tensor:
    """Return the NLL of each fused target per pooled temperature and row, (F, G, N) float64.

    The teachers are read once, and each head is applied once per row, or twice where weights depend
    on distributions, whatever the number of fusions.

    Args:
        teachers: the frozen models.
        split: the windows to read.
        fusions: the fusions, without conflict policies and pooled temperatures.
        is_second_N: (N,) whether each row belongs to the second fold, by whole pieces of documents.
        pooled_temperatures: temperatures at which to score each fusion.
        num_bytes: memory for logits.
    """
    parts: list[Tensor] = []
    start = 0
    reader = _PoolReader(pooled_temperatures)
    for answers, rows, _ in split.answers(teachers):
        batch_N = slice(start, start + len(rows))
        start += len(rows)
        nll_FGn = torch.zeros(len(fusions), len(pooled_temperatures), len(rows)).double()
        for fold in range(2):
            is_read_n = is_second_N[batch_N] == bool(fold)
            if not is_read_n.any():
                continue
            fold_answers, fold_rows = _select_rows(answers, rows, is_read_n)
            members = buffered(fold_answers, buffer_sizes(fold_answers, num_bytes)[1])
            settings = [(one.first, one.second)[fold] for one in fusions]
            weights = [
                None if one.weights_KN is None else one.weights_KN[:, batch_N][:, is_read_n]
                for one in fusions
            ]
            nll_FGn[..., is_read_n] = reader.read(settings, weights, members, fold_rows)
        parts.append(nll_FGn)
    return torch.cat(parts, -1)


class _PoolReader:
    """Reads the pools of many fusions strip by strip, from members that all of them share.

    Log P_k at a temperature, P_k or its power is computed once per strip. Each fusion then takes a
    sum of K members, a logarithm, and one exponential per pooled temperature.
    """

    def __init__(self, pooled_temperatures: Sequence[float]) -> None:
        self._temperatures = pooled_temperatures
        self._memory = Workspace()
        self._raw: list[RawRows] = []
        self._members: dict[tuple[int, float, float | None], tuple[Tensor, Tensor]] = {}

    def read(
        self,
        fusions: Sequence[Fusion],
        known_weights: Sequence[Tensor | None],
        answers: Sequence[Answer],
        rows: Rows,
    ) -> Tensor:
        """Return (F, G, N) NLL of M^(1/T) / Z at the labels, for the pool M of each fusion."""
        vocab_size, _ = buffer_sizes(answers)
        strips = strips_of(slice(0, len(rows)), vocab_size, rows.labels.device)
        weights = read_weights(fusions, known_weights, answers, rows, strips)
        names = [answer.name for answer in answers]
        temperatures = [[one.temperatures.get(name, 1.0) for name in names] for one in fusions]
        reader = TeacherReader(answers, rows, {}, workspace=self._memory)
        nll_FGN = torch.zeros(len(fusions), len(self._temperatures), len(rows)).double()
        for strip in strips:
            self._raw = [reader.raw(k, strip, buffer=f"raw {k}")[0] for k in range(len(names))]
            self._members.clear()
            for fusion, temperature_K, weight_KN, nll_GN in zip(
                fusions, temperatures, weights, nll_FGN, strict=True
            ):
                # M = (sum_k w_k P_k^r)^(1/r), or log M = sum_k w_k log P_k.
                powers = {"linear": 1.0, "power_mean": fusion.exponent, "log_linear": None}
                members = [
                    self._member(number, temperature, powers[fusion.pool], rows.labels[strip])
                    for number, temperature in enumerate(temperature_K)
                ]
                nll_GN[:, strip] = self._nll(members, weight_KN[:, strip], powers[fusion.pool])
        return nll_FGN

    def _member(
        self, number: int, temperature: float, power: float | None, labels_n: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One teacher's (n, V) P^r, or log P without a power, and (n,) log P of the labels."""
        key = number, temperature, power
        if key not in self._members:
            raw = self._raw[number]
            like = raw.values_nV.new_empty(0, dtype=raw.dtype)
            # The same memory in every strip, or the heap would fragment.
            buffer = f"member {len(self._members)}"
            values_nV = self._memory.matrix(buffer, raw.values_nV.shape, like)
            logits_nV = to_logits(raw.tempered(temperature), values_nV)
            floor_(torch.log_softmax(logits_nV, -1, out=values_nV))
            label_logp_n = values_nV.gather(1, labels_n[:, None])[:, 0]
            if power is not None:
                values_nV.mul_(power).clamp_(min=NEGLIGIBLE).exp_()
            self._members[key] = values_nV, label_logp_n
        return self._members[key]

    def _nll(
        self, members: Sequence[tuple[Tensor, Tensor]], weight_Kn: Tensor, power: float | None
    ) -> Tensor:
        """(G, n) float64 log sum_v M_v^(1/T) - log M_y / T, for any multiple M of the pool."""
        label_Kn = torch.stack([label_n for _, label_n in members]).double()
        logs_nV = self._sum(members, weight_Kn)
        if power is None:
            label_n = (weight_Kn * label_Kn).sum(0)
        else:
            label_n = (weight_Kn.log() + power * label_Kn).logsumexp(0) / power
            logs_nV.log_()
        # From here on, log M = logs / r.
        scale = power or 1.0
        scaled_nV = self._memory.matrix("scaled", logs_nV.shape, logs_nV)
        has_tiny = bool(logs_nV.amin() / (scale * min(self._temperatures)) < NEGLIGIBLE)
        columns = []
        for temperature in self._temperatures:
            torch.mul(logs_nV, 1.0 / (scale * temperature), out=scaled_nV)
            if has_tiny:
                scaled_nV.clamp_(min=NEGLIGIBLE)
            log_z_n = scaled_nV.exp_().sum(-1).log()
            columns.append(log_z_n.double() - label_n / temperature)
        return torch.stack(columns).cpu()

    def _sum(self, members: Sequence[tuple[Tensor, Tensor]], weight_Kn: Tensor) -> Tensor:
        """(n, V) weighted sum of the members, in a buffer."""
        first_nV, _ = members[0]
        sum_nV = self._memory.matrix("pool", first_nV.shape, first_nV)
        weight_Kn1 = weight_Kn[:, :, None].to(first_nV)
        torch.mul(first_nV, weight_Kn1[0], out=sum_nV)
        for (values_nV, _), weight_n1 in zip(members[1:], weight_Kn1[1:], strict=True):
            sum_nV.addcmul_(values_nV, weight_n1)
        return sum_nV


def read_weights(
    fusions: Sequence[Fusion],
    known_weights: Sequence[Tensor | None],
    answers: Sequence[Answer],
    rows: Rows,
    strips: Sequence[slice],
) -> list[Tensor]:
    """Return (K, N) float64 weights of each fusion, computed from distributions where not known."""
    has_consensus: dict[Temperatures, bool] = {}
    for fusion, known_KN in zip(fusions, known_weights, strict=True):
        if known_KN is None:
            at = _temperatures(fusion.temperatures)
            has_consensus[at] = has_consensus.get(at, False) or fusion.weighting.needs_consensus
    stats = _read_stats(has_consensus, answers, rows, strips)
    names = [answer.name for answer in answers]
    weights = []
    for fusion, known_KN in zip(fusions, known_weights, strict=True):
        if known_KN is not None:
            weights.append(known_KN.to(rows.labels.device))
            continue
        read = stats[_temperatures(fusion.temperatures)]
        score_KN = masked_scores(fusion.weighting.log_scores(read, rows, names), read)
        weights.append(score_KN.softmax(0))
    return weights


def _read_stats(
    has_consensus: Mapping[Temperatures, bool],
    answers: Sequence[Answer],
    rows: Rows,
    strips: Sequence[slice],
) -> dict[Temperatures, RowStats]:
    """(K, N) statistics at each of the temperatures, with the consensus where the value is True."""
    if not has_consensus:
        return {}
    readers = {at: TeacherReader(answers, rows, dict(at)) for at in has_consensus}
    # All temperatures of one strip after the other: they share its product with a head.
    parts = [
        {
            at: readers[at].stats(strip, consensus=consensus)
            for at, consensus in has_consensus.items()
        }
        for strip in strips
    ]
    return {at: RowStats.cat([part[at] for part in parts]) for at in has_consensus}


def _temperatures(temperatures: Mapping[str, float]) -> Temperatures:
    return tuple(sorted(temperatures.items()))


def _select_rows(
    answers: Sequence[Answer], rows: Rows, is_kept_n: Tensor
) -> tuple[list[Answer], Rows]:
    if is_kept_n.all():
        return list(answers), rows
    kept_n = is_kept_n.nonzero()[:, 0]
    picked = [replace(answer, distribution=answer.distribution.take(kept_n)) for answer in answers]
    return picked, rows.part(kept_n.to(rows.labels.device))
