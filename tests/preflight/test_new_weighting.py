"""A new weighting is one class and one line of the table, also for preflight and recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from torch import Tensor

from collegium.config.recipe import decode_fusion
from collegium.fusion.fitted import WEIGHTINGS
from collegium.fusion.rules import constant_scores
from collegium.fusion.weighting import CalibrationData, FittedWeighting, RowStats
from collegium.options import option
from collegium.preflight.measure import run_preflight
from collegium.types import Rows
from evaluation_cases import BigramTeacher, bigram_logits, id_dataset, walks

VOCAB = 24


@option
class Accuracy(FittedWeighting):
    """Weights in proportion to how often a teacher's most likely token was the label."""

    shares: dict[str, float]

    def teacher_tables(self) -> Mapping[tuple[str, ...], Mapping[str, object]]:
        return {("shares",): self.shares}

    def log_scores(self, stats: RowStats, rows: Rows, teachers: Sequence[str]) -> Tensor:
        return constant_scores([self.shares[name] for name in teachers], stats)

    @classmethod
    def fit(cls, data: CalibrationData) -> Accuracy:
        is_top1_KN = data.raw.label_logp_KN == data.raw.max_logp_KN
        shares = is_top1_KN.double().mean(1).tolist()
        return cls(shares=dict(zip(data.teachers, shares, strict=True)))


def test_one_class_and_one_line_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WEIGHTINGS, "accuracy", Accuracy)
    documents = walks(vocab_size=VOCAB, step=1, noise=0.3, number=12, length=25, seed=0)
    data = id_dataset(documents, ["ones"] * 12, max_length=25)
    teachers = [
        BigramTeacher(name, bigram_logits(vocab_size=VOCAB, step=step, sharpness=4.0))
        for name, step in (("one", 1), ("five", 5))
    ]
    report = run_preflight(teachers, data, batch_size=4, extended=True).to_json()
    tried = [row for row in report["fusions"] if row["fusion"]["weighting"]["name"] == "accuracy"]
    assert {row["fusion"]["pool"] for row in tried} == {"linear", "log_linear", "power_mean"}
    (raw,) = [
        row["fusion"]
        for row in tried
        if row["fusion"]["pool"] == "linear" and row["calibration"] == "raw"
    ]
    assert raw["weighting"]["shares"]["one"] > 0.5 > raw["weighting"]["shares"]["five"]
    fusion = decode_fusion(raw)
    assert isinstance(fusion.weighting, Accuracy)
    assert fusion.weighting.shares == raw["weighting"]["shares"]
    # It is fitted, so the standard search leaves it out.
    standard = run_preflight(teachers, data, batch_size=4).to_json()
    assert "accuracy" not in {row["fusion"]["weighting"]["name"] for row in standard["fusions"]}
