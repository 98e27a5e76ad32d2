"""Forward KL to a target that names a few tokens per row, and its gradient.

Shapes: n rows of one block, V vocabulary, E entries of all rows.

The student is read at the entries alone: one gather beside the log-sum that cross-entropy needs anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collegium.losses.divergences import LOG_FLOOR
from collegium.types import SparseRows

TAIL_FLOOR = 1e-6
"""Least mass of the student's tail: float32 log-probabilities say nothing of less. Its gradient stays alive below."""


def sparse_kl(logq_E: Tensor, row_E: Tensor, target: SparseRows) -> tuple[Tensor, Tensor]:
    """KL(t || q) of each row in nats, (n,), and its gradient at `logq_E`, (E,).

    KL = sum_i t_i (log t_i - log q_i) over the named tokens, and, where the target has a tail, one more such summand with
    q_tail = 1 - sum_i q_i. The gradient is -t_i, and with a tail -t_i + q_i t_tail / q_tail.

    Args:
        logq_E: log-probabilities of the student at the entries.
        row_E: the row that owns each entry.
        target: n rows.

    Source: Anshumann et al. 2025, arXiv 2503.16870; the bucket is its ghost token.
    """
    num_rows = len(target)
    logt_E = target.logp.to(logq_E.dtype)
    t_E = logt_E.exp()
    kl_n = row_sums(t_E * (logt_E - logq_E), row_E, num_rows)
    if target.log_tail is None:
        return kl_n, -t_E
    log_tail_n = target.log_tail.to(logq_E.dtype)
    most_n = logq_E.new_full((num_rows,), -torch.inf).scatter_reduce(0, row_E, logq_E, "amax")
    scaled_n = row_sums((logq_E - most_n[row_E]).exp(), row_E, num_rows)
    # The value stays above the floor, and so does the gradient: a tail too small is still pulled up.
    rest_n = (-torch.expm1(most_n + scaled_n.log())).clamp(min=TAIL_FLOOR)
    tail_n = log_tail_n.exp()
    kl_n = kl_n + tail_n * (log_tail_n.clamp(min=LOG_FLOOR) - rest_n.log())
    return kl_n, logq_E.exp() * (tail_n / rest_n)[row_E] - t_E


def row_sums(values_E: Tensor, row_E: Tensor, num_rows: int) -> Tensor:
    """(E,) -> (n,) sums over the entries of each row."""
    return values_E.new_zeros(num_rows).index_add(0, row_E, values_E)
