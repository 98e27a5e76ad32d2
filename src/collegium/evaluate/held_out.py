"""What a pre-flight says of text that it neither fits nor chooses anything on: how well everyone is calibrated, by domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collegium.data.pack import PackedDataset
from collegium.evaluate.metrics import Metrics, finite
from collegium.evaluate.scoring import FUSED, Progress, Scorer, score_models
from collegium.fusion.pooling import Fusion
from collegium.types import Batch, RowLogits, Rows, TeacherRows

CALIBRATED = " at its temperature"
"""Behind the name of a teacher, in the second of its two rows."""


def held_out_report(
    teachers: Sequence[Scorer],
    fusion: Fusion,
    dataset: PackedDataset,
    *,
    temperatures: Mapping[str, float | None],
    batch_size: int,
    max_tokens: int | None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """NLL, entropy, over-confidence and ECE of each teacher, raw and at its own temperature, and of the fused target.

    Returns: `{"num_tokens", "teachers": {name: {"raw": figures, "temperature": T, "calibrated": figures}}, "fused": figures}`, with figures
    `{"nll", "entropy", "overconfidence", "ece", "ece_over", "ece_under", "domains": {domain: the same}}`.

    Raises:
        DataError: the split holds no target token.
    """
    calibrated = [_Calibrated(teacher, temperatures[teacher.name] or 1.0) for teacher in teachers]
    scored = score_models(
        [*teachers, *calibrated],
        teachers,
        fusion,
        dataset,
        batch_size=batch_size,
        max_tokens=max_tokens,
        progress=progress,
    )
    return {
        "num_tokens": len(scored[FUSED].targets),
        "teachers": {
            one.teacher.name: {
                "raw": _figures(scored[one.teacher.name]),
                "temperature": one.temperature,
                "calibrated": _figures(scored[one.name]),
            }
            for one in calibrated
        },
        "fused": _figures(scored[FUSED]),
    }


def _figures(metrics: Metrics) -> dict[str, Any]:
    everywhere_N = np.ones(len(metrics.nll_N), dtype=np.bool_)
    return {
        "nll": finite(metrics.nll),
        **metrics.calibration(everywhere_N),
        "domains": metrics.by_domain(),
    }


@dataclass(frozen=True)
class _Calibrated:
    """A teacher with all its logits divided by one temperature."""

    teacher: Scorer
    temperature: float

    @property
    def name(self) -> str:
        return f"{self.teacher.name}{CALIBRATED}"

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> TeacherRows:
        answer = self.teacher.score(batch, rows, taps)
        return replace(answer, name=self.name, scores=_Divided(answer.scores, self.temperature))


@dataclass(frozen=True)
class _Divided:
    rows: RowLogits
    temperature: float

    def logits(self, block: slice) -> Tensor:
        return torch.div(self.rows.logits(block), self.temperature)
