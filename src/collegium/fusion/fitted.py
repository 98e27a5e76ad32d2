"""Weighting rules that are fitted on calibration text, and the table of all rules.

Shapes: N rows, K teachers, M knots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from collegium.errors import DataError
from collegium.fusion import rules
from collegium.fusion.gate import Gate, named
from collegium.fusion.weighting import CalibrationData, FittedWeighting, RowStats, Weighting
from collegium.options import Tensor, option, torch
from collegium.types import Rows, domain_number, teacher_number

MAX_KNOTS = 32
"""Knots of a fitted map: enough for its shape, few enough to read in a recipe."""


def _check_sum(weights: dict[str, float]) -> dict[str, float]:
    total = math.fsum(weights.values())
    # Loose enough for weights typed with four decimals, such as 0.3333 three times.
    if abs(total - 1.0) > 1e-3:
        values = ", ".join(f"{weight:g}" for weight in weights.values())
        raise ValueError(
            f"teacher weights sum to {total:.2f} ({values}); they must sum to 1; "
            "divide each by their sum"
        )
    return weights


Weights = Annotated[dict[str, Annotated[float, Field(ge=0)]], AfterValidator(_check_sum)]
"""Weight by teacher name. They sum to 1."""


@option
class Fixed(FittedWeighting):
    """One weight per teacher, the same at every row."""

    streams = True
    zero_excludes = True
    weights: Weights
    """A weight of 0 leaves the teacher out."""

    def teacher_tables(self) -> Mapping[tuple[str, ...], Mapping[str, object]]:
        return {("weights",): self.weights}

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        return rules.constant_scores([self.weights[teacher] for teacher in teachers], stats)

    @classmethod
    def fit(cls, data: CalibrationData) -> Fixed:
        """Fit the constant weights of highest likelihood (see `em_weights`)."""
        # K - 1 degrees of freedom: the weights hardly overfit the calibration split. A weight that
        # rounds to 0 excludes its teacher. Rounding moves the sum by less than K * 1e-6, within the
        # tolerance of `Weights`.
        return cls(weights=named(em_weights(data.stats.label_logp_KN), data.teachers))


@option
class DomainWeights(FittedWeighting):
    """One weight per teacher and domain of the document: a soft routing table."""

    streams = True
    zero_excludes = True
    needs_domains = True
    weights: dict[str, Weights]
    """Weights by domain."""
    default: Weights
    """Weights in domains that are not listed, and for rows without a domain."""

    def teacher_tables(self) -> Mapping[tuple[str, ...], Mapping[str, object]]:
        return {("default",): self.default, **{("weights", d): t for d, t in self.weights.items()}}

    def domain_names(self) -> Mapping[tuple[str, ...], Sequence[str]]:
        return {("weights",): list(self.weights)}

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        score_KN = rules.constant_scores([self.default[name] for name in teachers], stats)
        if rows.domains is not None:
            for domain, table in self.weights.items():
                domain_score_KN = rules.constant_scores([table[name] for name in teachers], stats)
                is_here_N = rows.domains == domain_number(domain)
                score_KN = torch.where(is_here_N, domain_score_KN, score_KN)
        return score_KN

    @classmethod
    def fit(cls, data: CalibrationData, *, prior_rows: float = 20.0) -> DomainWeights:
        """Fit EM weights per domain, shrunk towards those of all rows, which are the default.

        w_k <- (sum_t r_tk + prior_rows * default_k) / (N_domain + prior_rows), so a domain with few
        rows stays close to the default. Those without rows are skipped.

        Raises:
            ValueError: the rows have no domains.
        """
        label_logp_KN = data.stats.label_logp_KN
        default_K = em_weights(label_logp_KN)
        tables = {}
        for domain, is_here_N in data.by_domain():
            weight_K = em_weights(label_logp_KN[:, is_here_N], prior_K=prior_rows * default_K)
            tables[domain] = named(weight_K, data.teachers)
        return cls(weights=tables, default=named(default_K, data.teachers))


def em_weights(
    label_logp_KN: Tensor,
    *,
    prior_K: Tensor | None = None,
    num_iterations: int = 1000,
    tolerance: float = 1e-10,
) -> Tensor:
    """Fit argmax_w sum_t log sum_k w_k P_k(y_t): (K,) float64 weights that sum to 1.

    The problem is concave. EM from uniform weights: r_tk = w_k P_k(y_t) / sum_j w_j P_j(y_t),
    w_k <- mean_t r_tk. On these rows the pool is never worse than uniform weights or one teacher.
    `prior_K` counts rows that each teacher explains already. EM ends at a step that gains less than
    `tolerance` nats per row.

    Source: Dempster, Laird and Rubin 1977, for mixtures whose components are known.
    """
    logp_KN = label_logp_KN.double()
    num_teachers, num_rows = logp_KN.shape
    prior_K = logp_KN.new_zeros(num_teachers) if prior_K is None else prior_K.to(logp_KN)
    weight_K = logp_KN.new_full((num_teachers,), 1.0 / num_teachers)
    # Relative to the best teacher of a row: a step is then two products and no exponential.
    prob_KN = (logp_KN - logp_KN.amax(0)).exp()
    previous = -torch.inf
    for _ in range(num_iterations):
        # 0 where a teacher without weight is the only one that explains a row.
        total_N = (weight_K @ prob_KN).clamp(min=torch.finfo(logp_KN.dtype).tiny)
        explained_K = weight_K * (prob_KN @ total_N.reciprocal())
        # `xlogy` is 0 for a weight of 0 without a prior, where the plain product is NaN.
        value = torch.xlogy(prior_K, weight_K).sum() + total_N.log().sum()
        weight_K = (explained_K + prior_K) / (num_rows + prior_K.sum())
        if value - previous < tolerance * num_rows:
            break
        previous = value
    return weight_K


@option
class Route(FittedWeighting):
    """One teacher per row: the one that the row names, else that of its domain, else the default.

    A row names its teacher in the `teacher_column` of its data source. Nothing is pooled: the
    target equals the teacher's distribution bit for bit, and only that teacher's head is applied.
    """

    streams = True
    needs_domains = True
    is_single = True
    # Giving up fusion is left to the recipe.
    is_only_compared = True
    default: str
    """Teacher of rows that name none, in domains that are not listed."""
    domains: dict[str, str] = Field(default_factory=dict)
    """Domain -> name of its teacher."""

    def teacher_fields(self) -> Mapping[tuple[str, ...], str]:
        return {("default",): self.default, **{("domains", d): t for d, t in self.domains.items()}}

    def domain_names(self) -> Mapping[tuple[str, ...], Sequence[str]]:
        return {("domains",): list(self.domains)}

    def numbers(self, rows: Rows) -> Tensor:
        """(N,) int64: `teacher_number` of the teacher of each row."""
        number_N = torch.full_like(rows.index, teacher_number(self.default))
        if rows.domains is not None:
            for domain, teacher in self.domains.items():
                number_N[rows.domains == domain_number(domain)] = teacher_number(teacher)
        if rows.teachers is not None:
            number_N = torch.where(rows.teachers != 0, rows.teachers, number_N)
        return number_N

    def shares(self, rows: Rows, teachers: Sequence[str]) -> list[Tensor]:
        """Partition the rows: per teacher an ascending (m,) int64 tensor of indices on the CPU.

        Raises:
            DataError: a row names a teacher that is missing.
        """
        number_N = self.numbers(rows).cpu()
        shares = [(number_N == teacher_number(name)).nonzero()[:, 0] for name in teachers]
        num_routed = sum(map(len, shares))
        if num_routed != len(rows):
            raise DataError(
                f"teacher_ids: got {len(rows) - num_routed} of {len(rows)} rows for other "
                f"teachers; must name one of {', '.join(teachers)}; use `teacher_number` of its "
                "name, or 0 for none"
            )
        return shares

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        number_N = self.numbers(rows).to(stats.entropy_KN.device)
        own_K = torch.tensor([teacher_number(name) for name in teachers], device=number_N.device)
        score_KN = torch.zeros_like(stats.entropy_KN, dtype=torch.float64)
        return score_KN.masked_fill(own_K[:, None] != number_N, -torch.inf)

    @classmethod
    def fit(cls, data: CalibrationData) -> Route:
        """Route each domain to its teacher of lowest mean NLL, other rows to that of all rows.

        Raises:
            ValueError: the rows have no domains.
        """
        logp_KN, teachers = data.stats.label_logp_KN.double(), data.teachers
        table = {
            domain: teachers[int(logp_KN[:, is_here_N].mean(1).argmax())]
            for domain, is_here_N in data.by_domain()
        }
        return cls(default=teachers[int(logp_KN.mean(1).argmax())], domains=table)


@option
class CalibratedEntropy(FittedWeighting):
    """Entropy weights on a calibrated scale: w_k = softmax_k(-m_k(H_k) / tau), m_k increasing.

    m_k maps a teacher's entropy to its mean NLL at that entropy on the calibration split, so being
    certain and wrong no longer pays. The teachers' distributions do not change.
    """

    streams = True
    maps: dict[str, list[list[float]]]
    """Knots [entropy, NLL] by teacher name, in nats, both ascending, interpolated linearly."""
    tau: Annotated[float, Field(gt=0)] = 1.0
    """Difference in expected NLL, in nats, that changes the odds by a factor of e."""

    @model_validator(mode="after")
    def _maps_increase(self) -> CalibratedEntropy:
        for name, knots in self.maps.items():
            has_pairs = len(knots) > 0 and all(len(knot) == 2 for knot in knots)
            if not has_pairs or any(a[0] >= b[0] or a[1] > b[1] for a, b in pairwise(knots)):
                raise ValueError(
                    f"maps: the knots of `{name}` must be pairs [entropy, NLL], both ascending; "
                    "fit them again"
                )
        return self

    def teacher_tables(self) -> Mapping[tuple[str, ...], Mapping[str, object]]:
        return {("maps",): self.maps}

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        pairs = zip(stats.entropy_KN, teachers, strict=True)
        expected_KN = torch.stack([interpolate(h_N, self.maps[name]) for h_N, name in pairs])
        return -expected_KN / self.tau

    @classmethod
    def fit(cls, data: CalibrationData, *, max_knots: int = MAX_KNOTS) -> CalibratedEntropy:
        """Fit an increasing map H -> E[NLL | H] per teacher.

        Rows are binned by entropy into bins of equal mass, and the bins' mean NLL is made
        nondecreasing. An overconfident teacher has a map far above the diagonal. A teacher whose
        entropy carries no information has a flat one.
        """
        columns = (data.stats.entropy_KN.double(), -data.stats.label_logp_KN.double())
        rows = zip(data.teachers, *columns, strict=True)
        return cls(maps={name: _knots(entropy, nll, max_knots) for name, entropy, nll in rows})


def _knots(entropy_N: Tensor, nll_N: Tensor, max_knots: int) -> list[list[float]]:
    order_N = entropy_N.argsort(stable=True)
    parts = torch.tensor_split(order_N, min(max_knots, len(order_N)))
    entropy_M = torch.stack([entropy_N[part].mean() for part in parts])
    nll_M = torch.stack([nll_N[part].mean() for part in parts])
    count_M = torch.tensor([float(len(part)) for part in parts])
    pairs = zip(entropy_M.tolist(), pool_adjacent_violators(nll_M, count_M).tolist(), strict=True)
    # Knots must ascend strictly: equal entropies after rounding keep the last, highest NLL.
    knots = {round(entropy, 4): round(nll, 4) for entropy, nll in pairs}
    return [[entropy, nll] for entropy, nll in knots.items()]


def pool_adjacent_violators(value_N: Tensor, weight_N: Tensor) -> Tensor:
    """Return the nondecreasing sequence closest to `value_N` in weighted squares: (N,) float64.

    Adjacent values that are out of order are replaced by their mean until none are.

    Source: Ayer et al. 1955.
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, number of values
    for value, weight in zip(value_N.tolist(), weight_N.tolist(), strict=True):
        mean, total, count = value, weight, 1
        while blocks and blocks[-1][0] >= mean:
            left_mean, left_total, left_count = blocks.pop()
            mean = (left_mean * left_total + mean * total) / (left_total + total)
            total, count = left_total + total, left_count + count
        blocks.append((mean, total, count))
    means = [mean for mean, _, count in blocks for _ in range(count)]
    return torch.tensor(means, dtype=torch.float64)


