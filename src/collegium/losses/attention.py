"""Attention and relation losses, document by document under a causal mask.

Shapes: N rows, M positions of a batch, n rows and l positions of one document, H heads of queries,
J heads of keys and values, d width of a head, R relation heads, w width of all heads together.

A row n is the position t of its document, and is compared at all positions s <= t. Positions of
prompts, which are no rows, are among the s. Nothing is computed across the border of a document, so
that packed documents give the values of single ones. The cost is O(l^2) per head and document.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from collegium.distributions import Answer, HiddenRows
from collegium.errors import RecipeError, TrainingError
from collegium.losses.states import StateLoss
from collegium.types import AttentionStates, Rows


class DocumentLoss(StateLoss):
    """A term on the attention of paired layers, computed per document."""

    def tap(self, layer: str) -> str:
        return layer.replace("layer_", "attention_")

    def pair_values(
        self, teacher: int, student: HiddenRows, answer: Answer, rows: Rows
    ) -> list[Tensor]:
        values = []
        for ours, theirs in self.pairs[answer.name]:
            if self.tap(theirs) not in answer.attention:
                raise TrainingError(
                    f"{self.name}/{answer.name}: the teacher gave no queries, keys and values; "
                    "must be a live model; remove the term"
                )
            left, right = student.attention[self.tap(ours)], answer.attention[self.tap(theirs)]
            documents = [
                self.document_values(left, right, rows.index[part], keys)
                for part, keys in _documents(rows, left.starts)
            ]
            # Without rows the value still has a graph.
            empty = (left.query[:0].sum((1, 2)) + left.value[:0].sum((1, 2))).to(_dtype(left.query))
            values.append(torch.cat([empty, *documents]))
        return values

    @abstractmethod
    def document_values(
        self, ours: AttentionStates, theirs: AttentionStates, rows_n: Tensor, keys: slice
    ) -> Tensor:
        """(n,) values at the positions `rows_n`, compared at the positions `keys`."""


class AttentionLoss(DocumentLoss):
    """Attention terms.

    With scores A(t, s) before the softmax and a(t, s) after it,
    `mse`: mean over heads and over s <= t of (A_student - A_teacher)^2;
    `kl`: mean over heads of KL(a_teacher(t) || a_student(t)).
    Where the numbers of heads differ, A or a is replaced by its mean over the heads.

    Source: TinyBERT, arXiv 1909.10351, for `mse`; MobileBERT, arXiv 2004.02984, for `kl`. Both
    for encoders; here under a causal mask.
    """

    def document_values(
        self, ours: AttentionStates, theirs: AttentionStates, rows_n: Tensor, keys: slice
    ) -> Tensor:
        is_past_nl = _is_past(rows_n, keys)
        left_Hnl, right_Hnl = (_scores(states, rows_n, keys) for states in (ours, theirs))
        right_Hnl = right_Hnl.detach().to(left_Hnl.dtype)
        has_heads = len(left_Hnl) == len(right_Hnl)
        if self.options.loss == "mse":
            if not has_heads:
                left_Hnl, right_Hnl = left_Hnl.mean(0), right_Hnl.mean(0)
            square_Hnl = (left_Hnl - right_Hnl).square() * is_past_nl
            value_Hn = square_Hnl.sum(-1) / is_past_nl.sum(-1)
        else:
            left_Hnl, right_Hnl = (_log_softmax(x, is_past_nl) for x in (left_Hnl, right_Hnl))
            if not has_heads:
                left_Hnl, right_Hnl = (_log_mean(x) for x in (left_Hnl, right_Hnl))
            value_Hn = _kl(right_Hnl, left_Hnl, is_past_nl)
        return value_Hn if value_Hn.dim() == 1 else value_Hn.mean(0)


class RelationLoss(DocumentLoss):
    """Relation terms.

    For each of queries, keys and values, the heads are joined to vectors a of width w and split
    into R relation heads. With r(t) = softmax over s <= t of a_t a_s / sqrt(w / R), the term is the
    mean over relations and relation heads of KL(r_teacher(t) || r_student(t)). The widths of the
    two models may differ.

    Source: MiniLMv2, arXiv 2012.15828, under a causal mask, with rotated queries and keys.
    """

    def document_values(
        self, ours: AttentionStates, theirs: AttentionStates, rows_n: Tensor, keys: slice
    ) -> Tensor:
        is_past_nl = _is_past(rows_n, keys)
        values = []
        for kind in self.options.relations:
            left_MHd, right_MHd = getattr(ours, kind), getattr(theirs, kind).detach()
            num_heads = self.options.num_heads or math.gcd(left_MHd.shape[1], right_MHd.shape[1])
            left_Rnl, right_Rnl = (
                _log_softmax(_relations(x, rows_n, keys, num_heads), is_past_nl)
                for x in (left_MHd, right_MHd)
            )
            values.append(_kl(right_Rnl.to(left_Rnl.dtype), left_Rnl, is_past_nl).mean(0))
        return torch.stack(values).mean(0)


def _documents(rows: Rows, starts_M: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the rows of each document, and its positions up to its last row."""
    if len(rows) == 0:
        return
    changes = rows.documents.diff().nonzero()[:, 0] + 1
    first = torch.cat([changes.new_zeros(1), changes])
    last = torch.cat([changes, changes.new_full((1,), len(rows))]) - 1
    bounds = torch.stack([first, last, starts_M[rows.index[first]], rows.index[last]])
    for row, last_row, key, last_key in bounds.T.tolist():
        yield slice(row, last_row + 1), slice(key, last_key + 1)


