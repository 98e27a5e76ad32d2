"""One sparse target out of what a cache keeps of each teacher: any linear pool, with the weights and temperatures of today.

Shapes: N rows of a batch, V vocabulary, K teachers, E stored entries of all rows of one teacher.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from collegium.errors import RecipeError
from collegium.fusion.pooling import Fusion
from collegium.fusion.weights import RowStats
from collegium.types import Rows, SparseRows, StoredRows

MIN_LOG_MASS = -50.0
"""Entries below have no effect on anything in float32, and are left out: the log of no mass at all is no number."""


def fuse_stored(
    fusion: Fusion, names: Sequence[str], stored: Sequence[StoredRows], rows: Rows
) -> tuple[SparseRows, Tensor]:
    """The target t = sum_k w_k t_k of the rows, and the (K, N) weights.

    t_k are the draws of teacher k, re-weighted where it has a temperature (`reweighted`), so E[t] = sum_k w_k P_k: the
    gradient of the forward KL at the student's logits, (sum_v t_v) q - t, is in expectation that of the dense pool. A row of t
    need not sum to 1 where a temperature is not 1.

    Args:
        fusion: a linear pool; `require_linear` says which.
        names: the teachers, in the order of `stored`.
        stored: what the cache keeps of each.
        rows: labels, documents and domains of the rows.

    Raises:
        RecipeError: the fusion is no re-weighting of what is kept.

    Source: Anshumann et al. 2025, arXiv 2503.16870, for one teacher; the linear pool of draws is ours.
    """
    fusion.check(names)
    require_linear(fusion, stored[0].log_z)
    temperatures = [fusion.temperatures.get(name, 1.0) for name in names]
    pairs = list(zip(stored, temperatures, strict=True))
    stats = RowStats.stack([stored_stats(one, value) for one, value in pairs])
    score_KN = fusion.weighting.log_scores(stats, rows, names)[0]
    logw_KN = score_KN.log_softmax(0)
    cells, masses = [], []
    for number, (one, temperature) in enumerate(pairs):
        row_E = one.rows.row_of_entry()
        mass_E = reweighted(one, temperature) + logw_KN[number][row_E].to(one.rows.logp.dtype)
        is_kept_E = mass_E > MIN_LOG_MASS
        cells.append((row_E * one.rows.vocab_size + one.rows.ids)[is_kept_E])
        masses.append(mass_E[is_kept_E].exp())
    target = _merged(torch.cat(cells), torch.cat(masses), len(rows), stored[0].rows.vocab_size)
    return target, logw_KN.exp().to(stats.entropy_KN.dtype)


def stored_stats(stored: StoredRows, temperature: float = 1.0) -> RowStats:
    """Statistics (N,) of one teacher: log P_T(v) = log P(v) / T - log Z_T, and H_T as it was kept."""
    at = _kept(stored, temperature)
    if at == 1.0:
        return RowStats(stored.entropy[at], stored.label_logp_N, stored.max_logp_N)
    log_z_N = stored.log_z[at]
    return RowStats(
        stored.entropy[at], stored.label_logp_N / at - log_z_N, stored.max_logp_N / at - log_z_N
    )


def reweighted(stored: StoredRows, temperature: float) -> Tensor:
    """(E,) log of count / N * P_T(v) / P(v): draws from P that speak for P_T, unbiased and not normalized.

    P_T(v) / P(v) = exp((1/T - 1) log P(v) - log Z_T).
    """
    at = _kept(stored, temperature)
    if at == 1.0:
        return stored.rows.logp
    log_z_E = stored.log_z[at][stored.rows.row_of_entry()]
    return stored.rows.logp + (1.0 / at - 1.0) * stored.logp - log_z_E


def require_linear(fusion: Fusion | str, temperatures: Collection[float]) -> None:
    """Refuse a fusion that draws of single teachers cannot give without bias; `auto` never chooses one.

    Args:
        fusion: of a run with a per-teacher cache.
        temperatures: those that the cache keeps beside 1.

    Raises:
        RecipeError: another pool than the linear one, a temperature after pooling or one that is not kept, a conflict policy, or weights
            that compare whole distributions.
    """
    if not isinstance(fusion, Fusion):
        return
    wanted = "with a per-teacher cache, which holds draws of single teachers; change it, or set cache.kind: fused"
    if fusion.pool != "linear":
        raise RecipeError(f"fusion.pool: got {fusion.pool}; must be linear {wanted}")
    if fusion.pooled_temperature != 1.0:
        value = fusion.pooled_temperature
        raise RecipeError(f"fusion.pooled_temperature: got {value:g}; must be 1 {wanted}")
    if fusion.conflict.is_active:
        name = type(fusion.conflict).__name__
        raise RecipeError(f"fusion.conflict: got {name}; must be left out {wanted}")
    if fusion.weighting.needs_consensus:
        name = type(fusion.weighting).__name__
        raise RecipeError(
            f"fusion.weighting: got {name}, which compares each teacher with the mean of all; must be another rule {wanted}"
        )
    for name, value in fusion.temperatures.items():
        if nearest_kept(value, temperatures) is None:
            kept = ", ".join(f"{one:g}" for one in sorted({1.0, *temperatures}))
            raise RecipeError(
                f"fusion.temperatures.{name}: got {value:g}; must be one that the per-teacher cache keeps ({kept}); add it to "
                "cache.temperatures, or set cache.kind: fused"
            )


def nearest_kept(temperature: float, kept: Collection[float]) -> float | None:
    """The kept temperature that is this one but for rounding; None where there is none."""
    for value in (1.0, *kept):
        if abs(temperature - value) <= 1e-6 * value:
            return value
    return None


def _kept(stored: StoredRows, temperature: float) -> float:
    found = nearest_kept(temperature, stored.log_z)
    assert found is not None  # `require_linear` has looked
    return found


def _merged(cell_E: Tensor, mass_E: Tensor, num_rows: int, vocab_size: int) -> SparseRows:
    """Entries given as row * V + token with their masses, in any order, as rows that name no token twice."""
    cell_M, place_E = torch.unique(cell_E, return_inverse=True)
    mass_M = mass_E.new_zeros(len(cell_M)).index_add_(0, place_E, mass_E)
    row_M = cell_M.div(vocab_size, rounding_mode="floor")
    starts = torch.searchsorted(row_M, torch.arange(num_rows + 1, device=row_M.device))
    return SparseRows(starts, cell_M - row_M * vocab_size, mass_M.log(), None, vocab_size)
