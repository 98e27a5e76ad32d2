"""Tables of the student as a draft model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from collegium.report.draft_tables import acceptance_table, expected_tokens
from collegium.report.page import render_run
from collegium.report.run_files import read_run
from run_fixture import write_run


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8, 1.0])
def test_expected_tokens_are_those_of_a_simulation(rate: float) -> None:
    """Tokens are kept up to the first that is refused, and the target adds one of its own."""
    rng, passes = random.Random(0), 20_000
    total = 0
    for _ in range(passes):
        kept = 0
        while kept < 4 and rng.random() < rate:
            kept += 1
        total += kept + 1
    assert expected_tokens(rate, 4) == pytest.approx(total / passes, abs=0.04)


def test_a_line_per_teacher_and_a_column_per_trained_model(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    table = acceptance_table(run)
    assert [column.title for column in table.columns] == [
        *("student (distilled)", "Tokens per pass, 4 drafted"),
        *("CE only, equal steps", "uniform weights"),
    ]
    cells = [[cell.text for cell in cells] for _, cells in table.rows()]
    assert [row[0] for row in cells] == [
        *("60.0 % (59.0 … 61.0)", "55.0 % (54.0 … 56.0)"),
        *("50.0 % (49.0 … 51.0)", "45.0 % (44.0 … 46.0)"),
    ]
    assert cells[0][1] == "2.306"
    assert "60.0 % (59.0 … 61.0)" in render_run(run)


def test_results_of_an_older_version_have_no_table(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", teachers=()))
    assert not acceptance_table(run).lines
