"""A learned gate: weights from the entropy, confidence, consensus and past errors of the teachers.

Shapes: N rows, K teachers, F features, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

from collegium.fusion.rules import PrefixLikelihood
from collegium.fusion.weighting import CalibrationData, FittedWeighting, RowStats
from collegium.options import Tensor, option, torch
from collegium.types import Rows

DIGITS = 6
"""Decimals of a fitted option."""
FEATURES = ("entropy", "max_logp", "consensus", "prefix_nll")
"""Options of a gate that weight its features, in the order of the axis F."""
MAX_STEPS = 100
"""Newton steps of a fit."""


@option
class Gate(FittedWeighting):
    """A learned gate: w_k = softmax_k(a_k + b . f_k), with K + 4 fitted parameters.

    f_k = [H_k, max_v log P_k(v), KL(P_k || Pbar), sum_{s<t} decay^(t-s) NLL_k(s)] in nats, each
    centered over the teachers. Pbar is the mean of all teachers, and the sum runs over the
    earlier rows of the document. Causal: a row's label never enters its own weight. Each head is
    applied three times, or twice where b of the divergence is 0.
    """

    # On specialists: 5.08 nats, as with domain weights, but without domain labels.
    offsets: dict[str, float]
    """a_k by teacher name. Only their differences matter."""
    entropy: float = 0.0
    """b of the entropy."""
    max_logp: float = 0.0
    """b of the log-probability of the most likely token."""
    consensus: float = 0.0
    """b of the divergence from the mean of all teachers."""
    prefix_nll: float = 0.0
    """b of the decayed NLL of the document's earlier rows."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Decay factor of a row's NLL per row of age."""

    @property
    def needs_consensus(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.consensus != 0.0

    @property
    def reads_prefix(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.prefix_nll != 0.0

    def teacher_tables(self) -> Mapping[tuple[str, ...], Mapping[str, object]]:
        return {("offsets",): self.offsets}

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        has_consensus = self.needs_consensus
        feature_KNF = gate_features(stats, rows, decay=self.decay, with_consensus=has_consensus)
        b_F = feature_KNF.new_tensor([getattr(self, name) for name in FEATURES])
        a_K = feature_KNF.new_tensor([self.offsets[teacher] for teacher in teachers])
        return feature_KNF @ b_F + a_K[:, None]

    @classmethod
    def fit(cls, data: CalibrationData, *, decay: float = 0.9, ridge: float = 1e-3) -> Gate:
        """Fit the gate: argmax mean_t log sum_k w_tk P_k(y_t) - ridge / 2 * |(a, s b)|^2.

        w_tk = softmax_k(a_k + b . f_tk), and s_f is the spread of feature f, so the ridge treats
        all features alike. With the posterior q_tk = w_tk P_k(y_t) / sum_j w_tj P_j(y_t), the
        gradient in the score of teacher k is q_tk - w_tk. Newton's method from zero in float64 with
        the Hessian E_q[xx'] - E_q[x]E_q[x]' - (E_w[xx'] - E_w[x]E_w[x]') and step halving. It is
        deterministic, and never worse than uniform weights on these rows.

        The raw teachers are read, since only they have a consensus. It is no feature without one.

        Source: Jordan and Jacobs 1994, hierarchical mixtures of experts, with fixed experts.
        """
        stats, teachers = data.raw, data.teachers
        has_consensus = stats.consensus_kl_KN is not None
        feature_KNF = gate_features(stats, data.rows, decay=decay, with_consensus=has_consensus)
        spread_F = feature_KNF.square().mean((0, 1)).sqrt()
        # A constant feature gets scale 0, so its coefficient is exactly 0.
        scale_F = torch.where(spread_F < 1e-9, 0.0, 1.0 / spread_F)
        offset_KNK = torch.eye(len(teachers)).to(feature_KNF)[:, None]
        offset_KNK = offset_KNK.expand(-1, len(data.rows), -1)
        input_KNP = torch.cat([offset_KNK, feature_KNF * scale_F], dim=-1)
        theta_P = _ascend(input_KNP, stats.label_logp_KN.double(), ridge)
        offset_K, b_F = theta_P[: len(teachers)], theta_P[len(teachers) :] * scale_F
        # Only differences of the offsets matter, so they are centered.
        offset_K = offset_K - offset_K.mean()
        return cls(offsets=named(offset_K, teachers), decay=decay, **named(b_F, FEATURES))


def named(value_K: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Map names to fitted values, rounded for a recipe."""
    return {name: round(x, DIGITS) for name, x in zip(names, value_K.tolist(), strict=True)}


def gate_features(stats: RowStats, rows: Rows, *, decay: float, with_consensus: bool) -> Tensor:
    """Compute the four features of `Gate`: (K, N, 4) float64 nats, centered over the teachers.

    Without the consensus, its column is 0.

    Raises:
        ValueError: the statistics lack the divergence from the consensus.
    """
    # At eta 1 that rule scores the negative prefix NLL. It reads no teacher names.
    prefix_KN = PrefixLikelihood(eta=1.0, decay=decay).log_scores(stats, rows, [])
    kl_KN = stats.consensus_kl() if with_consensus else torch.zeros_like(prefix_KN)
    columns = (stats.entropy_KN.double(), stats.max_logp_KN.double(), kl_KN.double(), -prefix_KN)
    feature_KNF = torch.stack(columns, dim=-1)
    return feature_KNF - feature_KNF.mean(0)


def _ascend(input_KNP: Tensor, label_logp_KN: Tensor, ridge: float) -> Tensor:
    """Maximize the penalized likelihood of a gate by Newton's method with step halving."""
    num_rows, num_parameters = input_KNP.shape[1:]

    def value(theta_P: Tensor) -> Tensor:
        logw_KN = (input_KNP @ theta_P).log_softmax(0)
        mean = (logw_KN + label_logp_KN).logsumexp(0).mean()
        return mean - 0.5 * ridge * theta_P.square().sum()

    def covariance(prob_KN: Tensor) -> Tensor:
        """Of the inputs over the teachers, averaged over the rows."""
        second_PP = torch.einsum("kn,knp,knq->pq", prob_KN, input_KNP, input_KNP)
        mean_NP = torch.einsum("kn,knp->np", prob_KN, input_KNP)
        return (second_PP - mean_NP.T @ mean_NP) / num_rows

    theta_P = torch.zeros(num_parameters, dtype=torch.float64)
    ridge_PP = ridge * torch.eye(num_parameters).to(theta_P)
    best = value(theta_P)
    for _ in range(MAX_STEPS):
        logw_KN = (input_KNP @ theta_P).log_softmax(0)
        weight_KN, posterior_KN = logw_KN.exp(), (logw_KN + label_logp_KN).softmax(0)
        gradient_P = torch.einsum("kn,knp->p", posterior_KN - weight_KN, input_KNP) / num_rows
        gradient_P -= ridge * theta_P
        if gradient_P.abs().max() < 1e-9:
            break
        # The posterior's covariance is convex. Where it makes the Hessian indefinite, a Newton
        # step need not ascend, so only the concave part is used.
        concave_PP = -covariance(weight_KN) - ridge_PP
        curvature_PP = concave_PP + covariance(posterior_KN)
        if torch.linalg.eigvalsh(curvature_PP).max() >= -1e-8:
            curvature_PP = concave_PP
        step_P = -torch.linalg.solve(curvature_PP, gradient_P)
        for halving in range(40):
            trial_P = theta_P + 0.5**halving * step_P
            trial = value(trial_P)
            if trial > best:
                theta_P, best = trial_P, trial
                break
        else:
            break
    return theta_P
