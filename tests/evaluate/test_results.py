"""Rows of results.json."""

from __future__ import annotations

import json
import math

import numpy as np

from collegium.errors import CollegiumError
from collegium.evaluate.metrics import Metrics, ScoredTokens, perplexity
from collegium.evaluate.scoring import FUSED, Windows, results_rows, score_models
from collegium.fusion.fuse import Fusion
from collegium.storage.records import ModelInfo, ResultRow
from evaluation_cases import BigramTeacher, bigram_logits, id_dataset, walks
from refusals import refused

DATASET = id_dataset(
    walks(vocab_size=8, step=1, noise=0.2, number=6, length=12, seed=0), ["x"] * 6, max_length=12
)


def model(name: str, sharpness: float) -> BigramTeacher:
    return BigramTeacher(name, bigram_logits(vocab_size=8, step=1, sharpness=sharpness))


def rows() -> list[ResultRow]:
    teachers = [model("a", 3.0), model("b", 2.0)]
    models = [model("distilled", 2.5), model("untouched", 0.1), *teachers, model("ce_only", 1.0)]
    scored = score_models(models, teachers, Fusion(), Windows.spread(DATASET, 4))
    about = [
        ModelInfo(name="distilled", kind="student", steps=10, train_tokens=99),
        ModelInfo(name="untouched", kind="untouched", num_parameters=1_100_000),
        ModelInfo(name="ce_only", kind="control", note="equal steps"),
        ModelInfo(name="a", kind="teacher", num_parameters=2_560_000_000),
        ModelInfo(name="b", kind="teacher", num_parameters=999),
    ]
    return results_rows(scored, about)


def test_rows_have_the_keys_of_the_file_format() -> None:
    table_rows = rows()
    assert [row.kind for row in table_rows] == [
        "untouched", "teacher", "teacher", "fused", "control", "student",
    ]  # fmt: skip
    for row in table_rows:
        assert set(row.to_json()) == set(ResultRow.model_fields)
        assert row.reliability is not None
        assert row.entropy_bins is not None
        assert len(row.reliability.count) == len(row.reliability.accuracy)
        # 6 documents of 12 tokens have 11 targets each, of 2 bytes.
        assert sum(count or 0 for count in row.entropy_bins.count) == row.num_tokens == 66
        assert row.num_bytes == 132
    assert table_rows[3].name == FUSED
    assert table_rows[3].num_parameters is None
    assert table_rows[4].note == "equal steps"
    assert table_rows[5].steps == 10
    json.dumps([row.to_json() for row in table_rows], allow_nan=False)


def test_infinite_values_become_null() -> None:
    ones = np.ones(2, np.float32)
    infinite = Metrics(
        targets=ScoredTokens(np.zeros(2, int), np.zeros(2, int), np.zeros(2, int), ("x",)),
        nll_N=np.array([math.inf, 1.0], np.float32),
        entropy_N=ones,
        confidence_N=ones,
        is_correct_N=ones > 0,
    )
    (row,) = results_rows({"a": infinite}, [ModelInfo(name="a", kind="teacher")])
    json.dumps(row.to_json(), allow_nan=False)
    assert row.nll is row.perplexity is row.bits_per_byte is row.overconfidence is None
    (domain,) = row.domains.values()
    assert domain.nll is domain.perplexity is domain.bits_per_byte is None
    assert domain.overconfidence is None
    assert (domain.entropy, domain.num_tokens) == (1.0, 2)


def test_a_huge_nll_has_no_perplexity() -> None:
    huge = score_models([model("a", 0.1)], [], None, Windows.spread(DATASET, 4))["a"]
    # exp(5000) overflows float64.
    big = Metrics(
        targets=huge.targets,
        nll_N=huge.nll_N + np.float32(5000),
        entropy_N=huge.entropy_N,
        confidence_N=huge.confidence_N,
        is_correct_N=huge.is_correct_N,
    )
    assert perplexity(big.nll) == math.inf
    assert big.scores().perplexity is None


def test_a_model_without_description() -> None:
    scored = score_models([model("a", 3.0)], [], None, Windows.spread(DATASET, 4))
    with refused(CollegiumError, "results"):
        results_rows(scored, [])