def _is_past(rows_n: Tensor, keys: slice) -> Tensor:
    """(n, l) bool: s <= t."""
    places_l = torch.arange(keys.start, keys.stop, device=rows_n.device)
    return places_l <= rows_n[:, None]


def _dtype(states: Tensor) -> torch.dtype:
    return torch.promote_types(states.dtype, torch.float32)


def _scores(states: AttentionStates, rows_n: Tensor, keys: slice) -> Tensor:
    """(H, n, l) scores before the softmax."""
    dtype = _dtype(states.query)
    query_nHd, key_lJd = states.query[rows_n].to(dtype), states.key[keys].to(dtype)
    groups = query_nHd.shape[1] // key_lJd.shape[1]
    key_lHd = key_lJd.repeat_interleave(groups, dim=1)
    score_Hnl = torch.einsum("nhd,lhd->hnl", query_nHd, key_lHd) * states.scale
    if states.softcap is not None:
        score_Hnl = states.softcap * torch.tanh(score_Hnl / states.softcap)
    return score_Hnl


def _relations(states_MHd: Tensor, rows_n: Tensor, keys: slice, num_heads: int) -> Tensor:
    """(R, n, l) scaled products of the vectors at rows and keys.

    Raises:
        RecipeError: the width of the vectors is no multiple of the number of relation heads.
    """
    width = states_MHd[0].numel() if len(states_MHd) else num_heads
    if width % num_heads:
        raise RecipeError(
            f"relations.num_heads: got {num_heads}; must divide {width}, the width of all heads of "
            "a model together; omit it, or choose a common divisor"
        )
    dtype = _dtype(states_MHd)
    row_nRd, key_lRd = (
        states_MHd[at].to(dtype).flatten(1).unflatten(1, (num_heads, -1)) for at in (rows_n, keys)
    )
    return torch.einsum("nrd,lrd->rnl", row_nRd, key_lRd) * (width / num_heads) ** -0.5


def _log_softmax(score_Hnl: Tensor, is_past_nl: Tensor) -> Tensor:
    """log softmax over s <= t, and 0 elsewhere."""
    logp_Hnl = score_Hnl.masked_fill(~is_past_nl, -torch.inf).log_softmax(-1)
    return logp_Hnl.masked_fill(~is_past_nl, 0.0)


def _log_mean(logp_Hnl: Tensor) -> Tensor:
    """Log of the mean probability over heads, (n, l)."""
    return logp_Hnl.logsumexp(0) - math.log(len(logp_Hnl))


def _kl(target_Hnl: Tensor, logp_Hnl: Tensor, is_past_nl: Tensor) -> Tensor:
    """KL(target || p) over s <= t: (..., n, l), (..., n, l) -> (..., n)."""
    return torch.linalg.vecdot(target_Hnl.exp() * is_past_nl, target_Hnl - logp_Hnl)
