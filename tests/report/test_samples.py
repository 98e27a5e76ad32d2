"""Samples side by side, the validation curve, the cost and the next steps in the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import run_fixture
from collegium.report import page, plots
from collegium.report.headline import headline_of
from collegium.report.next_steps import next_steps
from collegium.report.run_files import RunFiles, read_run
from collegium.report.run_tables import cost_parts
from collegium.report.samples import samples
from collegium.storage.records import LogStep, ResultRow, Stage, ValidationScore

HOSTILE = "a\x1b[31m <script>alert(1)</script> \u202ereversed\x00"
CONTROL = "control: CE only, equal steps"


def texts(number: int) -> dict[str, Any]:
    rows = [("gutenberg", "teacher"), ("fused target", "fused"), ("student (distilled)", "student")]
    rows += [(CONTROL, "control"), ("control: uniform weights", "control")]
    prompts = [
        {"document": f"d{i}", "domain": "news", "text": HOSTILE, "reference": f"the end {i}"}
        for i in range(number)
    ]
    return {
        "num_prompts": number,
        "prompts": prompts,
        "rows": [
            {"name": name, "kind": kind, "texts": [f"{name} goes on {i}" for i in range(number)]}
            for name, kind in rows
        ],
    }


def with_samples(folder: Path, evaluate: dict[str, Any], file: str = "samples.json") -> Path:
    run_fixture.write_run(folder)
    run_fixture.write_json(folder / "recipe.json", {"evaluate": evaluate})
    run_fixture.write_json(folder / file, texts(4))
    return folder


def test_samples_of_the_student_the_best_control_and_the_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = with_samples(tmp_path / "run", {"samples": 2})
    first, second = samples(read_run(folder))
    names = [line.name for line in first.texts.lines]
    assert names == [
        "the document itself",
        "student (distilled)",
        CONTROL.removeprefix("control: "),
        "fused target",
        "gutenberg",
    ]
    cells = [cells[0].text for _, cells in second.texts.rows()]
    assert cells[:2] == ["the end 1", "student (distilled) goes on 1"]
    monkeypatch.setattr(page, "draw_all", lambda run: {})
    text = page.render_run(read_run(folder))
    assert "student (distilled) goes on 1" in text
    assert "goes on 2" not in text
    # What a terminal or a browser would obey is shown, not sent.
    assert "\\x1b[31m &lt;script&gt;alert(1)&lt;/script&gt; \\u202ereversed\\x00" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize(("temperature", "number"), [(0.0, 3), (0.7, 0)])
def test_greedy_continuations_are_the_samples(
    tmp_path: Path, temperature: float, number: int
) -> None:
    options = {"samples": 3, "generation": {"temperature": temperature}}
    folder = with_samples(tmp_path / "run", options, "generation.json")
    assert len(samples(read_run(folder))) == number


def _row(kind: str, perplexity: float, name: str = "", **more: Any) -> ResultRow:
    values = {"name": name or kind, "kind": kind, "perplexity": perplexity}
    return ResultRow.model_validate({**values, "nll": math.log(perplexity), **more})


def _run(*rows: ResultRow, curve: tuple[float, ...] = (), fall: bool = False) -> RunFiles:
    losses = [5.0] * 15 + [3.0] * 5 + [2.0 if fall else 3.0] * 5
    log = [LogStep(step=10 * i, loss=x) for i, x in enumerate(losses, start=1)]
    for i, nll in enumerate(curve):
        at = len(log) - len(curve) + i
        score = ValidationScore(nll=nll)
        log[at] = log[at].model_copy(update={"validation": score})
    return RunFiles("run", folder="runs/my run", results=rows, log=tuple(log))


STUDENT = _row("student", 100.0, steps=250, max_steps=250)
CE = _row("control", 120.0, name="control: CE only, equal steps")
UNIFORM = _row("control", 80.0, name="control: uniform weights")


def test_a_student_that_was_better_earlier() -> None:
    run = _run(STUDENT, CE, curve=(4.0, 3.5, 3.8))
    headline = headline_of(run)
    assert headline.tone == "even"
    assert "validation perplexity rose by 35.0 % after step 240" in headline.text
    assert "load_best_model_at_end=true" in next_steps(run)[0]
    # The training loss falls, but the validation does not: more steps would not help.
    both = _run(STUDENT, CE, curve=(4.0, 3.5, 3.8), fall=True)
    assert "not ready" not in headline_of(both).text
    assert "not ready" in headline_of(_run(STUDENT, CE, curve=(4.0, 3.8, 3.5), fall=True)).text


def test_an_early_stop_is_named() -> None:
    stopped = STUDENT.model_copy(update={"max_steps": 900, "best_step": 230})
    headline = headline_of(_run(stopped, CE, curve=(4.0, 3.5, 3.8), fall=True))
    assert headline.tone == "good"
    assert headline.text.endswith(
        "Training stopped early at step 250 of 900, and the student is that of step 230."
    )
    assert any("a little too good" in fact for fact in headline.facts)
    chosen = STUDENT.model_copy(update={"best_step": 230})
    assert headline_of(_run(chosen, CE)).text.endswith(
        "Of 250 steps, the student is that of step 230."
    )


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (_run(), "collegium run 'runs/my run/recipe.yaml'"),
        (_run(STUDENT, CE), "seed=1"),
        (_run(STUDENT, CE, fall=True), "train.max_steps=500"),
        (_run(STUDENT, _row("untouched", 99.0)), "train.learning_rate"),
        (_run(STUDENT, UNIFORM), "fusion={weighting: uniform}"),
        (_run(STUDENT, _row("control", 80.0, name="control: best single teacher (a)")), "one"),
        (_run(STUDENT, _row("control", 80.0, name="control: CE only")), "kd_ratio"),
        (_run(STUDENT, CE, _row("teacher", 50.0)), "collegium student sizes"),
        (_run(STUDENT, _row("teacher", 90.0)), "evaluate.controls=[ce_only]"),
    ],
)
def test_the_next_step_follows_the_outcome(run: RunFiles, expected: str) -> None:
    first, second = next_steps(run)
    assert expected in first
    assert "collegium " in second


def test_every_command_of_the_next_steps_exists() -> None:
    from typer.main import get_command

    from collegium.cli import app

    commands = {*get_command(app).commands}  # type: ignore[attr-defined]
    source = Path(next_steps.__code__.co_filename).read_text(encoding="utf-8")
    words = {part.split()[0] for part in source.split("collegium ")[1:]}
    assert words <= commands | {"run"}


def test_the_cost_has_all_stages() -> None:
    names = ["preflight", "cache a", "train", "control uniform", "evaluate", "task qa", "samples"]
    names += ["export hf", "measure", "draft"]
    run = RunFiles(
        "run",
        stages={name: Stage(seconds=float(i)) for i, name in enumerate([*names, "text"], 1)},
        log=(LogStep(step=1, validation=ValidationScore(seconds=0.5)),),
    )
    parts = cost_parts(run)
    assert parts.pop("of which evaluations during training") == 0.5
    assert parts == {
        "preparation": 11.0,
        "preflight": 1.0,
        "teacher cache": 2.0,
        "student": 3.0,
        "controls": 4.0,
        "evaluation": 5.0,
        "generated text": 13.0,
        "exports": 8.0,
        "measurements on this machine": 19.0,
    }


def test_the_validation_plot_has_student_and_controls(tmp_path: Path) -> None:
    assert plots.validation_plot(_run(STUDENT)) is None
    run = _run(STUDENT.model_copy(update={"best_step": 240}), CE, curve=(4.0, 3.5, 3.8))
    figure = plots.validation_plot(
        RunFiles("run", results=run.results, log=run.log, controls={"ce_only": run.log or ()})
    )
    assert figure is not None
    (axes,) = figure.axes
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert [line.get_label() for line in lines] == ["student", "ce_only"]
    assert json.loads(json.dumps(list(map(float, lines[0].get_ydata())))) == [4.0, 3.5, 3.8]
