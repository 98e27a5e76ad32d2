"""Calibration error, and temperatures fitted to reduce the NLL.

Shapes: N rows, n rows of one block, V vocabulary, K teachers, G temperatures of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from collegium.distributions import Distribution
from collegium.fusion.weighting import RowStats, Weighting
from collegium.kernels.plain import MIN_LOGIT, strips
from collegium.kernels.rows import RawRows, Workspace, logp_floor, to_logits, top_tokens
from collegium.storage.records import GridEnd
from collegium.types import Rows, map_tensors

TEMPERATURES: tuple[float, ...] = (
    *(2.0**octave for octave in range(-4, -1)),
    *(2.0 ** ((step - 6) / 6) for step in range(19)),
    *(2.0**octave for octave in range(3, 6)),
)
"""Six temperatures per octave from 1/2 to 4, including 1, the uncalibrated teacher.

Beyond, one per octave from 1/16 to 32: few teachers are that badly calibrated.
"""
FINE_STEP = 2.0**0.25
"""Largest ratio of neighbors for a parabola through three of them."""
# On a CPU, exp below -87 takes a path that is a hundred times slower.
NEGLIGIBLE = -80.0
"""Log of a probability, relative to the top token or to 1, that counts as e^-80."""
MIN_GAIN = 1e-7
"""Minimum gain in nats per token for a temperature to replace the current one."""

# Equal mass rather than equal width, so that no bin is nearly empty
# (Nixon et al. 2019, https://arxiv.org/abs/1904.01685).
NUM_BINS = 15
"""Bins of equal mass, for the calibration error and for both reliability curves."""


def calibration_error(
    confidence_N: np.ndarray, is_correct_N: np.ndarray, bins: int = NUM_BINS
) -> tuple[float, float, float]:
    """Compute ECE = sum_m |B_m| / N * |accuracy_m - confidence_m| over bins of equal mass.

    `confidence_N` is the probability of the most likely token, and `is_correct_N` whether it was
    the label. Equal confidences share a bin, so there may be fewer than `bins`.

    Returns:
        ECE and its parts of overconfident and of underconfident bins, sum_m |B_m| / N *
        max(0, confidence_m - accuracy_m) and with the signs swapped. NaN without rows.
    """
    binned = reliability_bins(confidence_N, is_correct_N, bins)
    count = np.array(binned["count"])
    if not count.size:
        return math.nan, math.nan, math.nan
    gap = np.subtract(binned["confidence"], binned["accuracy"])
    whole = (count * np.abs(gap)).sum() / count.sum()
    over, under = (count / count.sum() * np.array([gap, -gap]).clip(min=0)).sum(1)
    return float(whole), float(over), float(under)


def reliability_bins(
    confidence_N: np.ndarray, is_correct_N: np.ndarray, bins: int = NUM_BINS
) -> dict[str, list[float]]:
    """Return mean `confidence`, `accuracy` and the `count` per equal-mass bin, by confidence."""
    return _binned({"confidence": confidence_N, "accuracy": is_correct_N}, bins)


def entropy_bins(
    entropy_N: np.ndarray, is_correct_N: np.ndarray, nll_N: np.ndarray, bins: int = NUM_BINS
) -> dict[str, list[float]]:
    """Return mean `entropy`, `accuracy`, `nll` and the `count` per equal-mass bin, by entropy."""
    return _binned({"entropy": entropy_N, "accuracy": is_correct_N, "nll": nll_N}, bins)


def _binned(columns: Mapping[str, np.ndarray], bins: int) -> dict[str, list[float]]:
    """Sort by the first column, cut into bins of equal mass, and average every column per bin."""
    arrays = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    key = next(iter(arrays.values()))
    order = np.argsort(key, kind="stable")
    if order.size == 0:
        return {**{name: [] for name in arrays}, "count": []}
    sorted_key = key[order]
    edges = np.linspace(0, order.size, min(bins, order.size) + 1).round().astype(int)[:-1]
    # Ties share a bin: otherwise the result would depend on the order of the rows.
    starts = np.unique(np.searchsorted(sorted_key, sorted_key[edges], side="left"))
    count = np.diff(starts, append=order.size)
    means = {name: np.add.reduceat(x_N[order], starts) / count for name, x_N in arrays.items()}
    return {name: column.tolist() for name, column in {**means, "count": count}.items()}


@dataclass(frozen=True, eq=False)
class TemperatureTables:
    """Scalars of all teachers at a grid of temperatures, sufficient for every linear pool.

    K * G * N scalars and no distributions: one application of each head gives all temperatures.
    """

    # SCALAR_BYTES per token and teacher: 9.3 GB at peak for a million tokens and four teachers.
    grid: Sequence[float]
    tables: Mapping[str, RowStats]
    """Teacher -> statistics (G, N). Their first axis is the temperature, not the teacher."""
    rows: Rows
    """The N rows on the CPU; documents of different batches have different numbers."""
    consensus_kl_KN: Tensor | None = None
    """(K, N) KL(P_k || mean of all P) of the raw teachers. Not stored for other temperatures, and
    None for teachers read from a cache, which have no whole distributions."""

    @classmethod
    def cat(cls, batches: Sequence[TemperatureTables]) -> TemperatureTables:
        """Concatenate batches of the same teachers, and renumber their documents."""
        rows, next_document = [], 0
        for batch in batches:
            documents = batch.rows.documents - batch.rows.documents.min() + next_document
            next_document = int(documents.max()) + 1
            rows.append(replace(batch.rows, documents=documents))
        kl = [batch.consensus_kl_KN for batch in batches if batch.consensus_kl_KN is not None]
        return cls(
            batches[0].grid,
            {name: RowStats.cat([b.tables[name] for b in batches]) for name in batches[0].tables},
            Rows.cat(rows),
            torch.cat(kl, dim=1) if len(kl) == len(batches) else None,
        )

    def part(self, is_kept_N: Tensor) -> TemperatureTables:
        """Return the tables of a subset of the rows, made of whole documents."""
        # Whole documents, since prefix rules read the earlier rows of a document.
        return map_tensors(self, lambda tensor: tensor[..., is_kept_N])

    @property
    def teachers(self) -> list[str]:
        """Names in the order of axis K."""
        return list(self.tables)

    def stats(
        self, temperatures: Mapping[str, float], teachers: Sequence[str] | None = None
    ) -> RowStats:
        """Return (K, N) statistics of these teachers at grid temperatures, 1 by default."""
        names = self.teachers if teachers is None else teachers
        stats = RowStats.stack([self._at(name, temperatures.get(name, 1.0)) for name in names])
        # The consensus depends on the temperatures of all teachers, also of those not selected.
        is_raw = all(temperatures.get(name, 1.0) == 1.0 for name in self.tables)
        if self.consensus_kl_KN is None or not is_raw:
            return stats
        indices = [self.teachers.index(name) for name in names]
        return replace(stats, consensus_kl_KN=self.consensus_kl_KN[indices])

    def linear_nll(
        self,
        weighting: Weighting,
        temperatures: Mapping[str, float],
        teachers: Sequence[str] | None = None,
    ) -> Tensor:
        """Return the NLL of the linear pool at every row, (N,) float64 nats.

        Temperatures must be on the grid. A rule that needs the consensus takes no temperatures, and
        reads the consensus of all teachers even for a subset of them.
        """
        names = self.teachers if teachers is None else teachers
        return linear_pool_nll(self.stats(temperatures, names), weighting, self.rows, names)

    def weights(self, weighting: Weighting, temperatures: Mapping[str, float]) -> Tensor:
        """Return the weights, (K, N) float64. Each column sums to 1."""
        return weighting.log_scores(self.stats(temperatures), self.rows, self.teachers).softmax(0)

    def determine(self, weighting: Weighting, temperatures: Mapping[str, float]) -> bool:
        """Whether they determine the weights of a rule for teachers at these temperatures."""
        if weighting.needs_consensus:
            return not temperatures and self.consensus_kl_KN is not None
        return all(value in self.grid for value in temperatures.values())

    def _at(self, teacher: str, temperature: float) -> RowStats:
        column = self.column(temperature)
        return map_tensors(self.tables[teacher], lambda column_GN: column_GN[column])

    def column(self, temperature: float) -> int:
        """Return the index of the nearest grid temperature."""
        return min(range(len(self.grid)), key=lambda g: abs(self.grid[g] - temperature))


class GridReader:
    """Reads the scalars of a distribution at every temperature of a grid.

    With s = z - max z, and R the sum of exp(s_v / T) over all tokens but the top one, which would
    round it: log Z_T = log(1 + R), and H_T = log Z_T - sum_v exp(s_v / T) s_v / T / (1 + R).
    """

    def __init__(self, grid: Sequence[float]) -> None:
        self._grid = grid
        self._workspace = Workspace()

    def read(self, distribution: Distribution, labels_n: Tensor, block: slice) -> RowStats:
        """Return statistics (G, n) of a block of rows, after one application of the head."""
        stored = [distribution.scalars(block, value) for value in self._grid]
        if None not in stored:
            return RowStats.stack([RowStats(*scalars) for scalars in stored if scalars is not None])
        raw, _ = distribution.raw(block, self._workspace, "logits")
        labels_n = labels_n.to(raw.values_nV.device)
        # A strip stays in the processor's cache for the whole grid: 25 temperatures of V = 49,152
        # take 1.3 ms per row, against 18 ms by one sweep over a block of 256 rows each.
        parts = [
            self._strip(replace(raw, values_nV=raw.values_nV[strip]), labels_n[strip])
            for strip in strips(raw)
        ]
        return RowStats.cat(parts)

    def _strip(self, raw: RawRows, labels_s: Tensor) -> RowStats:
        matrix, shape = self._workspace.matrix, raw.values_nV.shape
        like = raw.values_nV.new_empty(0, dtype=raw.dtype)
        shifted_sV, scaled_sV = matrix("shifted", shape, like), matrix("scaled", shape, like)
        exp_sV = matrix("exp", shape, like)
        logits_sV = to_logits(raw, exp_sV)
        top_s1 = top_tokens(logits_sV)[:, None]
        torch.sub(logits_sV, logits_sV.gather(1, top_s1), out=shifted_sV)
        label_s = shifted_sV.gather(1, labels_s[:, None])[:, 0]
        # Finite, or exp(-inf) * -inf would be NaN.
        shifted_sV.clamp_(min=MIN_LOGIT)
        # Reading the values of a GPU would synchronize with it.
        lowest = float(shifted_sV.amin()) if shifted_sV.device.type == "cpu" else MIN_LOGIT
        rest_Gs, dot_Gs = like.new_empty(2, len(self._grid), shape[0])
        for g, temperature in enumerate(self._grid):
            torch.mul(shifted_sV, 1.0 / temperature, out=scaled_sV)
            if lowest / temperature < NEGLIGIBLE:
                scaled_sV.clamp_(min=NEGLIGIBLE)
            scaled_sV.scatter_(1, top_s1, NEGLIGIBLE)
            torch.sum(torch.exp(scaled_sV, out=exp_sV), -1, out=rest_Gs[g])
            torch.sum(exp_sV.mul_(scaled_sV), -1, out=dot_Gs[g])
        log_sum_Gs = rest_Gs.log1p()
        entropy_Gs = log_sum_Gs - dot_Gs / (1.0 + rest_Gs)
        label_Gs = label_s / like.new_tensor(self._grid)[:, None] - log_sum_Gs
        return RowStats(entropy_Gs, label_Gs.clamp(min=logp_floor(raw.dtype)), -log_sum_Gs)


def fit_temperature(tables: TemperatureTables, teacher: str) -> float | None:
    """Fit T* = argmin_T mean NLL of softmax(z / T) for one teacher, inside the grid.

    The result is between grid temperatures, and 1 for a flat teacher, whose temperature does not
    matter. At an end of the grid the NLL still falls beyond it (see `grid_end`). None for a grid
    of one temperature, which fits nothing.
    """
    if len(tables.grid) == 1:
        return None
    table = tables.tables[teacher]
    nll_G, entropy_G = -table.label_logp_KN.double().mean(1), table.entropy_KN.double().mean(1)
    if float(nll_G.max() - nll_G.min()) < MIN_GAIN:
        return 1.0
    # d NLL / d log T = H - NLL: 0 where the teacher is calibrated on average.
    return temperature_of_least_nll(tables.grid, nll_G, entropy_G - nll_G)


def grid_end(grid: Sequence[float], temperature: float | None) -> GridEnd | None:
    """Whether a fitted temperature is an end of those tried, so no optimum. None for others."""
    if temperature == grid[0]:
        return "lowest"
    return "highest" if temperature == grid[-1] else None


Axis = Callable[[int, Sequence[int]], Tensor]
"""(G,) nats per row of the linear pool: teacher `number` at each temperature, k at indices[k]."""


def fit_joint_temperatures(
    tables: TemperatureTables, weighting: Weighting, *, num_rounds: int = 5
) -> dict[str, float]:
    """Fit the temperatures of all teachers that minimize the NLL of their linear pool.

    At most `num_rounds` of coordinate descent on the grid from T = 1, so never worse than the
    uncalibrated teachers. The statistics that a weighting reads change with the temperatures. In
    the gradient of -log sum_k w_k P_k(y) each token of a teacher counts by its responsibility, so
    a specialist is calibrated on the rows where it has weight.
    """
    # Fitted one by one, specialists are softened (T of 1.4 to 1.9) for mistakes off their domain.
    # Fitted jointly they are sharpened a little (0.89), see "Temperatures of specialists" in
    # docs/log.md.
    names, grid = tables.teachers, tables.grid
    raw = tables.column(1.0)
    indices = [raw] * len(names)
    axis = (_streamed_axis if weighting.streams else _axis)(tables, weighting)
    best = float(axis(0, indices)[raw])
    for _ in range(num_rounds):
        before = best
        for number in range(len(indices)):
            nll_G = axis(number, indices)
            index = int(nll_G.argmin())
            if nll_G[index] < best - MIN_GAIN:
                best, indices[number] = float(nll_G[index]), index
        if best == before:
            break
    return {name: grid[g] for name, g in zip(names, indices, strict=True)}


def _axis(tables: TemperatureTables, weighting: Weighting) -> Axis:
    names, grid = tables.teachers, tables.grid

    def nll(number: int, indices: Sequence[int]) -> Tensor:
        at = {name: grid[g] for name, g in zip(names, indices, strict=True)}
        trials = [{**at, names[number]: temperature} for temperature in grid]
        return torch.stack([tables.linear_nll(weighting, trial).mean() for trial in trials])

    return nll


def _streamed_axis(tables: TemperatureTables, weighting: Weighting) -> Axis:
    """As `_axis`, from K * G scores, since those of a streaming rule do not depend on others."""
    label_logp_KGN = [table.label_logp_KN.double() for table in tables.tables.values()]
    # The temperature takes the place of the teacher's axis.
    score_KGN = [
        weighting.log_scores(table, tables.rows, [name] * len(tables.grid))
        for name, table in tables.tables.items()
    ]

    def nll(number: int, indices: Sequence[int]) -> Tensor:
        total_GN = score_KGN[number]
        label_GN = total_GN + label_logp_KGN[number]
        # The other teachers contribute the same at every temperature of this one.
        for other, g in enumerate(indices):
            if other != number:
                score_N = score_KGN[other][g]
                total_GN = torch.logaddexp(total_GN, score_N)
                label_GN = torch.logaddexp(label_GN, score_N + label_logp_KGN[other][g])
        return (total_GN - label_GN).mean(1)

    return nll


def linear_pool_nll(
    stats: RowStats, weighting: Weighting, rows: Rows, teachers: Sequence[str]
) -> Tensor:
    """Compute -log sum_k w_k P_k(y) at every row from scalars: (N,) float64 nats.

    Statistics are (K, N), of calibrated teachers. No two documents may share a number.
    """
    score_KN = weighting.log_scores(stats, rows, teachers)
    # Scores are unnormalized log-weights, so take the difference of two logsumexps.
    total_N = torch.logsumexp(score_KN, dim=0)
    return total_N - torch.logsumexp(score_KN + stats.label_logp_KN.double(), dim=0)


def temperature_of_least_nll(
    grid: Sequence[float], nll_G: Tensor, slope_G: Tensor | None = None
) -> float:
    """Return the temperature of lowest NLL, interpolated in log T between those of the grid.

    The vertex of a parabola through three close points, else the minimum of the cubic that has the
    NLLs and slopes d NLL / d log T of two neighbors. An end of the grid where the NLL falls beyond.
    """
    best = int(nll_G.argmin())
    neighbors = grid[max(best - 1, 0) : best + 2]
    is_inside = len(neighbors) == 3
    if slope_G is not None and not (is_inside and neighbors[2] <= neighbors[0] * FINE_STEP**2):
        return _cubic_minimum(grid, nll_G, slope_G, best + (0 if slope_G[best] < 0 else -1))
    if not is_inside:
        return grid[best]
    log_grid = np.log(np.asarray(neighbors))
    square, linear, _ = np.polyfit(log_grid - log_grid[1], nll_G[best - 1 : best + 2].numpy(), 2)
    # Not convex at the minimum, as for a flat teacher: there is no vertex to move to.
    if square <= 0:
        return grid[best]
    vertex = log_grid[1] - linear / (2 * square)
    return float(np.exp(np.clip(vertex, log_grid[0], log_grid[2])))


def _cubic_minimum(grid: Sequence[float], nll_G: Tensor, slope_G: Tensor, left: int) -> float:
    """Minimum of the cubic Hermite interpolant between grid points `left` and `left` + 1."""
    if not 0 <= left < len(grid) - 1:
        return grid[max(left, 0)]
    width = math.log(grid[left + 1] / grid[left])
    (start, end), (rise, fall) = nll_G[left : left + 2], width * slope_G[left : left + 2]
    t = torch.linspace(0.0, 1.0, 1001, dtype=nll_G.dtype)
    drift = end - start
    cubic = start + t * (rise + t * (3 * drift - 2 * rise - fall + t * (rise + fall - 2 * drift)))
    return grid[left] * math.exp(width * float(t[cubic.argmin()]))
