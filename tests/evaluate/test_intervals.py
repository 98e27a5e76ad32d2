"""Intervals over documents and seeds, and the file of sums by document."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from collegium.errors import CollegiumError
from collegium.evaluate.documents import difference_sums, documents_file
from collegium.evaluate.intervals import T_975, document_interval, seed_interval
from collegium.evaluate.metrics import Metrics, ScoredTokens
from collegium.study.comparison import Comparison
from refusals import refused


def sums(mean: float, spread: float, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    count_D = generator.integers(20, 200, size)
    return count_D * generator.normal(mean, spread, size), count_D


def test_documents_are_drawn_within_each_stratum() -> None:
    strata = [sums(-0.2, 0.3, 200, 1), sums(0.4, 0.3, 300, 2)]
    low, high = document_interval(strata) or (0.0, 0.0)
    # Naive: draw the documents one by one.
    generator = np.random.default_rng(7)
    means = []
    for _ in range(2000):
        parts = []
        for total_D, count_D in strata:
            drawn = generator.integers(0, len(total_D), len(total_D))
            parts.append(total_D[drawn].sum() / count_D[drawn].sum())
        means.append(sum(parts) / len(parts))
    expected = np.quantile(means, (0.025, 0.975))
    assert [low, high] == pytest.approx(list(expected), abs=0.01)
    # The difference between the strata is no spread.
    assert high - low < 0.1


@pytest.mark.parametrize("strata", [[], [sums(0, 1, 1, 0)], [sums(0, 1, 9, 0), sums(0, 1, 1, 0)]])
def test_one_document_has_no_interval(strata: list) -> None:
    assert document_interval(strata) is None


@pytest.mark.parametrize("size", range(2, 12))
def test_the_interval_over_seeds_has_the_quantile_of_student(size: int) -> None:
    values = list(np.random.default_rng(size).normal(1.0, 0.5, size))
    low, high = seed_interval(values) or (0.0, 0.0)
    assert (low + high) / 2 == pytest.approx(np.mean(values))
    quantile = (high - low) / 2 / (np.std(values, ddof=1) / math.sqrt(size))
    # The density of t with d degrees of freedom, integrated from 0 to the quantile.
    d = size - 1
    scale = math.gamma((d + 1) / 2) / math.sqrt(d * math.pi) / math.gamma(d / 2)
    t = np.linspace(0.0, quantile, 200_001)
    y = scale * (1 + t**2 / d) ** (-(d + 1) / 2)
    mass = float(np.sum(np.diff(t) * 0.5 * (y[1:] + y[:-1])))
    assert mass == pytest.approx(0.475, abs=2e-5 if size - 2 < len(T_975) else 2e-3)
    assert seed_interval(values[:1]) is None


@pytest.mark.parametrize(
    ("documents", "seeds", "verdict"),
    [
        ((-0.2, -0.1), (-0.3, -0.01), "better"),
        ((0.1, 0.2), (0.01, 0.3), "worse"),
        ((-0.2, -0.1), (-0.3, 0.01), "undecided"),
        ((-0.2, 0.1), (-0.3, -0.01), "undecided"),
        ((-0.2, -0.1), None, "undecided"),
        (None, None, "undecided"),
    ],
)
def test_better_needs_both_intervals(documents, seeds, verdict) -> None:  # type: ignore[no-untyped-def]
    assert Comparison({0: 1.0}, documents, seeds).verdict == verdict


def scored(samples: list[int], nll: list[float]) -> Metrics:
    size = len(samples)
    numbers = np.array(samples)
    targets = ScoredTokens(numbers, numbers % 2, np.ones(size, np.int64), ("even", "odd"))
    zero = np.zeros(size, np.float32)
    return Metrics(
        targets=targets, nll_N=np.array(nll, np.float32), entropy_N=zero, confidence_N=zero,
        is_correct_N=zero > 0,
    )  # fmt: skip


NAMES = ["a", "b", "c", "d"]


def test_sums_by_document_are_paired_by_id(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(documents_file({"x": scored([3, 1, 3, 0], [1, 2, 3, 4])}, NAMES))
    renamed = ["a", "b", "d", "c"]
    other.write_bytes(documents_file({"y": scored([0, 2, 2, 1], [1, 1, 1, 1])}, renamed))
    total_D, count_D = difference_sums(one, "x", other, "y")
    assert dict(zip(count_D.tolist(), total_D.tolist(), strict=False)) == {1: 1.0, 2: 2.0}
    assert sorted(zip(total_D.tolist(), count_D.tolist(), strict=True)) == [(1, 1), (2, 2), (3, 1)]
    # Documents 1 and 3 are of the domain `odd`.
    odd = difference_sums(one, "x", one, "x", ["odd"])
    assert odd[1].tolist() == [1, 2]
    with refused(CollegiumError, "TMP/one: "):
        difference_sums(one, "x", one, "x", ["prime"])


def test_other_documents_are_refused(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(documents_file({"x": scored([0, 1], [1, 2])}, NAMES))
    for samples in ([0, 1, 1], [0, 2], [0]):
        other.write_bytes(documents_file({"x": scored(samples, [1.0] * len(samples))}, NAMES))
        with refused(CollegiumError, "TMP/one: "):
            difference_sums(one, "x", other, "x")
    with refused(CollegiumError, "TMP/one: ", volatile=r"\(.*\)"):
        difference_sums(one, "z", one, "x")
    one.write_bytes(b"PAR1")
    with refused(CollegiumError, "TMP/one: ", volatile=r"\(.*\)"):
        difference_sums(one, "x", other, "x")
