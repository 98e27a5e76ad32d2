"""Intervals of differences between two models: over documents, and over seeds.

Shapes: D documents.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
"""Draws of the bootstrap."""
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom."""
Interval = tuple[float, float]
Sums = tuple[NDArray[np.float64], NDArray[np.int64]]
"""(D,) sums over the tokens of each document, and (D,) numbers of tokens."""


def document_interval(strata: Sequence[Sums]) -> Interval | None:
    """Return the 95 % interval of a mean per token, averaged over strata such as seeds.

    The documents of each stratum are drawn with replacement. For the difference of two models the
    sums are differences, so that the difficulty of a document cancels out. None if a stratum has
    fewer than two documents.

    Source: Koehn 2004, "Statistical significance tests for machine translation evaluation",
    https://aclanthology.org/W04-3250.
    """
    if not strata or any(len(total_D) < 2 for total_D, _ in strata):
        return None
    means = np.zeros(DRAWS)
    generator = np.random.default_rng(0)
    for total_D, count_D in strata:
        size = len(total_D)
        # Only how often a document is drawn matters: one multinomial draw per replicate.
        times_dD = generator.multinomial(size, np.full(size, 1 / size), size=DRAWS)
        means += (times_dD @ total_D) / (times_dD @ count_D) / len(strata)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def seed_interval(values: Sequence[float]) -> Interval | None:
    """Return the 95 % interval of a mean over seeds, mean ± t s / sqrt(n); None for one seed.

    Source: Student 1908, "The probable error of a mean".
    """
    num_seeds = len(values)
    if num_seeds < 2:
        return None
    # Beyond the table, the interval is a little wide.
    quantile = T_975[min(num_seeds - 2, len(T_975) - 1)]
    mean = statistics.fmean(values)
    half = quantile * statistics.stdev(values) / math.sqrt(num_seeds)
    return mean - half, mean + half
