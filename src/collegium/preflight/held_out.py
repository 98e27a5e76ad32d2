"""Calibration of the teachers and the fused target by domain, on text not used for fitting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from collegium.distributions import LIVE, Answer, Capabilities, Teacher, WrappedRows
from collegium.evaluate.scoring import FUSED, Windows, score_models
from collegium.fusion.buffered import buffer_rows, buffered, vocab_size_of
from collegium.fusion.fuse import Fusion
from collegium.storage.records import HeldOut, TeacherCalibration
from collegium.types import Batch, Rows


def held_out_report(
    teachers: Sequence[Teacher],
    fusion: Fusion,
    windows: Windows,
    temperatures: Mapping[str, float | None],
) -> HeldOut:
    """Measure NLL, entropy, overconfidence and ECE of each teacher and of the fused target.

    Each teacher is scored raw and at its individually fitted temperature (None counts as 1).

    Raises:
        DataError: the split has no target tokens.
    """
    # Raw and calibrated teachers share one pass over the data, so all need different names.
    names, suffix = [teacher.name for teacher in teachers], " (calibrated)"
    while any(name + suffix in names for name in names):
        suffix += "*"
    raw = [_LastAnswer(teacher) for teacher in teachers]
    calibrated = [
        _ScaledTeacher(teacher.name + suffix, teacher, temperatures[teacher.name] or 1.0)
        for teacher in raw
    ]
    models = [*raw, *calibrated]
    scored = score_models(models, raw, fusion, windows, with_acceptance=False)
    return HeldOut(
        num_tokens=len(scored[FUSED].targets),
        teachers={
            scaled.teacher.name: TeacherCalibration(
                raw=scored[scaled.teacher.name].calibration(),
                temperature=temperatures[scaled.teacher.name],
                calibrated=scored[scaled.name].calibration(),
            )
            for scaled in calibrated
        },
        fused=scored[FUSED].calibration(),
    )


@dataclass(eq=False)
class _LastAnswer:
    """A teacher whose answer to a batch is computed once, for all that read it."""

    teacher: Teacher
    _last: tuple[Batch, Answer] | None = field(default=None, init=False)

    @property
    def name(self) -> str:
        return self.teacher.name

    @property
    def capabilities(self) -> Capabilities:
        return self.teacher.capabilities

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> Answer:
        if self._last is None or self._last[0] is not batch:
            answer = self.teacher.score(batch, rows, taps)
            size = buffer_rows(vocab_size_of(answer.distribution))
            self._last = batch, buffered([answer], size)[0]
        return self._last[1]


@dataclass(frozen=True)
class _ScaledTeacher:
    """A teacher whose logits are divided by one temperature."""

    name: str
    teacher: Teacher
    temperature: float
    capabilities: Capabilities = LIVE

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> Answer:
        outputs = self.teacher.score(batch, rows, taps)
        return replace(
            outputs,
            name=self.name,
            distribution=_ScaledRows(outputs.distribution, self.temperature),
        )


@dataclass(frozen=True)
class _ScaledRows(WrappedRows):
    temperature: float

    def logits(self, block: slice) -> Tensor:
        # Out of place: the block may belong to the teacher.
        return torch.div(self.inner.logits(block), self.temperature)
