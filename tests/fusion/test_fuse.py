"""The fused target equals the naive formulas, streams, and satisfies its identities."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import reference
from collegium.distributions import Answer, DenseRows, Distribution
from collegium.errors import RecipeError
from collegium.fusion.fitted import CalibratedEntropy, DomainWeights, Fixed, Route
from collegium.fusion.fuse import Fusion, fuse
from collegium.fusion.gate import Gate
from collegium.fusion.options import describe, to_recipe
from collegium.fusion.rules import (
    AvgCE,
    BestSingle,
    ConfidenceAware,
    Consensus,
    Entropy,
    MinCE,
    PrefixLikelihood,
    Uniform,
)
from collegium.fusion.weighting import Weighting
from fusion_cases import (
    NAMES,
    POOL_CASES,
    WEIGHTING_CASES,
    CountedRows,
    domains_of,
    fused,
    make_rows,
    make_teachers,
)
from refusals import refused

N, V, K = 11, 7, 3
DOCUMENTS = [0, 0, 0, 0, 0, 2, 2, 5, 5, 5, 5]


@pytest.fixture(name="logits_KNV")
def _logits() -> torch.Tensor:
    return 2 * torch.randn(K, N, V, dtype=torch.float64)


@pytest.fixture
def rows():
    return make_rows(torch.randint(V, (N,)), DOCUMENTS)


@pytest.mark.parametrize("pool", POOL_CASES, ids=str)
@pytest.mark.parametrize("temperatures", [{}, {"law": 1.7, "prose": 0.6}], ids=["raw", "tempered"])
@pytest.mark.parametrize("pooled_temperature", [1.0, 0.8])
@pytest.mark.parametrize("weighting", WEIGHTING_CASES, ids=str)
def test_equals_reference(weighting, pool, temperatures, pooled_temperature, logits_KNV, rows):
    fusion = Fusion(
        weighting=weighting,
        **pool,
        temperatures=temperatures,
        pooled_temperature=pooled_temperature,
    )
    block = fused(fusion, make_teachers(logits_KNV), rows)
    domains = domains_of(DOCUMENTS)
    logp, weights = reference.fuse(
        to_recipe(fusion), logits_KNV.tolist(), rows.labels.tolist(), DOCUMENTS, NAMES, domains
    )
    expected_logp = torch.tensor(logp, dtype=torch.float64)
    expected_weights = torch.tensor(weights, dtype=torch.float64).T
    torch.testing.assert_close(block.logp(), expected_logp, rtol=0, atol=1e-10)
    torch.testing.assert_close(block.weights_Kn, expected_weights, rtol=0, atol=1e-10)


def test_statistics_equal_those_of_the_tempered_teachers(logits_KNV, rows):
    fusion = Fusion(temperatures={"law": 1.7})
    block = fused(fusion, make_teachers(logits_KNV), rows)
    for k, temperature in enumerate([1.7, 1.0, 1.0]):
        for t in range(N):
            logp = reference.log_softmax(logits_KNV[k, t].tolist(), temperature)
            assert block.stats.entropy_KN[k, t].item() == pytest.approx(
                reference.entropy(logp), abs=1e-10
            )
            assert block.stats.label_logp_KN[k, t].item() == pytest.approx(logp[rows.labels[t]])
            assert block.stats.max_logp_KN[k, t].item() == pytest.approx(max(logp))


@pytest.mark.parametrize("pool", ["linear", "log_linear", "power_mean"])
@pytest.mark.parametrize("weighting", WEIGHTING_CASES, ids=str)
@pytest.mark.parametrize("block_size", [1, 2, 3, N])
def test_block_size_does_not_matter(weighting, pool, block_size, logits_KNV, rows):
    fusion = Fusion(weighting=weighting, pool=pool)
    teachers = make_teachers(logits_KNV)
    expected, block = (fused(fusion, teachers, rows, size) for size in (5, block_size))
    torch.testing.assert_close(block.logp(), expected.logp(), rtol=0, atol=1e-12)
    torch.testing.assert_close(block.weights_Kn, expected.weights_Kn, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pool", ["linear", "log_linear", "power_mean"])
@pytest.mark.parametrize(
    "weighting",
    [
        w
        for w in WEIGHTING_CASES
        if not w.teacher_tables() and not isinstance(w, (BestSingle, Route))
    ]
    + [
        Fixed(weights={"law": 1.0}),
        BestSingle(teacher="law"),
        Route(default="law", domains={"court": "law"}),
        DomainWeights(weights={"court": {"law": 1.0}}, default={"law": 1.0}),
        CalibratedEntropy(maps={"law": [[0.1, 0.5], [1.0, 2.0]]}),
        Gate(offsets={"law": 2.0}, entropy=1.0, consensus=1.0, prefix_nll=1.0),
    ],
    ids=str,
)
def test_single_teacher_is_reproduced_bit_for_bit(weighting, pool, dtype, logits_KNV, rows):
    logits_NV = logits_KNV[0].to(dtype)
    block = fused(Fusion(weighting=weighting, pool=pool), make_teachers(logits_NV[None]), rows)
    assert torch.equal(block.logp(), torch.log_softmax(logits_NV, dim=-1))
    assert torch.equal(block.weights_Kn, torch.ones(1, N, dtype=dtype))
    assert block.disagreement_n().abs().max() == 0


@pytest.mark.parametrize("pool", ["linear", "log_linear", "power_mean"])
@pytest.mark.parametrize(
    "weighting",
    [BestSingle(teacher="medicine"), Fixed(weights={"law": 0, "medicine": 1, "prose": 0})],
    ids=str,
)
def test_all_weight_on_one_teacher_reproduces_it_exactly(weighting, pool, logits_KNV, rows):
    logits_KNV[0], logits_KNV[2, :, 3] = torch.nan, -torch.inf
    block = fused(Fusion(weighting=weighting, pool=pool), make_teachers(logits_KNV), rows)
    assert torch.equal(block.logp(), torch.log_softmax(logits_KNV[1], dim=-1))
    expected_Kn = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64).expand(K, N)
    assert torch.equal(block.weights_Kn, expected_Kn)


def test_temperature_of_a_single_teacher_equals_the_pooled_one(logits_KNV, rows):
    teachers = make_teachers(logits_KNV[:1])
    before = fused(Fusion(temperatures={"law": 1.3}), teachers, rows)
    after = fused(Fusion(pooled_temperature=1.3), teachers, rows)
    torch.testing.assert_close(before.logp(), after.logp(), rtol=0, atol=1e-12)


def test_log_linear_pool_commutes_with_a_shared_temperature(logits_KNV, rows):
    same = dict.fromkeys(NAMES, 1.4)
    options = {"weighting": Fixed(weights={"law": 0.5, "medicine": 0.2, "prose": 0.3})}
    before = fused(
        Fusion(**options, pool="log_linear", temperatures=same), make_teachers(logits_KNV), rows
    )
    after = fused(
        Fusion(**options, pool="log_linear", pooled_temperature=1.4),
        make_teachers(logits_KNV),
        rows,
    )
    torch.testing.assert_close(before.logp(), after.logp(), rtol=0, atol=1e-12)


def _kl(p_logp_nV: torch.Tensor, q_logp_nV: torch.Tensor) -> torch.Tensor:
    return (p_logp_nV.exp() * (p_logp_nV - q_logp_nV)).sum(-1)


@pytest.mark.parametrize("weighting", WEIGHTING_CASES, ids=str)
@pytest.mark.parametrize("pooled_temperature", [1.0, 0.7])
def test_mean_kl_is_kl_to_the_mixture_plus_disagreement(
    weighting, pooled_temperature, logits_KNV, rows
):
    """I1 and I4: sum_k w_k KL(P_k || Q) = KL(P || Q) + JSD_w, JSD_w = H(P) - sum_k w_k H_k."""
    fusion = Fusion(weighting=weighting, pooled_temperature=pooled_temperature)
    teachers = make_teachers(logits_KNV)
    block = fused(fusion, teachers, rows)
    mixture_nV = fused(Fusion(weighting=weighting), teachers, rows).logp()
    student_nV = torch.randn(N, V, dtype=torch.float64).log_softmax(-1)
    mean_n = (block.weights_Kn * _kl(logits_KNV.log_softmax(-1), student_nV)).sum(0)
    expected_n = mean_n - _kl(mixture_nV, student_nV)
    torch.testing.assert_close(block.disagreement_n(), expected_n, rtol=0, atol=1e-10)


@pytest.mark.parametrize("weighting", WEIGHTING_CASES, ids=str)
def test_log_linear_gain_is_its_diversity(weighting, logits_KNV, rows):
    """I5: NLL(P_geo) = sum_k w_k NLL_k + log Z, -log Z = sum_k w_k KL(P_geo || P_k)."""
    block = fused(Fusion(weighting=weighting, pool="log_linear"), make_teachers(logits_KNV), rows)
    diversity_n = (block.weights_Kn * _kl(block.logp(), logits_KNV.log_softmax(-1))).sum(0)
    torch.testing.assert_close(block.disagreement_n(), diversity_n, rtol=0, atol=1e-10)
    nll_n = -block.logp().gather(1, rows.labels[:, None])[:, 0]
    weighted_Kn = block.weights_Kn * block.stats.label_logp_KN
    mean_n = -torch.where(block.weights_Kn > 0, weighted_Kn, 0.0).sum(0)
    torch.testing.assert_close(nll_n, mean_n - block.disagreement_n(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("weighting", WEIGHTING_CASES, ids=str)
@pytest.mark.parametrize(("exponent", "limit"), [(1 - 1e-6, "linear"), (1e-6, "log_linear")])
def test_power_mean_lies_between_the_other_pools(weighting, exponent, limit, logits_KNV, rows):
    teachers = make_teachers(logits_KNV)
    power = fused(Fusion(weighting=weighting, pool="power_mean", exponent=exponent), teachers, rows)
    pool = fused(Fusion(weighting=weighting, pool=limit), teachers, rows)
    torch.testing.assert_close(power.logp(), pool.logp(), rtol=0, atol=1e-4)
    torch.testing.assert_close(power.disagreement_n(), pool.disagreement_n(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("exponent", [0.1, 0.5, 0.9])
def test_power_mean_of_unlikely_tokens_is_accurate_in_float32(exponent, rows):
    """A token of probability e^-80 keeps its value: the pool stays in log space."""
    logits_KNV = torch.zeros(2, N, V)
    logits_KNV[:, :, 0] = torch.tensor([-80.0, -90.0])[:, None]
    fusion = Fusion(weighting=Uniform(), pool="power_mean", exponent=exponent)
    block = fused(fusion, make_teachers(logits_KNV), rows)
    expected = reference.pool(
        [reference.log_softmax(z_NV[0].tolist()) for z_NV in logits_KNV.double()],
        [0.5, 0.5],
        "power_mean",
        exponent,
    )
    assert block.logp()[0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("pool", ["linear", "log_linear", "power_mean"])
@pytest.mark.parametrize(
    "weighting", [w for w in WEIGHTING_CASES if not isinstance(w, Route)], ids=str
)
def test_each_head_is_applied_once_unless_the_rule_sees_all_rows(weighting, pool, logits_KNV, rows):
    counted = [CountedRows(logits_NV) for logits_NV in logits_KNV]
    teachers = [Answer(name, scores) for name, scores in zip(NAMES, counted, strict=True)]
    fused(Fusion(weighting=weighting, pool=pool), teachers, rows, 4)
    expected = [(0, 4), (4, 8), (8, 11)]
    is_label_aware = isinstance(weighting, (ConfidenceAware, MinCE, AvgCE))
    needs_sweep = is_label_aware or (
        isinstance(weighting, Entropy)
        and (weighting.granularity != "token" or weighting.form == "complement")
    )
    times = 2 if needs_sweep else 1
    if isinstance(weighting, (Consensus, Gate)):
        times = 3
    for scores in counted:
        assert sorted(scores.blocks) == sorted(expected * times)
        assert scores.blocks[-3:] == expected


class _LiveTensors(TorchDispatchMode):
    """Peak number of live (n, V) tensors."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self._shape = shape
        self._live: dict[int, weakref.ref] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and tuple(leaf.shape) == self._shape:
                self._live[leaf.untyped_storage().data_ptr()] = weakref.ref(leaf)
        self._live = {key: ref for key, ref in self._live.items() if ref() is not None}
        self.peak = max(self.peak, len(self._live))
        return result


