import dataclasses
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import run_fixture
from collegium.report import canvas, colors, plots
from collegium.report.run_files import RunFiles, read_run
from collegium.storage import records

KEYS = ["perplexity", "loss", "weights", "conflict", "trust", "disagreement", "gradients"]


def _run(tmp_path: Path, **options: object) -> RunFiles:
    return read_run(
        run_fixture.write_run(tmp_path / "run", **options)  # type: ignore[arg-type]
    )


def _keys(run: RunFiles) -> list[str]:
    drawn = plots.draw_all(run)
    for svg in drawn.values():
        assert ET.fromstring(svg).tag.endswith("svg")
    return list(drawn)


@pytest.mark.parametrize("num_teachers", [2, 10, 23])
def test_draws_every_plot_for_any_number_of_teachers(num_teachers: int, tmp_path: Path) -> None:
    names = [f"teacher {i} with quite a long name" for i in range(num_teachers)]
    assert _keys(_run(tmp_path, teachers=names, steps=5)) == KEYS


def test_one_teacher_has_no_disagreement(tmp_path: Path) -> None:
    assert _keys(_run(tmp_path, teachers=["only"], steps=5)) == [
        k for k in KEYS if k not in ("conflict", "disagreement")
    ]


def test_without_teachers(tmp_path: Path) -> None:
    run = _run(tmp_path, teachers=[], controls=[], steps=5)
    assert _keys(run) == [k for k in KEYS if k not in ("weights", "conflict", "disagreement")]


@pytest.mark.parametrize("steps", [1, 2, 400])
def test_draws_any_number_of_logged_steps(steps: int, tmp_path: Path) -> None:
    assert _keys(_run(tmp_path, steps=steps)) == KEYS


def test_empty_runs_have_no_plots() -> None:
    assert plots.draw_all(RunFiles("empty")) == {}
    assert (
        plots.draw_all(RunFiles("empty", log=(), results=(), preflight=records.PreflightReport()))
        == {}
    )


def test_values_that_are_all_null_give_no_plot() -> None:
    line = records.LogStep(
        step=3, terms={"ce": None}, teacher_weights={"a": None}, grad_shares={"ce": None}
    )
    row = records.ResultRow(name="student", kind="student", reliability=None)
    assert _keys(RunFiles("nulls", log=(line,), results=(row,))) == []


def test_gaps_and_oversized_values_are_skipped(tmp_path: Path) -> None:
    run = _run(tmp_path, steps=70)
    assert run.log is not None
    assert run.results is not None
    broken = [
        line.model_copy(update={"loss": None, "terms": {"kd": None, "ce": 1e300}})
        for line in run.log[:9]
    ]
    results = [row.model_copy(update={"perplexity": 1e250}) for row in run.results]
    run = dataclasses.replace(run, log=(*broken, *run.log[9:]), results=tuple(results))
    assert _keys(run) == KEYS


def test_empty_bins_are_skipped(tmp_path: Path) -> None:
    empty = records.Reliability(confidence=[None] * 3, accuracy=[None] * 3, count=[0.0] * 3)
    row = records.ResultRow(name="a", kind="teacher", perplexity=2.7, reliability=empty)
    assert _keys(RunFiles("bins", results=(row,))) == ["perplexity"]


def test_same_data_gives_same_bytes(tmp_path: Path) -> None:
    run = _run(tmp_path, steps=4)
    assert plots.draw_all(run) == plots.draw_all(run)


def test_plots_ignore_user_settings(tmp_path: Path) -> None:
    import matplotlib

    run = _run(tmp_path, steps=4)
    expected = plots.draw_all(run)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        assert plots.draw_all(run) == expected


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("_hidden", " _hidden"),
        ("$x^2$", "$x^2$"),
        (r"$\frac{$", r"$\frac{$"),
        ("two\nlines\tand\x00nul", "two lines andnul"),
        ("数学", "□□"),
        ("", "(no name)"),
        ("a" * 60 + "-7b", "a" * 17 + "…" + "aaaaa-7b"),
    ],
)
def test_labels_are_always_drawable(name: str, drawn: str, tmp_path: Path) -> None:
    assert canvas.label(name) == drawn
    assert len(_keys(_run(tmp_path, teachers=[name, "b"], domains=[name], steps=2))) == 7


def test_a_teacher_keeps_its_color_and_the_second_ten_get_dashes() -> None:
    names = [str(i) for i in range(12)]
    assert len({colors.teacher_color(name, names) for name in names[:10]}) == 10
    assert colors.teacher_color("1", names) == colors.teacher_color("11", names)
    assert colors.teacher_dash("1", names) != colors.teacher_dash("11", names)


def test_domain_weights_average_the_logged_steps() -> None:
    log = [
        records.LogStep(step=1, domain_weights={"news": {"a": 0.2, "b": 0.8}}),
        records.LogStep(step=2, domain_weights={"news": {"a": 0.6, "b": None}}),
        records.LogStep(step=3),
    ]
    domains, table = plots.domain_means(log, ["a", "b"], lambda line: line.domain_weights)
    assert domains == ["news"]
    assert table.tolist() == [[pytest.approx(0.4), pytest.approx(0.8)]]


def test_running_mean_keeps_gaps_and_levels() -> None:
    values = canvas.array([1.0, 1.0, None, 1.0, 1.0, 7.0])
    smooth = canvas.running_mean(values, 3)
    assert smooth[:2].tolist() == [1.0, 1.0]
    assert smooth[2] != smooth[2]
    assert smooth[4] == pytest.approx(3.0)
