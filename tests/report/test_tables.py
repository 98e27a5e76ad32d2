"""Tables of a run, and their renderers."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

import run_fixture
from collegium.report import run_tables
from collegium.report.run_files import RunFiles, read_run
from collegium.report.tables import Column, Line, Table
from collegium.storage.records import CandidateFusion, PreflightReport, ResultRow


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    return read_run(run_fixture.write_run(tmp_path / "run", steps=2))


def printed(table: Table, width: int = 160) -> str:
    console = Console(width=width, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(table.rich())
    return capture.get()


def texts(table: Table) -> dict[str, list[str]]:
    return {line.name: [cell.text for cell in cells] for line, cells in table.rows()}


def best(table: Table) -> set[tuple[str, str]]:
    """Return (line, column) of every emphasized cell."""
    return {
        (line.name, column.title)
        for line, cells in table.rows()
        for column, cell in zip(table.columns, cells, strict=True)
        if cell.is_best
    }


def test_only_trained_models_compete(run: RunFiles) -> None:
    marked = best(run_tables.evaluation_table(run))
    assert ("student (distilled)", "Perplexity") in marked
    assert {name for name, _ in marked} <= {
        "student (distilled)", "CE only, equal steps", "uniform weights",
    }  # fmt: skip


def test_equal_texts_are_both_the_best_and_missing_values_none() -> None:
    column = Column[float | None]("x", lambda row: row, rank=lambda value: value)
    values = [1.0001, 1.0002, 2.0, None]
    table = Table("t", "name", [column], [Line(str(i), v) for i, v in enumerate(values)])
    assert best(table) == {("0", "x"), ("1", "x")}
    assert texts(table)["3"] == ["–"]


def test_a_single_value_is_not_the_best() -> None:
    column = Column[float]("x", lambda row: row, rank=lambda value: value)
    assert best(Table("t", "name", [column], [Line("a", 1.0)])) == set()


def test_terminal_table_fits_80_columns(run: RunFiles) -> None:
    table = run_tables.evaluation_table(run)
    text = printed(table, width=80)
    for heading in ("params", "ppl", "bits/", "ECE", "NLL − H", "KL to", "agree"):
        assert heading in text
    (student,) = [line for line in text.splitlines() if "student (distilled)" in line]
    assert student.split()[2:5] == ["1.10", "M", "118.0"]
    assert "…" not in text
    assert [line.strip() for line in text.splitlines() if line.strip() in ("Distilled", "Controls")]


def test_markup_in_a_name_is_text() -> None:
    run = RunFiles("run", results=(ResultRow(name="[red]a", kind="teacher", perplexity=2.0),))
    assert "[red]a" in printed(run_tables.evaluation_table(run))


def test_markdown_escapes_bars_and_marks_the_best() -> None:
    column = Column[float]("x|y", lambda row: row, rank=lambda value: value)
    table = Table("t", "name", [column], [Line("a|b", 2.0), Line("c", 1.0)])
    assert table.markdown().splitlines() == [
        "| name | x\\|y |",
        "| --- | ---: |",
        "| a\\|b | 2.000 |",
        "| c | **1.000** |",
    ]


def test_preflight_tables(run: RunFiles) -> None:
    tables = run_tables.preflight_tables(run)
    assert [table.title.partition(":")[0] for table in tables] == [
        "Individual teachers",
        "NLL of teachers by domain",
        "Candidate fusions",
        "Chosen fusion",
        "Disagreement",
        "Calibration on held-out text",
    ]
    assert run.preflight is not None
    nll = run.preflight.teachers["newsroom"].nll
    text = "".join(printed(table) for table in tables)
    assert f"{nll:.3f}" in text
    assert "4.5800" in text
    assert "0.000 / 0 %" in text
    assert "+1.20 / 12.0" in text
    assert run_tables.preflight_tables(RunFiles("run")) == []


def test_teachers_are_compared_by_domain(run: RunFiles) -> None:
    scores, by_domain = run_tables.teacher_tables(run)
    assert best(by_domain) == set(zip(run_fixture.TEACHERS, run_fixture.DOMAINS, strict=True))
    assert texts(scores)["newsroom"][-2:] == ["25.0 %", "+0.100"]


def test_the_chosen_fusion_is_shown_wherever_it_ranks() -> None:
    fusions = [CandidateFusion(nll=float(i), is_chosen=i == 14) for i in range(20)]
    shown, rest = run_tables.fusion_tables(
        RunFiles("run", preflight=PreflightReport(fusions=fusions))
    )
    assert [line.row.nll for line in shown.lines] == [*range(10), 14]
    assert rest.title == "9 more"


@pytest.mark.parametrize(
    ("weighting", "title", "rows"),
    [
        ({"name": "prefix_likelihood", "eta": 0.3, "decay": 0.9},
         "prefix_likelihood(eta=0.3, decay=0.9), linear", {}),
        ({"name": "fixed", "weights": {"a": 0.25, "b": 0.75}},
         "fixed, linear", {"weights": ["0.25", "0.75"]}),
        ({"name": "domain_weights", "weights": {"x": {"a": 0.9, "b": 0.1}}, "default": {"b": 1.0}},
         "domain_weights, linear", {"weights, x": ["0.9", "0.1"], "default": ["", "1"]}),
        ({"name": "gate", "offsets": {"a": -0.5}, "entropy": 2.0},
         "gate, linear", {"offsets": ["−0.5", ""], "entropy": ["", "2"]}),
        ({"name": "calibrated_entropy", "maps": {"a": [[0.0, 1.0]] * 32}, "tau": 1.0},
         "calibrated_entropy, linear", {"maps": ["32 knots", ""], "tau": ["", "1"]}),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) and "name" in value else "",
)  # fmt: skip
def test_a_fusion_is_a_name_and_a_table(
    weighting: dict[str, object], title: str, rows: dict[str, list[str]]
) -> None:
    table = run_tables.number_table({"weighting": weighting, "pool": "linear"})
    assert table.title == title
    assert texts(table) == rows


def test_temperatures_and_policies_are_part_of_the_name() -> None:
    fusion = {
        "weighting": {"name": "uniform"},
        "pool": "power_mean",
        "exponent": 0.5,
        "temperatures": {"a": 1.5},
        "pooled_temperature": 0.9,
        "conflict": {"name": "truth_fallback", "power": 2.0},
    }
    table = run_tables.number_table(fusion)
    assert table.title == (
        "uniform, power_mean(r=0.5), temperatures, pooled_temperature=0.9, truth_fallback(power=2)"
    )
    assert texts(table) == {"temperatures": ["1.5"]}


def test_costs_are_relative_to_the_student(run: RunFiles) -> None:
    rows = texts(run_tables.cost_table(run))
    assert rows["student (distilled)"][-1] == "–"
    assert rows["uniform weights"] == [
        "1,102,464", "1.00 ×", "900", "1.84 M", "2 min 22 s", "13.0 k/s", "−8.5 %",
    ]  # fmt: skip
    assert rows["all teachers combined"][:2] == ["10,245,120", "9.29 ×"]


def test_stages_end_with_their_total(run: RunFiles) -> None:
    rows = texts(run_tables.stage_table(run))
    assert rows["train"] == ["done", "2026-01-05 10:02:00", "2 min 35 s", "28.1 %", ""]
    assert rows["total"][2:4] == ["9 min 12 s", "100.0 %"]


def test_wide_tables_are_split_into_parts_that_fit():
    names = [f"domain-{i}" for i in range(9)]
    columns = [Column(name, lambda row: row, lambda value: "+1.20 / 12.0") for name in names]
    table = Table("Calibration", "Model", columns, [Line("a", 1), Line("b", 2)])
    parts = table.parts()
    assert [column.title for part in parts for column in part.columns] == names
    assert [len(part.columns) for part in parts] == [6, 3]
    assert all(part.lines == table.lines for part in parts)
    # A single column wider than the page is a part of its own.
    wide = [Column("x", str, lambda value: 30 * "1234567890") for _ in range(2)]
    assert len(Table("", "", wide, [Line("a", 1)]).parts()) == 2


def test_temperatures_that_are_no_optimum_are_marked():
    measures = {
        "fitted": {"temperature": 1.5},
        "too certain": {"temperature": 32.0, "grid_end": "highest"},
        "too timid": {"temperature": 1.0, "grid_end": "lowest"},
        "cached": {"temperature": None},
    }
    run = RunFiles("run", preflight=PreflightReport.model_validate({"teachers": measures}))
    table = run_tables.teacher_tables(run)[0]
    column = [column.title for column in table.columns].index("T")
    texts = [cells[column].text for _, cells in table.rows()]
    assert texts == ["1.50", "≥ 32.00", "≤ 1.00", "–"]


def test_a_fusion_names_its_temperatures_at_an_end_of_the_grid():
    fusions = [
        {"calibration": "pooled", "grid_ends": {}},
        {"calibration": "temperatures", "grid_ends": {"law": "highest", "prose": "lowest"}},
        {"calibration": None},
    ]
    run = RunFiles("run", preflight=PreflightReport.model_validate({"fusions": fusions}))
    table = run_tables.fusion_tables(run)[0]
    texts = [cells[0].text for _, cells in table.rows()]
    assert texts == ["pooled", "temperatures (end of the grid: law, prose)", "–"]