@pytest.mark.parametrize("pool", ["linear", "log_linear", "power_mean"])
@pytest.mark.parametrize(
    "weighting", [PrefixLikelihood(), Entropy(granularity="batch"), Consensus()], ids=str
)
def test_memory_does_not_grow_with_teachers(weighting, pool):
    class FreshRows(Distribution):
        def __len__(self) -> int:
            return 20

        def take(self, rows_m: torch.Tensor) -> FreshRows:
            raise NotImplementedError

        def logits(self, block: slice) -> torch.Tensor:
            return torch.randn(block.stop - block.start, 50)

    peaks = []
    rows = make_rows(torch.zeros(20, dtype=torch.long), [0] * 20)
    for num_teachers in (2, 3, 8):
        teachers = [Answer(f"t{k}", FreshRows()) for k in range(num_teachers)]
        with _LiveTensors((10, 50)) as live:
            target = fuse(Fusion(weighting=weighting, pool=pool), teachers, rows)
            for start in (0, 10):
                target.block(slice(start, start + 10))
        peaks.append(live.peak)
    assert peaks[1] == peaks[2]
    # At this size a strip of the kernels has the shape of a block.
    assert max(peaks) <= 5


def test_blocks_must_be_contiguous(logits_KNV, rows):
    target = fuse(Fusion(), make_teachers(logits_KNV), rows)
    target.block(slice(0, 4))
    for wrong in (slice(0, 4), slice(5, 8), slice(4, 4), slice(4, 8, 2)):
        with refused(ValueError, "StreamedTarget.block: "):
            target.block(wrong)
    assert target.block(slice(4, None)).logp().shape == (N - 4, V)


