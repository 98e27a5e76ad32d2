"""Means of scored tokens."""

import numpy as np
import pytest

from collegium.evaluate.metrics import Metrics, ScoredTokens


def test_overconfidence_is_the_nll_minus_the_entropy():
    zeros = np.zeros(2, np.int64)
    metrics = Metrics(
        targets=ScoredTokens(zeros, zeros, zeros, ("d",)),
        nll_N=np.array([1.0, 3.0], np.float32),
        entropy_N=np.array([0.5, 1.0], np.float32),
        confidence_N=np.array([0.5, 0.5], np.float32),
        is_correct_N=np.array([True, False]),
    )
    assert metrics.overconfidence == pytest.approx(2.0 - 0.75)
    assert metrics.calibration().overconfidence == pytest.approx(2.0 - 0.75)
