"""Rows of results.json and their tables."""

from __future__ import annotations

import json
import math

import numpy as np
from rich.console import Console
from rich.table import Table

from collegium.errors import CollegiumError
from collegium.evaluate.metrics import Metrics, ScoredTokens
from collegium.evaluate.scoring import FUSED, score_models
from collegium.evaluate.table import (
    ModelInfo,
    markdown_table,
    preflight_tables,
    render_table,
    results_rows,
)
from collegium.fusion.fuse import Fusion
from collegium.preflight.measure import run_preflight
from collegium.report.files import ResultRow
from evaluation_cases import BigramTeacher, bigram_logits, id_dataset, walks
from refusals import refused

DATASET = id_dataset(
    walks(vocab_size=8, step=1, noise=0.2, number=6, length=12, seed=0), ["x"] * 6, max_length=12
)


def model(name: str, sharpness: float) -> BigramTeacher:
    return BigramTeacher(name, bigram_logits(vocab_size=8, step=1, sharpness=sharpness))


def rows() -> list[dict]:
    teachers = [model("a", 3.0), model("b", 2.0)]
    models = [model("distilled", 2.5), model("untouched", 0.1), *teachers, model("ce_only", 1.0)]
    scored = score_models(models, teachers, Fusion(), DATASET, batch_size=4)
    model_info = {
        "distilled": ModelInfo(kind="student", num_parameters=1_100_000, steps=10, train_tokens=99),
        "untouched": ModelInfo(kind="untouched", num_parameters=1_100_000),
        "ce_only": ModelInfo(kind="control", num_parameters=1_100_000, note="equal steps"),
        "a": ModelInfo(kind="teacher", num_parameters=2_560_000_000),
        "b": ModelInfo(kind="teacher", num_parameters=999),
    }
    return results_rows(scored, model_info)


def printed(table: Table) -> str:
    console = Console(width=160, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_rows_have_the_keys_of_the_file_format() -> None:
    table_rows = rows()
    assert [row["kind"] for row in table_rows] == [
        "untouched", "teacher", "teacher", "fused", "control", "student",
    ]  # fmt: skip
    expected = set(ResultRow.model_fields)
    for row in table_rows:
        assert expected <= set(row)
        ResultRow.model_validate(row)
        assert len(row["reliability"]["count"]) == len(row["reliability"]["accuracy"])
        # 6 documents of 12 tokens have 11 targets each, of 2 bytes.
        assert sum(row["entropy_bins"]["count"]) == row["num_tokens"] == 66
        assert row["num_bytes"] == 132
    assert table_rows[3]["name"] == FUSED
    assert table_rows[3]["num_parameters"] is None
    assert table_rows[4]["note"] == "equal steps"
    assert table_rows[5]["steps"] == 10
    json.dumps(table_rows, allow_nan=False)


def test_infinite_values_become_null() -> None:
    ones = np.ones(2, np.float32)
    infinite = Metrics(
        name="a",
        targets=ScoredTokens(np.zeros(2, int), np.zeros(2, int), np.zeros(2, int), ("x",)),
        nll_N=np.array([math.inf, 1.0], np.float32),
        entropy_N=ones,
        confidence_N=ones,
        is_correct_N=ones > 0,
    )
    (row,) = results_rows({"a": infinite}, {"a": ModelInfo(kind="teacher")})
    json.dumps(row, allow_nan=False)
    assert row["nll"] is row["perplexity"] is row["bits_per_byte"] is row["overconfidence"] is None
    (domain,) = row["domains"].values()
    assert domain["nll"] is domain["perplexity"] is domain["bits_per_byte"] is None
    assert domain["overconfidence"] is None
    assert (domain["entropy"], domain["num_tokens"]) == (1.0, 2)
    assert markdown_table([row]).splitlines()[2].startswith("| a | – | – | – |")


def test_a_huge_nll_has_no_perplexity() -> None:
    huge = score_models([model("a", 0.1)], [], None, DATASET, batch_size=4)["a"]
    # exp(5000) overflows float64.
    big = Metrics(
        name="a",
        targets=huge.targets,
        nll_N=huge.nll_N + np.float32(5000),
        entropy_N=huge.entropy_N,
        confidence_N=huge.confidence_N,
        is_correct_N=huge.is_correct_N,
    )
    assert big.perplexity == math.inf
    assert big.to_dict()["perplexity"] is None


def test_a_model_without_description() -> None:
    scored = score_models([model("a", 3.0)], [], None, DATASET, batch_size=4)
    with refused(CollegiumError, "results"):
        results_rows(scored, {})


def test_terminal_table() -> None:
    text = printed(render_table(rows()))
    for column in ("params", "ppl", "bits/", "NLL-H", "ECE", "KL to", "agree"):
        assert column in text
    lines = text.splitlines()
    (distilled,) = [line for line in lines if "distilled" in line]
    assert "1.10M" in distilled
    assert f"{rows()[5]['perplexity']:.2f}" in distilled
    assert "100.0%" in distilled
    (teacher,) = [line for line in lines if "2.56B" in line]
    assert " a " in teacher


def test_markup_in_a_name_is_text() -> None:
    scored = score_models([model("[red]a", 3.0)], [], None, DATASET, batch_size=4)
    table_rows = results_rows(scored, {"[red]a": ModelInfo(kind="teacher")})
    assert "[red]a" in printed(render_table(table_rows))


def test_markdown_table() -> None:
    lines = markdown_table(rows()).splitlines()
    assert lines[0].startswith("| model | params | perplexity | bits/byte |")
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert len(lines) == 2 + 6
    assert lines[5].startswith("| fused target | – | ")
    assert {line.count("|") for line in lines} == {9}


def test_preflight_tables() -> None:
    teachers = [model("a", 3.0), model("b", 1.0)]
    report = run_preflight(teachers, DATASET, batch_size=4)
    tables = preflight_tables(report)
    text = "".join(printed(table) for table in tables)
    assert len(tables) == 3
    assert f"{report['teachers']['a']['perplexity']:.2f}" in text
    assert f"{report['chosen']['nll']:.4f}" in text
    assert "0.000 / 0%" in text
