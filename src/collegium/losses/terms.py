"""Loss terms over the vocabulary at one block of rows, with their gradient at the head's product.

Shapes: n rows of one block, V vocabulary, E entries of a named target, S tokens of its support.

Forward KL and cross-entropy have closed forms: with Q = softmax(z), the gradient of KL(P || Q) at
z is Q sum_v P - P, and that of CE is Q - onehot(label). Other divergences are differentiated by
autograd on their support. A named target reads log q at E entries only: if g_e is the gradient
there, that at z is the g_e at their places minus Q times their sum over the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from collegium.distributions import NamedRows
from collegium.kernels.rows import DenseTarget, LogSumExp, RawRows, RowKernels
from collegium.losses.divergences import LOG_FLOOR, Divergence, ForwardKL

TRUTH = "truth"
"""Term of the labels that replace contradicting teachers; without such a row it has no gradient."""
TAIL_FLOOR = 1e-6
"""Smallest mass of the student's tail: float32 log-probabilities resolve no less."""


def softened_(
    target: DenseTarget, temperature: float, kernels: RowKernels, *, to_logp: bool
) -> DenseTarget:
    """P^(1/T), renormalized, as log-probabilities or in a form for forward KL; overwrites P.

    A target at this temperature is softened already.
    """
    if temperature != 1.0 and target.temperature == temperature:
        return target
    if not to_logp:
        if temperature == 1.0:
            return target
        rows = RawRows(target.logp_().div_(temperature))
        return DenseTarget(rows, "logits", kernels.read(rows)[0], temperature)
    logp_nV = target.logp_()
    if temperature != 1.0:
        logp_nV = (logp_nV / temperature).log_softmax(-1)
    return DenseTarget(RawRows(logp_nV), "logp", temperature=temperature)


