"""The table, sentences and Pareto plots of measurements."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.report.canvas import render_svg
from collegium.report.page import render_run
from collegium.report.run_files import RunFiles
from collegium.report.serving import (
    best_teacher,
    pareto_front,
    pareto_plot,
    serving_sentences,
    serving_table,
)
from collegium.storage.records import MeasuredModel, Measurements, Speed


def model(name: str, kind: str, size: int, decode: float, bits: float | None) -> MeasuredModel:
    speeds = {
        batch: Speed(prefill_tokens_per_s=1000.0, decode_tokens_per_s=decode * factor)
        for batch, factor in (("1", 1), ("8", 5))
    }
    return MeasuredModel(
        name=name, kind=kind, bytes=size, peak_bytes=2 * size, first_token_s=0.0125,
        speeds=speeds, bits_per_byte=bits,
    )  # type: ignore[arg-type]  # fmt: skip


RUN = RunFiles(
    "run",
    measurements=Measurements(
        student="0" * 64,
        processor="a processor",
        threads=1,
        rounds=3,
        prompt_tokens=64,
        new_tokens=32,
        models=[
            model("student", "student", 1000, 100.0, 2.5),
            model("onnx-int8", "export", 300, 400.0, 2.51),
            model("[red]large", "teacher", 6000, 40.0, 2.0),
            model("small", "teacher", 2000, 80.0, 3.0),
            MeasuredModel(name="far", kind="teacher", bits_per_byte=1.0, note="is gone"),
        ],
    ),
)


def test_sizes_and_speeds_are_relative_to_the_best_measured_teacher() -> None:
    teacher = best_teacher(RUN)
    assert teacher is not None
    assert teacher.name == "[red]large"
    table = serving_table(RUN)
    titles = [column.title for column in table.columns]
    rows = {line.name: dict(zip(titles, cells, strict=True)) for line, cells in table.rows()}
    shown = {
        name: (row["Size vs. teacher"].text, row["Speed vs. teacher"].text, row["Note"].text)
        for name, row in rows.items()
    }
    assert shown == {
        "student": ("0.17 ×", "2.50 ×", ""),
        "onnx-int8": ("0.05 ×", "10.0 ×", ""),
        "[red]large": ("1.00 ×", "1.00 ×", ""),
        "small": ("0.33 ×", "2.00 ×", ""),
        "far": ("–", "–", "is gone"),
    }
    assert rows["onnx-int8"]["Decode, batch 1"].is_best
    assert not rows["[red]large"]["Bits / byte"].is_best
    assert rows["student"]["First token, ms"].text == "12.5"


def test_sentences_name_the_conditions_and_the_gain() -> None:
    conditions, gain = serving_sentences(RUN)
    assert "a processor, 1 thread, prompts of 64 tokens" in conditions
    assert gain == (
        "onnx-int8 decodes 10.0 × as fast as the best teacher, [red]large, with 5.0 % of its bytes."
    )
    assert not list(serving_sentences(RunFiles("run")))


def test_the_page_shows_table_and_plot() -> None:
    page = render_run(RUN)
    assert "Served on this machine" in page
    assert "What to serve" in page
    assert "[red]large" in page
    assert "What to serve" not in render_run(RunFiles("run"))


def test_a_plot_needs_two_measured_models() -> None:
    figure = pareto_plot(RUN)
    assert figure is not None
    assert render_svg(figure)
    for axes in figure.axes:
        ticks = [label.get_text() for label in axes.get_xticklabels()]
        assert ticks
        assert not any("$" in text for text in ticks)
    assert pareto_plot(RunFiles("run")) is None


def test_models_at_one_place_have_one_label() -> None:
    assert RUN.measurements is not None
    twin = RUN.measurements.models[0].model_copy(update={"name": "twin", "kind": "export"})
    models = [*RUN.measurements.models, twin]
    figure = pareto_plot(
        replace(RUN, measurements=RUN.measurements.model_copy(update={"models": models}))
    )
    assert figure is not None
    for axes in figure.axes:
        texts = [text.get_text() for text in axes.texts]
        assert sum("twin" in text.splitlines() for text in texts) == 1
        assert "twin" not in texts


numbers = st.integers(1, 6).map(float)


@given(st.lists(st.tuples(numbers, numbers), min_size=1), st.booleans())
def test_a_front_holds_the_points_that_no_other_beats(
    points: list[tuple[float, float]], is_more_better: bool
) -> None:
    sign = -1 if is_more_better else 1
    front = pareto_front(points, is_more_better=is_more_better)

    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return sign * a[0] <= sign * b[0] and a[1] <= b[1] and a != b

    assert {*front} == {p for p in points if not any(beats(q, p) for q in points)}
    assert all(a[0] < b[0] for a, b in itertools.pairwise(front))


@pytest.mark.parametrize("kind", ["student", "export"])
def test_without_a_teacher_there_is_no_gain(kind: str) -> None:
    own = RUN.measured_models(kind)
    assert RUN.measurements is not None
    run = RunFiles("run", measurements=RUN.measurements.model_copy(update={"models": own}))
    assert len(list(serving_sentences(run))) == 1
