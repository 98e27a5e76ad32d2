"""Early stopping, the best checkpoint and the samples of a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from collegium.config.recipe import Recipe, load_recipe
from collegium.errors import RecipeError
from collegium.run import pipeline
from collegium.run.context import RunContext
from collegium.run.students import students
from collegium.run.tasks import load_suite
from collegium.storage.records import TaskResults, TrainSummary, open_record, read_log
from refusals import refused
from tiny_run import recipe_text, write_zoo

# At a rate that soon makes the student worse.
STOPPING = [
    "train.learning_rate=0.3",
    "train.lr_scheduler_type=constant",
    "train.max_steps=8",
    "train.eval_steps=1",
    "train.eval_max_tokens=200",
    "train.save_steps=5",
    "train.early_stopping_patience=2",
    "train.per_device_train_batch_size=2",
    "evaluate.controls=[]",
    "fusion={weighting: uniform}",
    "preflight.candidates=standard",
    "preflight.max_tokens=50",
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


def recipe(zoo: Path, folder: Path, *overrides: str) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(recipe_text(zoo), encoding="utf-8")
    return load_recipe(file, [f"output_dir={folder / 'run'}", *STOPPING, *overrides])


def curve(run: Path) -> dict[int, Any]:
    log = read_log(run / "train" / "log.jsonl") or ()
    return {line.step: line.validation for line in log if line.validation is not None}


def test_the_student_is_the_best_checkpoint_and_is_called_so(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = recipe(zoo, tmp_path, "evaluate.samples=2")
    run = pipeline.run(asked)
    summary = open_record(run / "train" / "summary.json", TrainSummary)
    scores = curve(run)
    best = min(scores, key=lambda step: scores[step].nll)
    assert summary.stopped_early
    assert (summary.steps, summary.best_step) == (best + 2, best)
    weights = "model.safetensors"
    saved = run / "train" / f"checkpoint-{best}" / "student" / weights
    assert (run / "student" / weights).read_bytes() == saved.read_bytes()
    assert scores[best].bits_per_byte > 0
    assert scores[best].loss is not None  # the teachers are live
    assert f"train: stopped early at step {best + 2} of 8" in capsys.readouterr().err
    page = (run / "report.html").read_text(encoding="utf-8")
    assert f"Training stopped early at step {best + 2} of 8" in page
    assert f"the student is that of step {best}" in page
    results = json.loads((run / "results.json").read_text())
    (row,) = [row for row in results if row["kind"] == "student"]
    assert row["best_step"] == best

    texts = open_record(run / "samples.json", TaskResults)
    assert [len(row.texts) for row in texts.rows] == [2, 2, 2, 2]
    assert [row.kind for row in texts.rows] == ["teacher", "teacher", "fused", "student"]
    assert all(prompt.text and prompt.reference for prompt in texts.prompts)
    assert 'id="samples"' in page
    # Nothing is repeated: an early stop is an end.
    before = (run / "stages.json").read_bytes()
    pipeline.train(asked)
    assert (run / "stages.json").read_bytes() == before
    # A damaged student is loaded from its checkpoint again, without further steps.
    (run / "student" / weights).write_bytes(b"")
    pipeline.train(asked)
    assert (run / "student" / weights).read_bytes() == saved.read_bytes()
    assert open_record(run / "train" / "summary.json", TrainSummary) == summary
    # Another patience is another choice.
    other = RunContext(recipe(zoo, tmp_path, "train.early_stopping_patience=3"))
    (student,) = students(other)
    different = student.trainer(run / "train").differences(saved.parents[1])
    assert [line.partition(":")[0] for line in different] == ["selection"]


def test_a_cached_run_evaluates_on_labels(zoo: Path, tmp_path: Path) -> None:
    cache = "cache={enabled: true, kind: per_teacher}"
    run = pipeline.train(recipe(zoo, tmp_path, cache, "train.max_steps=2")).parent
    scores = curve(run)
    assert scores
    assert all(score.nll > 0 and score.loss is None for score in scores.values())


def test_samples_too_long_for_every_document_are_none(zoo: Path, tmp_path: Path) -> None:
    words = "\n".join(json.dumps({"text": f"a b {i}"}) for i in range(40))
    (tmp_path / "short.jsonl").write_text(words + "\n", encoding="utf-8")
    data = f"data.train=[{{path: {tmp_path / 'short.jsonl'}, domain: code}}]"
    context = RunContext(recipe(zoo, tmp_path, data, "evaluate.samples=2"))
    assert load_suite(context, "samples").items == ()


def test_a_patience_without_evaluations_is_refused(zoo: Path, tmp_path: Path) -> None:
    with refused(RecipeError, "override `train.early_stopping_patience=2`: train."):
        recipe(zoo, tmp_path, "train.eval_steps=null")