def interpolate(entropy_N: Tensor, knots: Sequence[Sequence[float]]) -> Tensor:
    """Interpolate linearly between the knots, constant beyond both ends: (N,) float64."""
    x_M, y_M = torch.tensor(knots, dtype=torch.float64, device=entropy_N.device).T.contiguous()
    # `searchsorted` below needs two knots, but a teacher of constant entropy has one.
    if len(x_M) == 1:
        return y_M.expand(len(entropy_N))
    inside_N = entropy_N.double().clamp(x_M[0], x_M[-1])
    right_N = torch.searchsorted(x_M, inside_N.contiguous()).clamp(1, len(x_M) - 1)
    left_N = right_N - 1
    share_N = (inside_N - x_M[left_N]) / (x_M[right_N] - x_M[left_N])
    return torch.lerp(y_M[left_N], y_M[right_N], share_N)


WEIGHTINGS: dict[str, type[Weighting]] = {
    "uniform": rules.Uniform,
    "best_single": rules.BestSingle,
    "entropy": rules.Entropy,
    "prefix_likelihood": rules.PrefixLikelihood,
    "fixed": Fixed,
    "calibrated_entropy": CalibratedEntropy,
    "gate": Gate,
    "consensus": rules.Consensus,
    "domain_weights": DomainWeights,
    "route": Route,
    # Baselines: with the label in the target, its NLL does not rank the teachers.
    "ca_mkd": rules.ConfidenceAware,
    "min_ce": rules.MinCE,
    "avg_ce": rules.AvgCE,
}
"""Name in a recipe -> option class, in the order in which a preflight tries them."""
