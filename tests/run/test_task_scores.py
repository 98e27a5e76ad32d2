"""Generation and tasks as artifacts of a run: files, resume, changes, the fused target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from collegium.config.recipe import Recipe, load_recipe
from collegium.errors import DataError, ModelError
from collegium.report.page import write_report
from collegium.report.run_files import read_run
from collegium.report.task_tables import task_notes, task_table
from collegium.run import artifacts, pipeline
from collegium.run import tasks as run_tasks
from collegium.run.context import RunContext
from collegium.storage.records import TaskResults
from refusals import refused
from tiny_run import recipe_text, write_zoo

QA = [
    {"prompt": f"def add(a, {name}):", "references": ["return a + b"], "max_new_tokens": 5}
    | {"metric": ["exact_match", "token_f1"]}
    for name in "bcde"
]
PICK = [
    {"prompt": "In the beginning was the", "references": [word], "choices": [" word", " sum"]}
    | {"metric": "accuracy"}
    for word in (" word", " sum", " word")
]
STANDARD = "preflight.candidates=standard"
GENERATION = "evaluate.generation={max_prompts: 6, prompt_tokens: 6, max_new_tokens: 4}"


def write_task(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


def recipe(zoo: Path, folder: Path, *overrides: str) -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(recipe_text(zoo), encoding="utf-8")
    return load_recipe(
        file, [f"output_dir={folder / 'run'}", "train.max_steps=2", STANDARD, *overrides]
    )


@pytest.fixture(scope="module")
def finished(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without tasks."""
    root = tmp_path_factory.mktemp("finished")
    pipeline.run(recipe(zoo, root, "fusion={weighting: prefix_likelihood}"))
    return root


@pytest.fixture
def run(zoo: Path, finished: Path, tmp_path: Path) -> Path:
    """A copy of it, and two task files."""
    shutil.copytree(finished / "run", tmp_path / "run")
    write_task(tmp_path / "qa.jsonl", QA)
    write_task(tmp_path / "pick.jsonl", PICK)
    return tmp_path


def asking(zoo: Path, run: Path, *overrides: str) -> Recipe:
    tasks = f"evaluate.tasks={{qa: {run / 'qa.jsonl'}, pick: {run / 'pick.jsonl'}}}"
    fusion = "fusion={weighting: prefix_likelihood}"
    return recipe(zoo, run, fusion, GENERATION, tasks, *overrides)


def stages(run: Path) -> dict[str, Any]:
    return json.loads((run / "run" / "stages.json").read_text(encoding="utf-8"))


def read(run: Path, name: str) -> TaskResults:
    data = (run / "run" / f"{name}.json").read_text(encoding="utf-8")
    return TaskResults.model_validate_json(data)


