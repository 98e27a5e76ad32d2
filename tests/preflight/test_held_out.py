"""Figures of teachers and their fusion on text that nothing was fitted on."""

from __future__ import annotations

import pytest

from collegium.evaluate.scoring import Windows
from collegium.fusion.fuse import Fusion
from collegium.preflight.held_out import held_out_report
from evaluation_cases import BigramTeacher, bigram_logits, id_dataset, walks

VOCAB = 24


def test_a_teacher_may_have_the_name_of_a_calibrated_one() -> None:
    documents = walks(vocab_size=VOCAB, step=1, noise=0.3, number=4, length=25, seed=0)
    data = id_dataset(documents, ["ones"] * 4, max_length=25)
    teachers = [
        BigramTeacher(name, bigram_logits(vocab_size=VOCAB, step=step, sharpness=4.0))
        for name, step in (("a", 1), ("a (calibrated)", 5))
    ]
    report = held_out_report(
        teachers, Fusion(), Windows.spread(data, 2), {"a": 2.0, "a (calibrated)": None}
    ).to_json()
    a, other = report["teachers"].values()
    assert list(report["teachers"]) == ["a", "a (calibrated)"]
    assert a["raw"]["nll"] < other["raw"]["nll"] - 1
    assert a["calibrated"]["nll"] != pytest.approx(a["raw"]["nll"])
    # Without a fitted temperature a teacher is scored as it is.
    assert other["calibrated"] == other["raw"]
