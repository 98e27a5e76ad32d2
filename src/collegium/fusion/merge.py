"""Fuse named answers: draws and top-k distributions that meet on the union of their tokens.

Shapes: N rows, V vocabulary, K teachers, entries of all rows: E of one teacher, M of the union.

Draws are pooled linearly as they are: E[sum_k w_k t_k] = sum_k w_k P_k. Where a teacher is exact
(top k), every teacher is read on the union U of the tokens that any of them names, and outside of
it as one tail: a top-k teacher has tail / (V - k) at each token that it does not name. On U and its
tail every pool of such distributions is exact, since all of them are constant outside of U.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from collegium.distributions import Answer, NamedRows
from collegium.fusion.conflict import Conflict, ConflictBlock, disagreement
from collegium.fusion.options import Fusion
from collegium.fusion.pools import PoolKind, check_coverage, coverage, masked_scores
from collegium.fusion.weighting import RowStats
from collegium.kernels.rows import logp_floor
from collegium.options import Tensor, torch
from collegium.types import Rows

Column = tuple[Tensor, Tensor]
"""Log-probabilities on the union: (M,) of its entries, (N,) of each token outside of it."""

MIN_LOG_MASS = -50.0
"""Entries with less mass have no effect in float32 and are dropped. log 0 has no finite value."""


def merge(
    fusion: Fusion, answers: Sequence[Answer], rows: Rows
) -> tuple[NamedRows, Tensor, ConflictBlock | None]:
    """Pool named answers at all rows.

    Answers hold `NamedRows` at stored temperatures. Draws are pooled linearly, without a conflict
    policy or a rule that compares distributions.

    Returns:
        The fused rows, (K, N) weights, and the measurements of an active conflict policy.

    Raises:
        DataError: no teacher answers a row.

    Source: Anshumann et al. 2025, arXiv 2503.16870, for draws of one teacher.
    """
    weighting, policy = fusion.weighting, fusion.conflict
    check_coverage(answers, rows)
    answered_KN, shared_N = coverage(answers, rows)
    parts = [_Part.of(a, rows, fusion.temperatures.get(a.name, 1.0)) for a in answers]
    stats = RowStats.stack([part.stats for part in parts])
    stats = replace(stats, answered_KN=answered_KN, shared_N=shared_N)
    dtype = stats.entropy_KN.dtype

    def log_weights() -> Tensor:
        """(K, N) float64, normalized over the teachers."""
        score_KN = weighting.log_scores(stats, rows, [answer.name for answer in answers])
        return masked_scores(score_KN, stats).log_softmax(0)

    if all(part.rows.is_sampled for part in parts):
        logw_KN = log_weights()
        return _mean_of_draws(parts, logw_KN, len(rows)), logw_KN.exp().to(dtype), None
    union = _Union.of(parts, rows, with_labels=policy.uses_label)
    if weighting.needs_consensus:
        stats = replace(stats, consensus_kl_KN=union.consensus_kl(stats))
    logw_KN = log_weights()
    block: ConflictBlock | None = None
    if policy.is_active:
        mixture_entropy_N = union.entropy(union.pool("linear", fusion.exponent, logw_KN))
        columns = zip(union.logp_KM, union.log_rest_KN, strict=True)
        entropy_KN = torch.stack([union.entropy(column) for column in columns])
        disagreement_N = disagreement(mixture_entropy_N, entropy_KN, logw_KN.exp().to(dtype))
        changed_KN = policy.scores(logw_KN, stats.label_logp_KN, disagreement_N)
        is_changed_N = (changed_KN != logw_KN).any(0)
        block = ConflictBlock.of(policy, disagreement_N, is_changed_N)
        logw_KN = changed_KN.log_softmax(0)
    pooled = union.pool(fusion.pool, fusion.exponent, logw_KN)
    if block is not None:
        pooled, corrected_N = union.correct(policy, pooled)
        block = block.corrected(corrected_N)
    target = union.named_rows(pooled, is_sampled=any(part.rows.is_sampled for part in parts))
    return target, logw_KN.exp().to(dtype), block


@dataclass(frozen=True, slots=True)
class _Part:
    """One answer at its temperature."""

    rows: NamedRows
    """Of the rows that it answers."""
    row_E: Tensor
    """(E,) row of the batch that owns each entry."""
    at_m: Tensor | None
    """(m,) rows of the batch that it answers; None for all."""
    stats: RowStats
    """(N,) each, 0 at rows without an answer."""

    @classmethod
    def of(cls, answer: Answer, rows: Rows, temperature: float) -> _Part:
        named = answer.distribution
        assert isinstance(named, NamedRows)
        tempered, row_E = named.tempered(temperature), named.row_of_entry()
        at_m = None if answer.rows is None else answer.rows.to(rows.labels.device)
        labels_m = rows.labels if at_m is None else rows.labels[at_m]
        scalars = named.scalars(slice(0, len(named)), temperature)
        scalars = _scalars_of_entries(tempered, labels_m) if scalars is None else scalars
        if at_m is not None:
            row_E = at_m[row_E]
            scalars = [x_m.new_zeros(len(rows)).index_copy(0, at_m, x_m) for x_m in scalars]
        return cls(tempered, row_E, at_m, RowStats(*scalars))


def _scalars_of_entries(named: NamedRows, labels_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, label and maximum log-probability of top-k rows with the tail spread evenly."""
    row_E, rest_n = named.row_of_entry(), named.log_rest()
    prob_E = named.logp.exp()
    # Not `entr`: the logarithm of a probability near 1 would lose the digits that `logp` has.
    entropy_E = torch.where(prob_E > 0, -prob_E * named.logp, 0.0)
    entropy_n = named.logp.new_zeros(len(named)).index_add(0, row_E, entropy_E)
    if named.log_tail is not None:
        tail_n = named.log_tail.exp()
        entropy_n = entropy_n - torch.where(tail_n > 0, tail_n * rest_n, 0.0)
    is_label_E = named.ids == labels_n[row_E]
    label_n = rest_n.clone()
    label_n[row_E[is_label_E]] = named.logp[is_label_E]
    max_n = rest_n.scatter_reduce(0, row_E, named.logp, "amax")
    return entropy_n, label_n, max_n