def test_results_are_not_overwritten_by_later_blocks(logits_KNV, rows):
    for pool in ("linear", "log_linear", "power_mean"):
        for num_teachers in (1, K):
            teachers = make_teachers(logits_KNV[:num_teachers])
            target = fuse(Fusion(pool=pool), teachers, rows)
            first = target.block(slice(0, 5))
            kept = first.logp().clone()
            target.block(slice(5, 10))
            assert torch.equal(first.logp(), kept)


@pytest.mark.parametrize("weighting", WEIGHTING_CASES, ids=str)
def test_teachers_are_not_modified_and_get_no_gradient(weighting, logits_KNV, rows):
    before = logits_KNV.clone()
    logits_KNV.requires_grad_()
    for pool in ("linear", "log_linear", "power_mean"):
        block = fused(Fusion(weighting=weighting, pool=pool), make_teachers(logits_KNV), rows)
        assert not block.logp().requires_grad
        assert not block.weights_Kn.requires_grad
    assert torch.equal(before, logits_KNV.detach())


@pytest.mark.parametrize("pool", ["linear", "log_linear", "power_mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pooled_temperature", [1.0, 0.5, 2.0])
def test_excluded_tokens_stay_finite(pool, dtype, pooled_temperature, rows):
    logits_KNV = torch.randn(K, N, V, dtype=dtype)
    logits_KNV[0, :, 2], logits_KNV[:, :, 5] = -torch.inf, -torch.inf
    fusion = Fusion(weighting=Uniform(), pool=pool, pooled_temperature=pooled_temperature)
    block = fused(fusion, make_teachers(logits_KNV), rows)
    assert block.logp().isfinite().all()
    assert block.stats.entropy_KN.isfinite().all()
    assert block.disagreement_n().isfinite().all()
    assert block.logp()[:, 5].exp().max() < 1e-15
    torch.testing.assert_close(block.logp().exp().sum(-1), torch.ones(N, dtype=dtype))


@pytest.mark.parametrize("pool", ["linear", "log_linear", "power_mean"])
@pytest.mark.parametrize("scale", [300.0, 3e4])
def test_extreme_logits_stay_finite_in_float32(pool, scale, rows):
    logits_KNV = scale * torch.randn(K, N, V)
    for weighting in WEIGHTING_CASES:
        block = fused(Fusion(weighting=weighting, pool=pool), make_teachers(logits_KNV), rows)
        assert block.logp().isfinite().all(), weighting
        torch.testing.assert_close(block.logp().exp().sum(-1), torch.ones(N))
        torch.testing.assert_close(block.weights_Kn.sum(0), torch.ones(N))


def test_unknown_and_missing_teacher_names_are_refused(logits_KNV, rows):
    teachers = make_teachers(logits_KNV)
    fixed = {"law": 0.5, "medicine": 0.5}
    cases: list[tuple[Fusion, str]] = [
        (Fusion(temperatures={"laww": 2.0}), "fusion.temperatures: got `laww`"),
        (Fusion(weighting=BestSingle(teacher="prosa")), "fusion.weighting.teacher: got `prosa`"),
        (Fusion(weighting=Fixed(weights=fixed)), "fusion.weighting.weights: got none"),
        (
            Fusion(weighting=Fixed(weights={**fixed, "x": 0.0})),
            "fusion.weighting.weights: got none",
        ),
    ]
    for fusion, where in cases:
        with refused(RecipeError, where):
            fuse(fusion, teachers, rows)


def test_options_are_checked_at_construction():
    for wrong in (
        {"weighting": "uniformly"},
        {"weighting": {}},
        {"pool": "geometric"},
        {"exponent": 0.3},
        {"pool": "power_mean", "exponent": 1.0},
        {"conflict": "never"},
        {"temperatures": {"law": 0.0}},
        {"pooled_temperature": -1.0},
        {"pooled_temperature": math.nan},
        {"weights": {}},
    ):
        with pytest.raises(ValidationError):
            Fusion(**wrong)


def test_description_and_recipe_snippet():
    assert describe(Fusion()) == "prefix_likelihood(eta=0.3, decay=0.9), linear"
    fusion = Fusion(
        weighting=Fixed(weights={"law": 0.25, "prose": 0.75}),
        pool="log_linear",
        temperatures={"law": 1.25},
        pooled_temperature=0.9,
    )
    assert describe(fusion) == "fixed, log_linear, temperatures, pooled_temperature=0.9"
    assert describe(Fusion(weighting=Uniform())) == "uniform, linear"
    assert to_recipe(fusion) == {
        "weighting": {"name": "fixed", "weights": {"law": 0.25, "prose": 0.75}},
        "pool": "log_linear",
        "temperatures": {"law": 1.25},
        "pooled_temperature": 0.9,
    }


def test_custom_weighting_rule(logits_KNV, rows):
    class LastTeacher(Weighting):
        streams = True

        def log_scores(self, stats, rows, teachers):
            value = 0.0 if teachers == ["prose"] else -torch.inf
            return torch.full_like(stats.entropy_KN, value, dtype=torch.float64)

    fusion = Fusion(weighting=LastTeacher())
    block = fused(fusion, make_teachers(logits_KNV), rows)
    torch.testing.assert_close(block.logp(), logits_KNV[2].log_softmax(-1))
    assert describe(fusion) == "LastTeacher, linear"


@pytest.mark.parametrize("pool", ["linear", "log_linear", "power_mean"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_teachers_of_different_dtypes_fuse(pool, order, logits_KNV, rows):
    dtypes = (torch.float32, torch.float64)
    logits = [logits_KNV[number].to(dtypes[number]) for number in order]
    teachers = [Answer(NAMES[i], DenseRows(member_NV)) for i, member_NV in enumerate(logits)]
    mixed = fused(Fusion(weighting=Uniform(), pool=pool), teachers, rows)
    same = fused(
        Fusion(weighting=Uniform(), pool=pool),
        make_teachers(torch.stack([member_NV.double() for member_NV in logits])),
        rows,
    )
    torch.testing.assert_close(mixed.logp().double(), same.logp(), rtol=0, atol=1e-5)
