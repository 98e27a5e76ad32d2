"""The adapter to lm-evaluation-harness, offline, with a task file of the test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tiny
from collegium.cli import app
from collegium.errors import CollegiumError, RecipeError
from collegium.report.run_files import read_run
from collegium.report.task_tables import harness_table
from collegium.run import harness
from collegium.run.harness import run_harness
from collegium.storage.records import HarnessResults, Stage
from collegium.storage.stages import STAGES, file_digest, read_stages, sealed
from refusals import refused

ROWS = [
    {"question": question, "choices": choices, "answer": number // 3 % 2}
    for number, (question, choices) in enumerate(
        (question, choices)
        for question in ("In the beginning was", "To be, or", "def add(a, b):", "A café in")
        for choices in (["the word", "a sum"], ["not to be", "Zürich"])
    )
]
TASK = """
task: next_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {data}-cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The parts of a run that the adapter reads."""
    folder = tmp_path / "run"
    tiny.save_tiny(folder / "student")
    manifest = folder / "student" / "MANIFEST.json"
    manifest.write_text('{"format": 1, "files": []}')
    stage = Stage(status="done", files={"student/MANIFEST.json": file_digest(manifest)})
    (folder / STAGES).write_text(json.dumps({"train": sealed("train", stage).to_json()}))
    return folder


@pytest.fixture
def task(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (folder / "next_words.yaml").write_text(TASK.format(data=data))
    return folder


def naive_accuracy(folder: Path) -> float:
    """Share of the questions whose answer has the higher log-probability."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny.tiny_tokenizer()
    hits = 0
    for row in ROWS:
        totals = []
        for choice in row["choices"]:
            start = tokenizer(row["question"])["input_ids"]
            ids = tokenizer(f"{row['question']} {choice}")["input_ids"]
            assert ids[: len(start)] == start
            logits = model(torch.tensor([ids])).logits[0].detach()
            logp = logits.double().log_softmax(-1)
            totals.append(sum(float(logp[i - 1, ids[i]]) for i in range(len(start), len(ids))))
        hits += totals.index(max(totals)) == row["answer"]
    return hits / len(ROWS)


def test_the_student_is_evaluated_offline(run: Path, task: Path) -> None:
    results = run_harness(run, [str(task)])
    score = results.tasks["next_words"]["acc"]
    assert score.value == pytest.approx(naive_accuracy(run / "student"))
    assert 0 < score.value < 1
    # s / sqrt(n) of zeros and ones.
    size = len(ROWS)
    assert score.stderr == pytest.approx((score.value * (1 - score.value) / (size - 1)) ** 0.5)
    assert score.num_samples == size
    assert results.task_versions == {"next_words": "1.0"}
    stages, damaged = read_stages(run)
    assert stages["harness"].status == "done"
    assert not damaged
    files = read_run(run)
    assert files.harness == results
    (line,) = harness_table(files).lines
    assert line.name == "next_words: acc"
    limited = run_harness(run, ["next_words"], include=task, limit=3)
    assert (limited.limit, limited.tasks["next_words"]["acc"].num_samples) == (3, 3)
    # Another student: the scores are not shown.
    written = HarnessResults.model_validate_json((run / "harness.json").read_text())
    assert written == limited
    old = written.model_copy(update={"student": "0" * 64}).to_json()
    stage = stages["harness"].model_copy(update={"files": {}})
    (run / "harness.json").write_text(json.dumps(old))
    entries = {"train": stages["train"], "harness": sealed("harness", stage)}
    (run / STAGES).write_text(json.dumps({name: one.to_json() for name, one in entries.items()}))
    assert read_run(run).harness is None


def test_bad_calls_are_refused(run: Path, task: Path, tmp_path: Path) -> None:
    with refused(CollegiumError, "TMP/none: "):
        run_harness(tmp_path / "none", ["next_words"])
    with refused(RecipeError, "--tasks: "):
        run_harness(run, ["next_word"], include=task)
    with refused(RecipeError, "--include: "):
        run_harness(run, ["next_words"], include=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with refused(RecipeError, "--tasks: "):
        run_harness(run, [str(tmp_path / "empty")])
    (task / "data.jsonl").unlink()
    with refused(CollegiumError, "harness: ", volatile=r"\(.*?\);"):
        run_harness(run, [str(task)])
    assert read_stages(run)[0]["harness"].status == "failed"


def test_without_the_package_one_sentence(
    run: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["harness", str(run), "--tasks", str(task)])
    assert result.exit_code == 2
    assert result.output == (
        "error: harness: needs the package lm-eval; must be installed; run "
        "`pip install 'collegium[harness]'`\n"
    )
