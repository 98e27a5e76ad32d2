"""Weights fitted on the calibration split: EM weights, domain weights, the route and the gate.

Shapes: N rows of the calibration split, K teachers, F features, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from collegium.fusion.routing import Route
from collegium.fusion.rules import DomainWeights, Gate, gate_features
from collegium.fusion.weights import Fixed, RowStats
from collegium.types import Rows, domain_number

DIGITS = 6
"""Decimals of a fitted weight. A weight that rounds to 0 excludes its teacher."""


def fit_em_weights(
    stats: RowStats,
    teachers: Sequence[str],
    *,
    num_iterations: int = 1000,
    tolerance: float = 1e-10,
) -> Fixed:
    """Fit the constant weights of highest likelihood: argmax_w sum_t log sum_k w_k P_k(y_t).

    The problem is concave. EM from uniform weights: r_tk = w_k P_k(y_t) / sum_j w_j P_j(y_t),
    w_k <- mean_t r_tk. On these rows the pool is never worse than uniform weights or any single
    teacher.

    Args:
        stats: (K, N) each, of the calibrated teachers on the calibration split.
        teachers: names in the order of `stats`.
        num_iterations: maximum number of EM steps.
        tolerance: stop when a step gains less than this many nats per row.

    Raises:
        ValueError: there are no rows.

    Source: Dempster, Laird and Rubin 1977, for mixtures whose components are known.
    """
    # K - 1 degrees of freedom: the weights hardly overfit the calibration split.
    weight_K = _em(stats.label_logp_KN, num_iterations=num_iterations, tolerance=tolerance)
    return Fixed(weights=_named(weight_K, teachers))


def fit_domain_weights(
    stats: RowStats,
    rows: Rows,
    teachers: Sequence[str],
    *,
    domains: Sequence[str],
    prior_rows: float = 20.0,
) -> DomainWeights:
    """Fit EM weights per domain, shrunk towards those of all rows, which are the default.

    w_k <- (sum_t r_tk + prior_rows * default_k) / (N_domain + prior_rows), so a domain with few
    rows stays close to the default.

    Args:
        stats: (K, N) each, of the calibrated teachers on the calibration split.
        rows: the same rows, with their domains.
        teachers: names in the order of `stats`.
        domains: names of the domains; those without rows are skipped.
        prior_rows: number of rows that the default counts as.

    Raises:
        ValueError: there are no rows, or the rows have no domains.
    """
    if rows.domains is None:
        raise ValueError(
            "fit_domain_weights: got rows without domains; must have them; name a domain for each "
            "data source"
        )
    default_K = _em(stats.label_logp_KN)
    tables = {}
    for domain in domains:
        is_here_N = rows.domains == domain_number(domain)
        if is_here_N.any():
            label_logp_Kn = stats.label_logp_KN[:, is_here_N]
            weight_K = _em(label_logp_Kn, prior_K=prior_rows * default_K)
            tables[domain] = _named(weight_K, teachers)
    return DomainWeights(weights=tables, default=_named(default_K, teachers))


def fit_route(
    stats: RowStats, rows: Rows, teachers: Sequence[str], *, domains: Sequence[str]
) -> Route:
    """Route each domain to its teacher of lowest mean NLL, other rows to that of all rows.

    Args:
        stats: (K, N) each, on the calibration split.
        rows: the same rows, with their domains.
        teachers: names in the order of `stats`.
        domains: names of the domains; those without rows are skipped.

    Raises:
        ValueError: there are no rows, or the rows have no domains.
    """
    if rows.domains is None or len(rows) == 0:
        raise ValueError(
            "fit_route: got no rows with domains; must have some; name a domain for each data "
            "source"
        )
    logp_KN = stats.label_logp_KN.double()
    table = {}
    for domain in domains:
        is_here_N = rows.domains == domain_number(domain)
        if is_here_N.any():
            table[domain] = teachers[int(logp_KN[:, is_here_N].mean(1).argmax())]
    return Route(default=teachers[int(logp_KN.mean(1).argmax())], domains=table)


def _em(
    label_logp_KN: Tensor,
    *,
    prior_K: Tensor | None = None,
    num_iterations: int = 1000,
    tolerance: float = 1e-10,
) -> Tensor:
    """(K,) float64 weights; `prior_K` counts as rows already explained by each teacher."""
    logp_KN = label_logp_KN.double()
    num_teachers, num_rows = logp_KN.shape
    if num_rows == 0:
        raise ValueError("fit_em_weights: got no rows; must have some; use a larger split")
    prior_K = logp_KN.new_zeros(num_teachers) if prior_K is None else prior_K.to(logp_KN)
    weight_K = logp_KN.new_full((num_teachers,), 1.0 / num_teachers)
    previous = -torch.inf
    for _ in range(num_iterations):
        joint_KN = weight_K.log()[:, None] + logp_KN
        total_N = joint_KN.logsumexp(0)
        explained_K = (joint_KN - total_N).exp().sum(1)
        # `xlogy` is 0 for a weight of 0 without a prior, where the plain product is NaN.
        value = torch.xlogy(prior_K, weight_K).sum() + total_N.sum()
        weight_K = (explained_K + prior_K) / (num_rows + prior_K.sum())
        if value - previous < tolerance * num_rows:
            break
        previous = value
    return weight_K


def _named(weight_K: Tensor, teachers: Sequence[str]) -> dict[str, float]:
    # Rounding moves the sum by less than K * 1e-6, within the tolerance of `check_sum_to_one`.
    return {name: round(w, DIGITS) for name, w in zip(teachers, weight_K.tolist(), strict=True)}


def fit_gate(
    stats: RowStats,
    rows: Rows,
    teachers: Sequence[str],
    *,
    decay: float = 0.9,
    ridge: float = 1e-3,
    num_iterations: int = 100,
    with_consensus: bool = True,
) -> Gate:
    """Fit the gate: argmax mean_t log sum_k w_tk P_k(y_t) - ridge / 2 * |(a, s b)|^2.

    w_tk = softmax_k(a_k + b . f_tk), and s_f is the spread of feature f, so the ridge treats all
    features alike. With the posterior q_tk = w_tk P_k(y_t) / sum_j w_tj P_j(y_t), the gradient in
    the score of teacher k is q_tk - w_tk. Newton's method from zero in float64 with the Hessian
    E_q[xx'] - E_q[x]E_q[x]' - (E_w[xx'] - E_w[x]E_w[x]') and step halving. It is deterministic,
    and never worse than uniform weights on these rows.

    Args:
        stats: (K, N) each, of the calibrated teachers on the calibration split, with
            `consensus_kl_KN` unless `with_consensus` is false.
        rows: the same rows; documents must be unique among them.
        teachers: names in the order of `stats`.
        decay: decay factor of the prefix NLL.
        ridge: pull towards uniform weights, per row.
        num_iterations: maximum number of Newton steps.
        with_consensus: whether the divergence from the consensus is a feature.

    Raises:
        ValueError: there are no rows, or the consensus was not measured.

    Source: Jordan and Jacobs 1994, hierarchical mixtures of experts, with fixed experts.
    """
    if len(rows) == 0:
        raise ValueError("fit_gate: got no rows; must have some; use a larger split")
    feature_KNF = gate_features(stats, rows, decay=decay, with_consensus=with_consensus)
    spread_F = feature_KNF.square().mean((0, 1)).sqrt()
    # A constant feature gets scale 0, so its coefficient is exactly 0.
    is_flat_F = spread_F < 1e-9
    scale_F = torch.where(is_flat_F, 0.0, 1.0 / spread_F)
    num_teachers = len(teachers)
    offset_KNK = torch.eye(num_teachers).to(feature_KNF)[:, None].expand(-1, len(rows), -1)
    input_KNP = torch.cat([offset_KNK, feature_KNF * scale_F], dim=-1)
    problem = _GateProblem(input_KNP, stats.label_logp_KN.double(), ridge)
    theta_P = _ascend(problem, num_iterations)
    b = (theta_P[num_teachers:] * scale_F).tolist()
    # Only differences of the offsets matter, so they are centered.
    offset_K = theta_P[:num_teachers] - theta_P[:num_teachers].mean()
    return Gate(
        offsets={n: round(a, DIGITS) for n, a in zip(teachers, offset_K.tolist(), strict=True)},
        entropy=round(b[0], DIGITS),
        max_logp=round(b[1], DIGITS),
        consensus=round(b[2], DIGITS),
        prefix_nll=round(b[3], DIGITS),
        decay=decay,
    )


class _GateProblem:
    """The penalized likelihood of a gate, its gradient and its Hessian, per row."""

    def __init__(self, input_KNP: Tensor, label_logp_KN: Tensor, ridge: float) -> None:
        self.num_parameters = input_KNP.shape[-1]
        self._input_KNP = input_KNP
        self._label_logp_KN = label_logp_KN
        self._ridge = ridge

    def value(self, theta_P: Tensor) -> Tensor:
        """Return the mean of log sum_k w_k P_k(y) minus the ridge."""
        logw_KN = (self._input_KNP @ theta_P).log_softmax(0)
        mean = (logw_KN + self._label_logp_KN).logsumexp(0).mean()
        return mean - 0.5 * self._ridge * theta_P.square().sum()

    def derivatives(self, theta_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient (P,) and the concave and convex parts of the Hessian, (P, P) each."""
        logw_KN = (self._input_KNP @ theta_P).log_softmax(0)
        weight_KN = logw_KN.exp()
        posterior_KN = (logw_KN + self._label_logp_KN).softmax(0)
        num_rows = weight_KN.shape[1]
        gradient_P = torch.einsum("kn,knp->p", posterior_KN - weight_KN, self._input_KNP) / num_rows
        eye_PP = torch.eye(self.num_parameters).to(theta_P)
        concave_PP = -self._covariance(weight_KN) - self._ridge * eye_PP
        return gradient_P - self._ridge * theta_P, concave_PP, self._covariance(posterior_KN)

    def _covariance(self, prob_KN: Tensor) -> Tensor:
        """Covariance of the inputs over the teachers, averaged over the rows."""
        num_rows = prob_KN.shape[1]
        x_KNP = self._input_KNP
        second_PP = torch.einsum("kn,knp,knq->pq", prob_KN, x_KNP, x_KNP)
        mean_NP = torch.einsum("kn,knp->np", prob_KN, x_KNP)
        return (second_PP - mean_NP.T @ mean_NP) / num_rows


def _ascend(problem: _GateProblem, num_iterations: int) -> Tensor:
    theta_P = torch.zeros(problem.num_parameters, dtype=torch.float64)
    value = problem.value(theta_P)
    for _ in range(num_iterations):
        gradient_P, concave_PP, convex_PP = problem.derivatives(theta_P)
        if gradient_P.abs().max() < 1e-9:
            break
        # The posterior's covariance is convex. Where it makes the Hessian indefinite, a Newton
        # step need not ascend, so only the concave part is used.
        curvature_PP = concave_PP + convex_PP
        if torch.linalg.eigvalsh(curvature_PP).max() >= -1e-8:
            curvature_PP = concave_PP
        step_P = -torch.linalg.solve(curvature_PP, gradient_P)
        ascended = _line_search(problem.value, theta_P, step_P, value)
        if ascended is None:
            break
        theta_P, value = ascended
    return theta_P


def _line_search(
    value_of: Callable[[Tensor], Tensor], theta_P: Tensor, step_P: Tensor, value: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return the first halved step that raises the value, None where none does."""
    for halving in range(40):
        trial_P = theta_P + 0.5**halving * step_P
        trial = value_of(trial_P)
        if trial > value:
            return trial_P, trial
    return None