def test_tasks_are_added_to_a_finished_run_and_resumed(
    zoo: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, before = (run / "run" / "results.json").read_bytes(), stages(run)
    pipeline.evaluate(asking(zoo, run))
    after = stages(run)
    assert {*after} - {*before} == {"generation", "task qa", "task pick"}
    # Nothing else is repeated: not even the table of results.
    assert {name: after[name] for name in before} == before
    assert (run / "run" / "results.json").read_bytes() == results
    order = ["scripture", "code", "fused target", "control: CE only, equal steps"]
    for name in ("generation", "tasks/qa", "tasks/pick"):
        rows = read(run, name).rows
        assert [row.name for row in rows] == [*order[:3], "student (distilled)", order[3]]
        assert all(score.value is not None for row in rows for score in row.scores.values())
    generation = read(run, "generation")
    assert generation.num_prompts == 6
    assert generation.settings["max_new_tokens"] == 4
    assert "version:" in generation.signatures["bleu"]
    assert set(generation.rows[0].domains) == {"scripture", "code"}
    assert generation.rows[0].scores["bleu"].num_samples == 6
    assert read(run, "tasks/pick").rows[0].scores["accuracy"].num_samples == 3

    asked: list[str] = []
    answer = run_tasks.answer_suite

    def recording(source: Any, *args: Any) -> Any:
        asked.append(source.name)
        return answer(source, *args)

    monkeypatch.setattr(run_tasks, "answer_suite", recording)
    pipeline.evaluate(asking(zoo, run))
    assert asked == []
    # A changed file repeats that task, a damaged result that suite.
    write_task(run / "qa.jsonl", QA[:3])
    (run / "run" / "generation.json").write_text("[]")
    texts = read(run, "tasks/pick")
    pipeline.evaluate(asking(zoo, run))
    assert len(asked) == 10
    assert read(run, "tasks/qa").num_prompts == 3
    assert read(run, "generation") == generation
    assert read(run, "tasks/pick") == texts
    # Other options of generation repeat that suite only.
    pipeline.evaluate(asking(zoo, run, "evaluate.generation.temperature=1.0"))
    assert len(asked) == 15
    assert read(run, "generation") != generation


def test_the_key_of_an_evaluation_without_tasks_is_that_of_earlier_versions(
    zoo: Path, tmp_path: Path
) -> None:
    context = RunContext(recipe(zoo, tmp_path, "teachers={}", "objective.kd_ratio=0"))
    (results,) = artifacts.ARTIFACTS["evaluate"](context)
    inputs, _ = results.identity()
    assert inputs["evaluate"][0] == {"controls": ["ce_only"], "batch_size": 4, "max_tokens": None}


def test_a_fused_target_that_cannot_be_sampled_has_a_reason(zoo: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "qa.jsonl", QA)
    task = f"evaluate.tasks={{qa: {tmp_path / 'qa.jsonl'}}}"
    fusion = "fusion={weighting: ca_mkd}"
    asked = recipe(zoo, tmp_path, fusion, task, "evaluate.controls=[]")
    assert any("reads the next token" in line for line in pipeline.check(asked).warnings)
    pipeline.run(asked)
    (row,) = [row for row in read(tmp_path, "tasks/qa").rows if row.kind == "fused"]
    assert row.note is not None
    assert row.scores == {}
    files = read_run(tmp_path / "run")
    assert [note for note in task_notes(files) if "reads the next token" in note]
    cells = {line.name: [c.text for c in cells] for line, cells in task_table(files).rows()}
    assert cells["fused target"] == ["–", "–"]
    assert "reads the next token" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_the_report_shows_the_suites_of_the_recipe(zoo: Path, run: Path) -> None:
    pipeline.run(asking(zoo, run))
    text = (run / "run" / "report.html").read_text(encoding="utf-8")
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    for part in ("continuation: BLEU (n = 6)", "ROUGE-L (legacy)", "qa: token F1, % (n = 4)", "±"):
        assert part in text
    pipeline.evaluate(recipe(zoo, run, "fusion={weighting: prefix_likelihood}"))
    write_report(run / "run")
    assert "token F1" not in (run / "run" / "report.html").read_text(encoding="utf-8")


def test_check_lists_the_suites_and_refuses_bad_ones(zoo: Path, run: Path) -> None:
    lines = pipeline.check(asking(zoo, run)).lines
    assert "evaluate.tasks.qa: 4 prompts; exact_match, token_f1" in lines
    assert any(line.startswith("evaluate.generation: 6 prompts") for line in lines)
    with refused(DataError, "evaluate.tasks.qa: "):
        pipeline.check(asking(zoo, run, f"evaluate.tasks.qa={run / 'no.jsonl'}"))
    write_task(run / "qa.jsonl", [QA[0], QA[1] | {"max_new_tokens": 60}])
    with refused(DataError, "evaluate.tasks.qa: "):
        pipeline.check(asking(zoo, run))
    write_task(run / "qa.jsonl", QA)
    with refused(DataError, "evaluate.generation: "):
        pipeline.check(asking(zoo, run, "evaluate.generation.max_new_tokens=64"))


def test_suites_of_a_student_that_is_cut_out_of_a_teacher(zoo: Path, tmp_path: Path) -> None:
    student = "student={from_layers: {teacher: code, keep: 1}}"
    lines = pipeline.check(recipe(zoo, tmp_path, student, GENERATION)).lines
    assert any(line.startswith("evaluate.generation: 6 prompts") for line in lines)


def test_prompts_beyond_a_switch_of_the_rope_are_refused(zoo: Path, tmp_path: Path) -> None:
    import tiny

    rope = {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0},
        **{"original_max_position_embeddings": 32, "short_factor": [1.0] * 4},
        "long_factor": [8.0] * 4,
    }
    config = {"model_type": "phi3", "rope_parameters": rope, "pad_token_id": 0}
    folder = tiny.save_tiny(tmp_path / "m", **config, original_max_position_embeddings=32)
    teacher = f"teachers.code.model={folder}"
    pipeline.check(recipe(zoo, tmp_path, teacher))
    longer = "evaluate.generation={prompt_tokens: 20, max_new_tokens: 13}"
    with refused(ModelError, "evaluate.generation: "):
        pipeline.check(recipe(zoo, tmp_path, teacher, longer))


def test_a_run_without_teachers_has_tasks(zoo: Path, tmp_path: Path) -> None:
    asked = recipe(zoo, tmp_path, "teachers={}", "objective.kd_ratio=0", GENERATION)
    pipeline.run(asked)
    assert [row.kind for row in read(tmp_path, "generation").rows] == ["student"]


def test_tasks_are_kept_when_the_choice_of_preflight_is_written_into_the_recipe(
    zoo: Path, tmp_path: Path
) -> None:
    few = (GENERATION, "evaluate.controls=[]")
    pipeline.run(recipe(zoo, tmp_path, *few))
    before = stages(tmp_path)["generation"]
    pipeline.preflight(recipe(zoo, tmp_path, *few), apply_to=tmp_path / "recipe.yaml")
    file = tmp_path / "recipe.yaml"
    output = f"output_dir={tmp_path / 'run'}"
    pipeline.evaluate(load_recipe(file, [output, "train.max_steps=2", STANDARD, *few]))
    assert stages(tmp_path)["generation"] == before