def _mean_of_draws(parts: Sequence[_Part], logw_KN: Tensor, num_rows: int) -> NamedRows:
    """t = sum_k w_k t_k. A row need not sum to 1 where a temperature is not 1."""
    cells, masses = [], []
    vocab_size = parts[0].rows.vocab_size
    for logw_N, part in zip(logw_KN, parts, strict=True):
        mass_E = part.rows.logp + logw_N[part.row_E].to(part.rows.logp.dtype)
        is_kept_E = mass_E > MIN_LOG_MASS
        cells.append((part.row_E * vocab_size + part.rows.ids)[is_kept_E])
        masses.append(mass_E[is_kept_E].exp())
    mass_E = torch.cat(masses)
    cell_M, place_E = torch.unique(torch.cat(cells), return_inverse=True)
    mass_M = mass_E.new_zeros(len(cell_M)).index_add_(0, place_E, mass_E)
    starts, _, ids_M = _rows_of_cells(cell_M, num_rows, vocab_size)
    return NamedRows(starts, ids_M, mass_M.log(), None, vocab_size, is_sampled=True)


def _rows_of_cells(cell_M: Tensor, num_rows: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted cells row * V + token -> (N + 1,) starts, (M,) rows and (M,) tokens."""
    row_M = cell_M.div(vocab_size, rounding_mode="floor")
    starts = torch.searchsorted(row_M, torch.arange(num_rows + 1, device=row_M.device))
    return starts, row_M, cell_M - row_M * vocab_size


@dataclass(frozen=True, slots=True)
class _Union:
    """Every teacher on the union of the named tokens."""

    starts: Tensor
    ids_M: Tensor
    row_M: Tensor
    num_others_N: Tensor
    """(N,) float64 number of tokens outside of the union."""
    logp_KM: Tensor
    log_rest_KN: Tensor
    """(K, N) log-probability of each token outside of the union."""
    label_M: Tensor
    """(M,) bool: the entry is the label of its row."""
    vocab_size: int

    @classmethod
    def of(cls, parts: Sequence[_Part], rows: Rows, *, with_labels: bool) -> _Union:
        vocab_size, num_rows = parts[0].rows.vocab_size, len(rows)
        cells = [part.row_E * vocab_size + part.rows.ids for part in parts]
        label_N = torch.arange(num_rows, device=rows.labels.device) * vocab_size + rows.labels
        cell_M = torch.unique(torch.cat([*cells, label_N] if with_labels else cells))
        starts, row_M, ids_M = _rows_of_cells(cell_M, num_rows, vocab_size)
        columns, rests = [], []
        for part, cell_E in zip(parts, cells, strict=True):
            rest_N = rest_m = part.rows.log_rest()
            if part.at_m is not None:
                rest_N = rest_m.new_full((num_rows,), -torch.inf).index_copy(0, part.at_m, rest_m)
            column_M = rest_N[row_M]
            column_M[torch.searchsorted(cell_M, cell_E)] = part.rows.logp
            columns.append(column_M.double())
            rests.append(rest_N.double())
        num_others_N = (vocab_size - starts.diff()).double()
        logp_KM, log_rest_KN = torch.stack(columns), torch.stack(rests)
        label_M = ids_M == rows.labels[row_M]
        return cls(starts, ids_M, row_M, num_others_N, logp_KM, log_rest_KN, label_M, vocab_size)

    def pool(self, kind: PoolKind, exponent: float, logw_KN: Tensor) -> Column:
        """The pool of all teachers under normalized log-weights."""
        logw_KM = logw_KN[:, self.row_M]
        if kind == "linear":
            logp_M = (logw_KM + self.logp_KM).logsumexp(0)
            return logp_M, (logw_KN + self.log_rest_KN).logsumexp(0)
        power = 0.0 if kind == "log_linear" else exponent
        logp_M = _power_mean(self.logp_KM, logw_KM, power)
        rest_N = _power_mean(self.log_rest_KN, logw_KN, power)
        tail_N = self._tail(rest_N)
        max_N = tail_N.scatter_reduce(0, self.row_M, logp_M, "amax")
        mass_N = (tail_N - max_N).exp()
        mass_N = mass_N.index_add(0, self.row_M, (logp_M - max_N[self.row_M]).exp())
        log_z_N = max_N + mass_N.log()
        return logp_M - log_z_N[self.row_M], rest_N - log_z_N

    def _tail(self, rest_N: Tensor) -> Tensor:
        """(N,) log of the mass outside of the union."""
        return rest_N + self.num_others_N.log()

    def entropy(self, column: Column) -> Tensor:
        """(N,) nats."""
        logp_M, rest_N = column
        entropy_M = torch.special.entr(logp_M.exp())
        entropy_N = rest_N.new_zeros(len(rest_N)).index_add(0, self.row_M, entropy_M)
        tail_N = self._tail(rest_N).exp()
        return entropy_N - torch.where(tail_N > 0, tail_N * rest_N, 0.0)

    def consensus_kl(self, stats: RowStats) -> Tensor:
        """(K, N) KL(P_k || Pbar), with Pbar the plain mean of the teachers that answer a row."""
        logw_KN = masked_scores(torch.zeros_like(self.log_rest_KN), stats).log_softmax(0)
        mean_M, mean_N = self.pool("linear", 1.0, logw_KN)
        kls = []
        for logp_M, rest_N in zip(self.logp_KM, self.log_rest_KN, strict=True):
            prob_M, tail_N = logp_M.exp(), self._tail(rest_N).exp()
            terms_M = torch.where(prob_M > 0, prob_M * (logp_M - mean_M), 0.0)
            kl_N = torch.where(tail_N > 0, tail_N * (rest_N - mean_N), 0.0)
            kls.append(kl_N.index_add(0, self.row_M, terms_M).clamp(min=0.0))
        return torch.stack(kls).to(stats.entropy_KN.dtype)

    def correct(self, conflict: Conflict, column: Column) -> tuple[Column, Tensor | None]:
        """Apply a policy that changes the finished target, and the (N,) mask of changed rows."""
        logp_M, rest_N = column
        num_rows, width = len(rest_N), int(self.starts.diff().max())
        place_M = torch.arange(len(logp_M), device=logp_M.device) - self.starts[self.row_M]
        padded_NS = logp_M.new_full((num_rows, width + 1), logp_floor(logp_M.dtype))
        padded_NS[self.row_M, place_M] = logp_M
        # One token outside of the union stands for all of them: they are equal.
        padded_NS[:, width] = rest_N.clamp(min=logp_floor(logp_M.dtype))
        column_N = place_M.new_zeros(num_rows)
        column_N[self.row_M[self.label_M]] = place_M[self.label_M]
        changed_N = conflict.correct_(padded_NS, column_N)
        if changed_N is None:
            return column, None
        return (padded_NS[self.row_M, place_M], padded_NS[:, width]), changed_N

    def named_rows(self, column: Column, *, is_sampled: bool) -> NamedRows:
        """The pool in compressed rows, in float32."""
        logp_M, rest_N = column
        logp_M, tail_N = logp_M.float(), self._tail(rest_N).float().clamp(max=0.0)
        return NamedRows(self.starts, self.ids_M, logp_M, tail_N, self.vocab_size, is_sampled)


def _power_mean(logp_KX: Tensor, logw_KX: Tensor, power: float) -> Tensor:
    """Unnormalized (sum_k w_k P_k^r)^(1/r) in log space; prod_k P_k^w_k for r = 0."""
    logp_KX = logp_KX.clamp(min=logp_floor(logp_KX.dtype))
    if power == 0.0:
        return (logw_KX.exp() * logp_KX).sum(0)
    return (logw_KX + power * logp_KX).logsumexp(0) / power
