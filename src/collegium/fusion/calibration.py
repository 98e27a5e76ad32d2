"""Calibration error, and temperatures fitted to reduce the NLL.

Shapes: N rows, n rows of one block, V vocabulary, K teachers, G temperatures of a grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collegium.distributions import Answer
from collegium.fusion.pools import RowReader
from collegium.fusion.weights import RowStats, Weighting
from collegium.types import Rows

TEMPERATURES: tuple[float, ...] = tuple(2.0 ** ((step - 6) / 6) for step in range(19))
"""Six temperatures per octave from 1/2 to 4, including 1, the uncalibrated teacher."""
MIN_GAIN = 1e-7
"""Minimum gain in nats per token for a temperature to replace the current one."""


def expected_calibration_error(
    confidence_N: Tensor | np.ndarray, is_correct_N: Tensor | np.ndarray, bins: int = 15
) -> float:
    """Compute ECE = sum_m |B_m| / N * |accuracy_m - confidence_m| over bins of equal mass.

    Args:
        confidence_N: probability of the most likely token.
        is_correct_N: whether that token was the label.
        bins: number of bins. Equal confidences share a bin, so there may be fewer.

    Returns:
        A fraction in [0, 1], NaN without rows.
    """
    binned = reliability_bins(confidence_N, is_correct_N, bins)
    if not binned["count"]:
        return float("nan")
    confidence, accuracy, count = (
        np.asarray(binned[key]) for key in ("confidence", "accuracy", "count")
    )
    return float((count * np.abs(accuracy - confidence)).sum() / count.sum())


def over_under_confidence(
    confidence_N: Tensor | np.ndarray, is_correct_N: Tensor | np.ndarray, bins: int = 15
) -> tuple[float, float]:
    """Split the calibration error into the parts of overconfident and underconfident bins.

    over = sum_m |B_m| / N * max(0, confidence_m - accuracy_m), and under with the signs swapped.
    over + under = ECE, with the bins of `expected_calibration_error`. Both NaN without rows.
    """
    binned = reliability_bins(confidence_N, is_correct_N, bins)
    if not binned["count"]:
        return float("nan"), float("nan")
    confidence, accuracy, count = (
        np.asarray(binned[key]) for key in ("confidence", "accuracy", "count")
    )
    share, gap = count / count.sum(), confidence - accuracy
    return float((share * gap.clip(min=0)).sum()), float((share * (-gap).clip(min=0)).sum())


def reliability_bins(
    confidence_N: Tensor | np.ndarray, is_correct_N: Tensor | np.ndarray, bins: int = 15
) -> dict[str, list[float]]:
    """Return mean `confidence`, `accuracy` and the `count` per equal-mass bin, by confidence."""
    columns = {"confidence": confidence_N, "accuracy": is_correct_N}
    return _binned("confidence", columns, bins)


def entropy_bins(
    entropy_N: Tensor | np.ndarray,
    is_correct_N: Tensor | np.ndarray,
    nll_N: Tensor | np.ndarray,
    bins: int = 15,
) -> dict[str, list[float]]:
    """Return mean `entropy`, `accuracy`, `nll` and the `count` per equal-mass bin, by entropy."""
    columns = {"entropy": entropy_N, "accuracy": is_correct_N, "nll": nll_N}
    return _binned("entropy", columns, bins)


def _binned(
    key: str, columns: Mapping[str, Tensor | np.ndarray], bins: int
) -> dict[str, list[float]]:
    """Sort by one column, cut into bins of equal mass, and average every column per bin."""
    arrays = {name: _float64(column) for name, column in columns.items()}
    order = np.argsort(arrays[key], kind="stable")
    if order.size == 0:
        return {**{name: [] for name in arrays}, "count": []}
    sorted_key = arrays[key][order]
    edges = np.linspace(0, order.size, min(bins, order.size) + 1).round().astype(int)[:-1]
    # Ties share a bin: otherwise the result would depend on the order of the rows.
    starts = np.unique(np.searchsorted(sorted_key, sorted_key[edges], side="left"))
    count = np.diff(starts, append=order.size)
    result = {
        name: (np.add.reduceat(column[order], starts) / count).tolist()
        for name, column in arrays.items()
    }
    return {**result, "count": count.tolist()}


def _float64(values: Tensor | np.ndarray) -> np.ndarray[Any, np.dtype[np.float64]]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


@torch.no_grad()
def temperature_table(
    teacher: Answer,
    rows: Rows,
    *,
    grid: Sequence[float] = TEMPERATURES,
    block_size: int = 256,
) -> RowStats:
    """Read a teacher's scalars at every temperature of the grid, with one pass of its head.

    A per-teacher cache is read as stored, so the grid must be among its temperatures.
    Returns:
        Statistics (G, N) on the CPU. The first axis is the temperature, not the teacher.
    """
    distribution = teacher.distribution
    stored = [distribution.scalars(slice(0, len(rows)), value) for value in grid]
    if None not in stored:
        parts = [RowStats(*scalars) for scalars in stored if scalars is not None]
        return _on_cpu(RowStats.stack(parts))
    reader = RowReader()
    blocks = []
    for start in range(0, len(rows), block_size):
        block = slice(start, min(start + block_size, len(rows)))
        logits_nV, labels_n = distribution.logits(block), rows.labels[block]
        at_grid = [reader.read(logits_nV, labels_n, temperature=value)[0] for value in grid]
        blocks.append(RowStats.stack(at_grid))
    return _on_cpu(RowStats.cat(blocks))


def _on_cpu(table: RowStats) -> RowStats:
    return RowStats(table.entropy_KN.cpu(), table.label_logp_KN.cpu(), table.max_logp_KN.cpu())


class TemperatureTables:
    """Temperature tables of all teachers over many batches: K * G * N scalars, no distributions.

    Documents of different batches get different numbers, so a weighting can score all rows at
    once.
    """

    def __init__(self, *, grid: Sequence[float] = TEMPERATURES, block_size: int = 256) -> None:
        self.grid = tuple(grid)
        self._block_size = block_size
        self._names: list[str] = []
        self._batches: list[list[RowStats]] = []
        self._rows: list[Rows] = []
        self._next_document = 0

    @property
    def names(self) -> Sequence[str]:
        """The teachers, in the order of every batch."""
        return self._names

    def add(self, teachers: Sequence[Answer], rows: Rows) -> None:
        """Add one batch, at the cost of one application of each head.

        Raises:
            ValueError: the teachers differ from those of earlier batches.
        """
        names = [teacher.name for teacher in teachers]
        if self._batches and names != self._names:
            raise ValueError(
                f"TemperatureTables.add: got teachers {names}; must be {self._names}, as in the "
                "first batch"
            )
        self._names = names
        if len(rows) == 0:
            return
        self._batches.append(
            [
                temperature_table(teacher, rows, grid=self.grid, block_size=self._block_size)
                for teacher in teachers
            ]
        )
        rows = rows.to(torch.device("cpu"))
        documents = rows.documents
        documents = documents - documents.min() + self._next_document
        self._next_document = int(documents.max()) + 1
        self._rows.append(dataclasses.replace(rows, documents=documents))

    def rows(self) -> Rows:
        """Return the rows of all batches in order, with document numbers unique among them.

        Raises:
            ValueError: no batch had a row.
        """
        if not self._rows:
            raise ValueError(
                "TemperatureTables.rows: got no rows; must have some; add a batch first"
            )
        domains = [rows.domains for rows in self._rows if rows.domains is not None]
        teachers = [rows.teachers for rows in self._rows if rows.teachers is not None]
        return Rows(
            index=torch.cat([rows.index for rows in self._rows]),
            labels=torch.cat([rows.labels for rows in self._rows]),
            documents=torch.cat([rows.documents for rows in self._rows]),
            samples=torch.cat([rows.samples for rows in self._rows]),
            domains=torch.cat(domains) if len(domains) == len(self._rows) else None,
            teachers=torch.cat(teachers) if len(teachers) == len(self._rows) else None,
        )

    def part(self, is_kept_N: Tensor) -> TemperatureTables:
        """Return the tables of a subset of the rows, made of whole documents."""
        # Whole documents, since prefix rules read the earlier rows of a document.
        part = TemperatureTables(grid=self.grid, block_size=self._block_size)
        part._names = list(self._names)
        part._batches = [[_select(self.teacher(name), is_kept_N) for name in self._names]]
        part._rows = [self.rows().part(is_kept_N)]
        return part

    def teacher(self, name: str) -> RowStats:
        """Return statistics (G, N) of one teacher over all batches."""
        number = self._names.index(name)
        return RowStats.cat([batch[number] for batch in self._batches])


def _select(table: RowStats, is_kept_N: Tensor) -> RowStats:
    columns = (table.entropy_KN, table.label_logp_KN, table.max_logp_KN)
    return RowStats(*[column_GN[:, is_kept_N] for column_GN in columns])


def fit_temperature(tables: TemperatureTables, teacher: str) -> float:
    """Fit T* = argmin_T mean NLL of softmax(z / T) for one teacher, inside the grid.

    A parabola through the grid's best temperature and its neighbors refines the result.
    """
    label_logp_GN = tables.teacher(teacher).label_logp_KN
    return temperature_of_least_nll(tables.grid, -label_logp_GN.double().mean(1))


def fit_joint_temperatures(
    tables: TemperatureTables, weighting: Weighting, *, num_rounds: int = 5
) -> dict[str, float]:
    """Fit the temperatures of all teachers that minimize the NLL of their linear pool.

    Coordinate descent on the grid from T = 1, so never worse than the uncalibrated teachers. In
    the gradient of -log sum_k w_k P_k(y) each token of a teacher counts by its responsibility, so
    a specialist is calibrated on the rows where it has weight.

    Args:
        tables: the temperature tables of the calibration split.
        weighting: the rule to pool with; its statistics change with the temperatures.
        num_rounds: maximum number of passes over the teachers.
    """
    # Fitted one by one, specialists are softened (T of 1.4 to 1.9) for mistakes off their domain.
    # Fitted jointly they are sharpened a little (0.89), see "Temperatures of specialists" in
    # docs/log.md.
    pool = _PoolOnGrid(tables, weighting)
    raw = min(range(len(tables.grid)), key=lambda g: abs(np.log(tables.grid[g])))
    indices = [raw] * len(tables.names)
    best = float(pool.nll(0, indices)[raw])
    for _ in range(num_rounds):
        before = best
        for number in range(len(indices)):
            nll_G = pool.nll(number, indices)
            index = int(nll_G.argmin())
            if nll_G[index] < best - MIN_GAIN:
                best, indices[number] = float(nll_G[index]), index
        if best == before:
            break
    return {name: tables.grid[g] for name, g in zip(tables.names, indices, strict=True)}


class _PoolOnGrid:
    """Mean NLL of the linear pool as a function of one grid index per teacher."""

    def __init__(self, tables: TemperatureTables, weighting: Weighting) -> None:
        self._names = tables.names
        self._weighting = weighting
        self._rows = tables.rows()
        self._tables = [tables.teacher(name) for name in self._names]
        self._score_KGN = [
            self._streaming_scores(name, table)
            for name, table in zip(self._names, self._tables, strict=True)
            if weighting.streams
        ]

    def _streaming_scores(self, name: str, table: RowStats) -> Tensor:
        """Score (G, N) of one teacher under a streaming rule, at every temperature."""
        # Scores of a streaming rule do not depend on other teachers: the grid has K * G of them,
        # not G ** K. The temperature takes the place of the teacher's axis.
        return self._weighting.log_scores(table, self._rows, [name] * len(table.entropy_KN))[0]

    def nll(self, number: int, indices: Sequence[int]) -> Tensor:
        """Return (G,) nats per row: teacher `number` at each temperature, k at indices[k]."""
        if not self._weighting.streams:
            grid = range(len(self._tables[number].entropy_KN))
            trials = [[*indices[:number], g, *indices[number + 1 :]] for g in grid]
            return torch.stack([self._nll_at(trial) for trial in trials])
        table = self._tables[number]
        score_GN = self._score_KGN[number]
        total_GN = score_GN
        label_GN = score_GN + table.label_logp_KN.double()
        # The other teachers contribute the same at every temperature of this one.
        for other, g in enumerate(indices):
            if other == number:
                continue
            score_N = self._score_KGN[other][g]
            label_logp_N = self._tables[other].label_logp_KN[g].double()
            total_GN = torch.logaddexp(total_GN, score_N)
            label_GN = torch.logaddexp(label_GN, score_N + label_logp_N)
        return (total_GN - label_GN).mean(1)

    def _nll_at(self, indices: Sequence[int]) -> Tensor:
        stats = RowStats.stack(
            [
                RowStats(table.entropy_KN[g], table.label_logp_KN[g], table.max_logp_KN[g])
                for table, g in zip(self._tables, indices, strict=True)
            ]
        )
        return linear_pool_nll(stats, self._weighting, self._rows, self._names).mean()


def linear_pool_nll(
    stats: RowStats, weighting: Weighting, rows: Rows, teachers: Sequence[str]
) -> Tensor:
    """Compute -log sum_k w_k P_k(y) at every row from scalars: (N,) float64 nats.

    Args:
        stats: (K, N) each, of the calibrated teachers.
        weighting: the rule that sets the weights.
        rows: all N rows; document numbers must be unique across concatenated batches.
        teachers: names in the order of `stats`.
    """
    score_KN, _ = weighting.log_scores(stats, rows, teachers)
    return _pool_nll(score_KN, stats.label_logp_KN)


def _pool_nll(score_KN: Tensor, label_logp_KN: Tensor) -> Tensor:
    # Scores are unnormalized log-weights, so take the difference of two logsumexps.
    total_N = torch.logsumexp(score_KN, dim=0)
    return total_N - torch.logsumexp(score_KN + label_logp_KN.double(), dim=0)


def temperature_of_least_nll(grid: Sequence[float], nll_G: Tensor) -> float:
    """Return the temperature of lowest NLL: vertex of a parabola in log T through three points."""
    best = int(nll_G.argmin())
    if best in (0, len(grid) - 1):
        return grid[best]
    log_grid = np.log(np.asarray(grid[best - 1 : best + 2]))
    square, linear, _ = np.polyfit(log_grid - log_grid[1], nll_G[best - 1 : best + 2].numpy(), 2)
    # Not convex at the minimum, as for a flat teacher: there is no vertex to move to.
    if square <= 0:
        return grid[best]
    vertex = log_grid[1] - linear / (2 * square)
    return float(np.exp(np.clip(vertex, log_grid[0], log_grid[2])))
