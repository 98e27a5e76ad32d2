"""Calibration error, and fitted temperatures that reach the minimum of the NLL."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import reference
from collegium.distributions import Answer
from collegium.fusion.calibration import (
    TEMPERATURES,
    TemperatureTables,
    calibration_error,
    entropy_bins,
    fit_joint_temperatures,
    fit_temperature,
    grid_end,
    linear_pool_nll,
    reliability_bins,
)
from collegium.fusion.fuse import Fusion
from collegium.fusion.rules import Entropy, PrefixLikelihood
from collegium.types import Rows, map_tensors
from fusion_cases import (
    NAMES,
    SCALAR_CASES,
    CountedRows,
    fused,
    make_rows,
    make_teachers,
    stats_of,
    temperature_tables,
)

K, V = 3, 8


def _sampled(num_rows: int, sharpness: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, Rows]:
    """Logits whose softmax at temperature `sharpness` generated the labels; ten rows a document."""
    generator = torch.Generator().manual_seed(seed)
    truth_NV = 1.5 * torch.randn(num_rows, V, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(truth_NV.softmax(-1), 1, generator=generator)[:, 0]
    return sharpness * truth_NV, make_rows(labels, [t // 10 for t in range(num_rows)])


def _noisy(
    num_rows: int, noise: float = 1.0, seed: int = 0
) -> tuple[list[Answer], Rows, torch.Tensor]:
    """Three teachers with the true logits plus noise, the first one overconfident."""
    truth_NV, rows = _sampled(num_rows, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (K, num_rows, V)
    logits_KNV = truth_NV + noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    logits_KNV[0] *= 2.5
    return make_teachers(logits_KNV), rows, logits_KNV


@pytest.mark.parametrize("num_rows", [1, 7, 15, 100, 1003])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_ece_equals_reference(num_rows, as_tensor):
    generator = np.random.default_rng(0)
    confidence = generator.random(num_rows)
    is_correct = generator.random(num_rows) < confidence**2
    expected = reference.expected_calibration_error(confidence.tolist(), is_correct.tolist(), 15)
    if as_tensor:
        confidence, is_correct = torch.tensor(confidence), torch.tensor(is_correct)
    assert calibration_error(confidence, is_correct)[0] == pytest.approx(expected, abs=1e-12)


def test_ece_of_constant_confidence_does_not_depend_on_order():
    is_correct = torch.arange(100) < 70
    confidence = torch.full((100,), 0.9, dtype=torch.float64)
    assert calibration_error(confidence, is_correct)[0] == pytest.approx(0.2)
    assert calibration_error(confidence, is_correct.flip(0))[0] == pytest.approx(0.2)


def test_over_and_under_confidence_are_the_two_halves_of_the_error():
    generator = np.random.default_rng(0)
    confidence = generator.random(1000)
    is_correct = generator.random(1000) < np.where(confidence < 0.5, 0.9 * confidence + 0.1, 0.6)
    whole, over, under = calibration_error(confidence, is_correct)
    assert over + under == pytest.approx(whole)
    assert over > 0.05
    assert under > 0.01
    sure = torch.full((10,), 0.9)
    assert calibration_error(sure, torch.arange(10) < 4)[1:] == pytest.approx((0.5, 0.0))
    assert calibration_error(1 - sure, torch.arange(10) < 4)[1:] == pytest.approx((0.0, 0.3))
    assert all(map(math.isnan, calibration_error(sure[:0], sure[:0])))


def test_reliability_bins_have_equal_mass():
    confidence = torch.linspace(0, 1, 300, dtype=torch.float64)
    is_correct = confidence > 0.5
    binned = reliability_bins(confidence, is_correct)
    assert binned["count"] == [20] * 15
    assert binned["confidence"] == sorted(binned["confidence"])
    assert binned["accuracy"][:7] == [0.0] * 7
    assert binned["accuracy"][8:] == [1.0] * 7
    assert set(binned) == {"confidence", "accuracy", "count"}
    assert reliability_bins(confidence[:0], is_correct[:0])["count"] == []


def test_entropy_bins_average_each_column():
    entropy = torch.tensor([3.0, 1.0, 2.0, 4.0])
    binned = entropy_bins(entropy, torch.tensor([1, 1, 0, 0]), 2 * entropy, bins=2)
    assert binned == {
        "entropy": [1.5, 3.5],
        "accuracy": [0.5, 0.5],
        "nll": [3.0, 7.0],
        "count": [2, 2],
    }


def test_table_equals_the_scalars_of_tempered_logits():
    logits_NV, rows = _sampled(9)
    counted = CountedRows(logits_NV)
    table = temperature_tables([Answer("law", counted)], rows, grid=(0.5, 1.7)).tables["law"]
    assert counted.blocks == [(0, 9)]
    for g, temperature in enumerate((0.5, 1.7)):
        for t in range(9):
            logp = reference.log_softmax(logits_NV[t].tolist(), temperature)
            assert table.label_logp_KN[g, t].item() == pytest.approx(logp[rows.labels[t]])
            assert table.entropy_KN[g, t].item() == pytest.approx(reference.entropy(logp))
            assert table.max_logp_KN[g, t].item() == pytest.approx(max(logp))


@pytest.mark.parametrize(
    "sharpness", [0.07, 0.2, 0.4, 0.7, 1.0, 1.6, 2.9, 3.9, 6.0, 8.0, 11.0, 29.0]
)
def test_temperature_undoes_overconfidence(sharpness):
    logits_NV, rows = _sampled(4000, sharpness)
    tables = temperature_tables(make_teachers(logits_NV[None]), rows)
    fitted = fit_temperature(tables, "law")
    fine = np.linspace(0.9 * sharpness, 1.1 * sharpness, 101)
    gather = rows.labels[:, None]
    nll = [-(logits_NV / t).log_softmax(-1).gather(1, gather).mean().item() for t in fine]
    assert fitted == pytest.approx(fine[int(np.argmin(nll))], rel=0.01)
    assert fitted == pytest.approx(sharpness, rel=0.08)


@pytest.mark.parametrize(("sharpness", "edge"), [(100.0, 32.0), (0.02, 1 / 16)])
def test_temperature_beyond_the_grid_is_marked(sharpness, edge):
    logits_NV, rows = _sampled(300, sharpness)
    tables = temperature_tables(make_teachers(logits_NV[None]), rows)
    assert fit_temperature(tables, "law") == edge
    assert grid_end(tables.grid, edge) == ("highest" if edge > 1 else "lowest")
    assert grid_end(tables.grid, 0.99 * edge + 0.01) is None


def test_nothing_is_fitted_on_a_single_temperature():
    logits_NV, rows = _sampled(300, 2.0)
    tables = temperature_tables(make_teachers(logits_NV[None]), rows, grid=[1.0])
    assert fit_temperature(tables, "law") is None
    assert grid_end(tables.grid, None) is None


def test_stored_temperatures_are_interpolated_and_their_ends_marked():
    for sharpness, expected, end in ((1.6, 1.6, None), (9.0, 3.0, "highest"), (0.3, 1.0, "lowest")):
        logits_NV, rows = _sampled(4000, sharpness)
        tables = temperature_tables(make_teachers(logits_NV[None]), rows, grid=[1.0, 3.0])
        fitted = fit_temperature(tables, "law")
        assert fitted == pytest.approx(expected, rel=0.1)
        assert grid_end(tables.grid, fitted) == end


def test_flat_teacher_keeps_its_temperature():
    rows = make_rows(torch.zeros(5, dtype=torch.long), [0] * 5)
    tables = temperature_tables(make_teachers(torch.zeros(1, 5, V)), rows)
    assert fit_temperature(tables, "law") == 1.0


def test_batches_add_up_and_documents_stay_apart():
    teachers, rows, logits_KNV = _noisy(30)
    kl_KN = stats_of(teachers, rows).consensus_kl()
    whole = temperature_tables(teachers, rows, consensus_kl_KN=kl_KN)
    batches = []
    for part in (slice(0, 20), slice(20, 30)):
        documents = (rows.documents[part] - rows.documents[part][0]) * 3
        here = make_rows(rows.labels[part], documents.tolist())
        members = make_teachers(logits_KNV[:, part])
        batches.append(temperature_tables(members, here, consensus_kl_KN=kl_KN[:, part]))
    parts = TemperatureTables.cat(batches)
    assert parts.teachers == NAMES
    changes = parts.rows.documents.diff() != 0
    assert torch.equal(changes, rows.documents.diff() != 0)
    assert parts.rows.documents.unique().shape == (3,)
    for temperatures in ({}, {"law": 2.0}):
        joined, expected = (tables.stats(temperatures) for tables in (parts, whole))
        torch.testing.assert_close(joined.entropy_KN, expected.entropy_KN, rtol=0, atol=1e-12)
        # The consensus is known for the raw teachers only.
        assert (joined.consensus_kl_KN is None) == (temperatures != {})
    assert torch.equal(parts.stats({}).consensus_kl(), kl_KN)
    at_once, in_parts = (fit_joint_temperatures(t, PrefixLikelihood()) for t in (whole, parts))
    assert at_once == in_parts


def test_part_and_subset_of_the_teachers():
    teachers, rows, _ = _noisy(30)
    kl_KN = stats_of(teachers, rows).consensus_kl()
    tables = temperature_tables(teachers, rows, consensus_kl_KN=kl_KN)
    is_kept_N = rows.documents != 1
    stats = tables.part(is_kept_N).stats({"medicine": 1.0}, ["prose", "law"])
    expected = map_tensors(tables.stats({}), lambda column_KN: column_KN[[2, 0]][:, is_kept_N])
    assert torch.equal(stats.label_logp_KN, expected.label_logp_KN)
    assert torch.equal(stats.consensus_kl(), expected.consensus_kl())


@pytest.mark.parametrize("weighting", SCALAR_CASES, ids=str)
def test_pool_nll_from_scalars_equals_that_of_the_fused_target(weighting):
    teachers, rows, _ = _noisy(30)
    block = fused(Fusion(weighting=weighting), teachers, rows)
    nll_N = linear_pool_nll(stats_of(teachers, rows), weighting, rows, NAMES)
    expected_N = -block.logp().gather(1, rows.labels[:, None])[:, 0]
    torch.testing.assert_close(nll_N, expected_N, rtol=0, atol=1e-10)


@pytest.mark.parametrize("weighting", SCALAR_CASES, ids=str)
def test_joint_temperatures_are_a_minimum_along_each_axis(weighting):
    teachers, rows, _ = _noisy(200)
    grid = (0.5, 0.8, 1.0, 1.3, 2.0, 3.0)
    tables = temperature_tables(teachers, rows, grid=grid)
    fitted = fit_joint_temperatures(tables, weighting, num_rounds=10)

    def nll(temperatures: dict[str, float]) -> float:
        fusion = Fusion(weighting=weighting, temperatures=temperatures)
        logp_nV = fused(fusion, teachers, rows, 50).logp()
        return -logp_nV.gather(1, rows.labels[:, None]).mean().item()

    best = nll(fitted)
    assert best <= nll({}) + 1e-9
    for name in NAMES:
        for temperature in grid:
            assert nll({**fitted, name: temperature}) >= best - 1e-6
        if weighting.excludes(name):
            assert fitted[name] == 1.0


def test_joint_fit_cools_the_overconfident_teacher():
    teachers, rows, _ = _noisy(600)
    tables = temperature_tables(teachers, rows)
    fitted = fit_joint_temperatures(tables, Entropy())
    assert fitted["law"] > 1.5 * max(fitted["medicine"], fitted["prose"])


def test_raw_is_on_the_grid():
    assert 1.0 in TEMPERATURES
    assert (TEMPERATURES[0], TEMPERATURES[-1]) == (1 / 16, 32.0)
    assert list(TEMPERATURES) == sorted(TEMPERATURES)