@dataclass(frozen=True, slots=True)
class BlockLosses:
    """The terms of n rows: divergences by name, and others, which are cross-entropies.

    A term of name i is f_n D(P^(1/T), softmax(z / T)) or -f_n log softmax(z)_label, with its own
    factor f, temperature T and divergence D.
    """

    labels_n: Tensor
    target: DenseTarget | NamedRows | None
    """P, as returned by `softened_` for a single divergence; None for labels only."""
    kernels: RowKernels
    divergences: Mapping[str, tuple[Divergence, float]]
    """Divergence and temperature of each term that reads the target."""
    factors: Mapping[str, Tensor] = field(default_factory=dict)
    """(n,) f of each term that has some; 1 for all others."""
    with_gradient: bool = True
    """False leaves gradients undefined, as under `torch.inference_mode`, which has no autograd."""

    def terms_(self, rows: RawRows, weights: dict[str, float]) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the (n,) terms with a weight, and the gradient of their weighted sum.

        The gradient is taken at the head's product and may overwrite the rows.
        """
        labels_n, read = self.labels_n, [name for name in weights if name in self.divergences]
        needs_labels = len(read) < len(weights)
        if not needs_labels:
            # Labels outside of the vocabulary raise an error only where a term reads them.
            labels_n = torch.zeros_like(labels_n)
        if isinstance(self.target, DenseTarget) and not has_closed_form(self.divergences):
            return self._autograd(rows, weights, labels_n)
        ones_n = torch.ones_like(labels_n, dtype=rows.dtype)
        factors = {name: self.factors.get(name, ones_n).to(rows.dtype) for name in weights}
        ce_n = torch.zeros_like(ones_n)
        for name in (name for name in weights if name not in read):
            ce_n = ce_n + weights[name] * factors[name]
        kd_n = {name: weights[name] * factors[name] for name in read}
        z_label_n, slope_n = rows.at_labels(labels_n)
        if isinstance(self.target, NamedRows):
            logsumexp, values = self._named_(rows, self.target, kd_n, ce_n)
        else:
            target = None if self.target is None or not read else self.target.to(rows.dtype)
            share_n = kd_n[read[0]] if read else torch.zeros_like(ones_n)
            logsumexp, value_n = self.kernels.distill_(rows, target, share_n, ce_n)
            values = dict.fromkeys(read, value_n)
        if needs_labels:
            missing_n = (-ce_n * slope_n).to(rows.values_nV.dtype)
            rows.values_nV.scatter_add_(1, labels_n[:, None], missing_n[:, None])
        label_n = -logsumexp.logp(z_label_n)
        terms = {name: self._term(name, values.get(name, label_n)) for name in weights}
        return terms, rows.values_nV

    def _term(self, name: str, value_n: Tensor) -> Tensor:
        """The value of a term, times its factor."""
        factor_n = self.factors.get(name)
        return value_n if factor_n is None else factor_n.to(value_n.dtype) * value_n

    def _named_(
        self, rows: RawRows, target: NamedRows, kd_n: Mapping[str, Tensor], ce_n: Tensor
    ) -> tuple[LogSumExp, dict[str, Tensor]]:
        """Closed form or autograd at the named entries: logsumexp and (n,) values by term."""
        num_rows, row_E = len(target), target.row_of_entry()
        z_E, slope_E = rows.at(row_E, target.ids)
        are_kl = [isinstance(self.divergences[name][0], ForwardKL) for name in kd_n]
        is_one_sweep = all(are_kl) and target.log_tail is None
        if is_one_sweep:
            # The pull of the entries does not depend on the student, as for labels only.
            pull_n = row_sums(target.logp.to(rows.dtype).exp(), row_E, num_rows)
            share_n = sum(kd_n.values(), start=torch.zeros_like(ce_n))
            logsumexp, _ = self.kernels.distill_(rows, None, share_n, ce_n + share_n * pull_n)
        else:
            logsumexp, _ = self.kernels.read(rows)
        logq_E = LogSumExp(logsumexp.max_n[row_E], logsumexp.log_sum_n[row_E]).logp(z_E)
        grad_E, values = torch.zeros_like(logq_E), dict[str, Tensor]()
        for (name, share_n), is_kl in zip(kd_n.items(), are_kl, strict=True):
            if is_kl:
                values[name], slope_of_kd_E = named_kl(logq_E, row_E, target)
            else:
                values[name], slope_of_kd_E = self._named_divergence(name, logq_E, row_E, target)
            grad_E += slope_of_kd_E * share_n[row_E]
        if not is_one_sweep:
            self.kernels.softmax_(rows, logsumexp, ce_n - row_sums(grad_E, row_E, num_rows))
        rows.add_at_(row_E, target.ids, grad_E * slope_E)
        return logsumexp, values

    def _named_divergence(
        self, name: str, logq_E: Tensor, row_E: Tensor, target: NamedRows
    ) -> tuple[Tensor, Tensor]:
        """Any divergence on the named tokens and the tail: (n,) values and the (E,) gradient.

        The support has S = largest number of entries + 1 tokens; the last one is the tail.
        """
        num_rows, starts = len(target), target.starts
        place_E = torch.arange(len(row_E), device=row_E.device) - starts[row_E]
        width = int(starts.diff().max()) if num_rows else 0
        target_nS = logq_E.new_full((num_rows, width + 1), LOG_FLOOR)
        target_nS[row_E, place_E] = target.logp.to(logq_E.dtype)
        if target.log_tail is not None:
            target_nS[:, width] = target.log_tail.to(logq_E.dtype)

        logq_E, grad_E = logq_E.detach(), torch.zeros_like(logq_E)
        with torch.set_grad_enabled(self.with_gradient):
            logq_E.requires_grad_(self.with_gradient)
            student_nS = logq_E.new_full((num_rows, width), LOG_FLOOR)
            student_nS = student_nS.index_put((row_E, place_E), logq_E)
            rest_n = _tail_mass(logq_E, row_E, num_rows)
            # The floor bounds the value; the gradient passes through it.
            rest_n = rest_n + (rest_n.clamp(min=TAIL_FLOOR) - rest_n).detach()
            # A row that names every token has no tail, not one at the floor.
            log_rest_n = torch.where(starts.diff() < target.vocab_size, rest_n.log(), LOG_FLOOR)
            student_nS = torch.cat([student_nS, log_rest_n[:, None]], 1)
            value_n = self.divergences[name][0](target_nS, student_nS)
            if self.with_gradient:
                grad_E = torch.autograd.grad(value_n.sum(), logq_E)[0]
        return value_n.detach(), grad_E

    def _autograd(
        self, rows: RawRows, weights: Mapping[str, float], labels_n: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """All terms by autograd, one divergence after the other to bound the memory."""
        read = [name for name in weights if name in self.divergences]
        labeled = [name for name in weights if name not in self.divergences]
        terms, gradient_nV = dict.fromkeys(weights, labels_n), rows.values_nV.detach()
        for number in range(max(len(read), 1)):
            names = read[number : number + 1] + (labeled if number == 0 else [])
            raw_nV = rows.values_nV.detach()
            with torch.set_grad_enabled(self.with_gradient):
                raw_nV = raw_nV.requires_grad_(self.with_gradient)
                values = self._values(replace(rows, values_nV=raw_nV), names, labels_n)
                total = raw_nV.new_zeros((), dtype=rows.dtype)
                for name in names:
                    total = total + weights[name] * values[name].sum(dtype=rows.dtype)
                if self.with_gradient:
                    (slope_nV,) = torch.autograd.grad(total, raw_nV)
                    gradient_nV = slope_nV if number == 0 else gradient_nV.add_(slope_nV)
                    del slope_nV  # freed before the next divergence
            terms |= {name: value_n.detach() for name, value_n in values.items()}
        return terms, gradient_nV

    def _values(self, rows: RawRows, names: Sequence[str], labels_n: Tensor) -> dict[str, Tensor]:
        """(n,) terms on a full target, with a graph."""
        assert isinstance(self.target, DenseTarget)
        logits_nV = rows.logits()
        logq_nV = logits_nV.log_softmax(-1)
        label_n, values = -logq_nV.gather(1, labels_n[:, None])[:, 0], dict[str, Tensor]()
        for name in names:
            values[name] = label_n
            if name in self.divergences:
                divergence, temperature = self.divergences[name]
                target_nV = self.target.rows.values_nV.to(rows.dtype)
                if temperature != self.target.temperature:
                    target_nV = (target_nV / temperature).log_softmax(-1)
                student_nV = logq_nV
                if temperature != 1.0:
                    student_nV = (logits_nV / temperature).log_softmax(-1)
                values[name] = divergence(target_nV, student_nV)
        return {name: self._term(name, value_n) for name, value_n in values.items()}


def has_closed_form(divergences: Mapping[str, tuple[Divergence, float]]) -> bool:
    """Whether the gradient of these terms on a full target is in closed form."""
    return len(divergences) <= 1 and all(
        isinstance(divergence, ForwardKL) for divergence, _ in divergences.values()
    )


def named_kl(logq_E: Tensor, row_E: Tensor, target: NamedRows) -> tuple[Tensor, Tensor]:
    """KL(t || q) of each row in nats, (n,), and its gradient at `logq_E`, (E,).

    KL = sum_i t_i (log t_i - log q_i) over the named tokens, and, where the target has a tail, one
    more summand with q_tail = 1 - sum_i q_i. The gradient is -t_i, and with a tail
    -t_i + q_i t_tail / q_tail. `row_E` is the row that owns each entry.

    Source: Anshumann et al. 2025, arXiv 2503.16870. The tail is its ghost token.
    """
    num_rows = len(target)
    logt_E = target.logp.to(logq_E.dtype)
    t_E = logt_E.exp()
    kl_n = row_sums(t_E * (logt_E - logq_E), row_E, num_rows)
    if target.log_tail is None:
        return kl_n, -t_E
    log_tail_n = target.log_tail.to(logq_E.dtype)
    # The value stays above the floor, and so does the gradient: a small tail is still pulled up.
    rest_n = _tail_mass(logq_E, row_E, num_rows).clamp(min=TAIL_FLOOR)
    tail_n = log_tail_n.exp()
    kl_n = kl_n + tail_n * (log_tail_n.clamp(min=LOG_FLOOR) - rest_n.log())
    return kl_n, logq_E.exp() * (tail_n / rest_n)[row_E] - t_E


def _tail_mass(logq_E: Tensor, row_E: Tensor, num_rows: int) -> Tensor:
    """(n,) 1 - sum_i q_i, without cancellation where one token has nearly all the mass."""
    max_n = logq_E.detach().new_full((num_rows,), -torch.inf)
    max_n = max_n.scatter_reduce(0, row_E, logq_E.detach(), "amax")
    scaled_n = row_sums((logq_E - max_n[row_E]).exp(), row_E, num_rows)
    return -torch.expm1(max_n + scaled_n.log())


def row_sums(values_E: Tensor, row_E: Tensor, num_rows: int) -> Tensor:
    """Sum (E,) values over the entries of each row: (n,)."""
    return values_E.new_zeros(num_rows).index_add(0, row_E, values_E)
