"""Cross-entropy and forward KL to a target that names a few tokens per row.

Shapes: n rows of one block, V vocabulary, E entries of all rows.

One log-softmax serves all terms, and one gather reads labels and entries: at the price of plain cross-entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from collegium.losses.divergences import LOG_FLOOR
from collegium.types import SparseRows

TAIL_FLOOR = 1e-6
"""Least mass of the student's tail: float32 log-probabilities say nothing of less. Its gradient stays alive below."""


def sparse_terms(
    student_logp_nV: Tensor, labels_n: Tensor, target: SparseRows
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and KL(t || q) of each row: two (n,) tensors in nats.

    CE = -log q_label. KL = sum_i t_i (log t_i - log q_i) over the named tokens, and, where the target has a tail, one
    more such summand with q_tail = 1 - sum_i q_i. Its gradient at the student's logits is, without a tail, q - t.

    Args:
        student_logp_nV: (n, V) normalized log-probabilities.
        labels_n: (n,) tokens.
        target: n rows; moved to the student's device and type.

    Source: Anshumann et al. 2025, arXiv 2503.16870; the bucket is its ghost token.
    """
    num_rows, vocab_size = student_logp_nV.shape
    row_E = target.row_of_entry()
    flat_M = torch.cat(
        [
            torch.arange(num_rows, device=labels_n.device) * vocab_size + labels_n,
            row_E * vocab_size + target.ids,
        ]
    )
    picked_M = student_logp_nV.flatten().index_select(0, flat_M)
    label_logp_n, logq_E = picked_M[:num_rows], picked_M[num_rows:]
    logt_E = target.logp.to(logq_E.dtype)
    kl_n = _row_sums(logt_E.exp() * (logt_E - logq_E), row_E, num_rows)
    if target.log_tail is not None:
        kl_n = kl_n + _tail_term(target.log_tail.to(logq_E.dtype), logq_E, row_E)
    return -label_logp_n, kl_n


def _tail_term(log_tail_n: Tensor, logq_E: Tensor, row_E: Tensor) -> Tensor:
    """t_tail (log t_tail - log q_tail), with q_tail = 1 - exp(logsumexp of the kept ones)."""
    num_rows = len(log_tail_n)
    with torch.no_grad():
        most_n = logq_E.new_full((num_rows,), -torch.inf).scatter_reduce(0, row_E, logq_E, "amax")
    scaled_n = _row_sums((logq_E - most_n[row_E]).exp(), row_E, num_rows)
    rest_n = -torch.expm1(most_n + scaled_n.log())
    # The value stays above the floor, the gradient is that of the rest itself: a tail too small is still pulled up.
    rest_n = rest_n + (TAIL_FLOOR - rest_n).clamp(min=0.0).detach()
    return log_tail_n.exp() * (log_tail_n.clamp(min=LOG_FLOOR) - rest_n.log())


def _row_sums(values_E: Tensor, row_E: Tensor, num_rows: int) -> Tensor:
    """(E,) -> (n,) sums over the entries of each row."""
    return values_E.new_zeros(num_rows).index_add(0, row_E, values_E)
