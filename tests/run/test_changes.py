"""A run folder lives with its recipe: what did not change is kept, what did is made again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tiny
from collegium.cli import app
from collegium.config.recipe import Recipe, load_recipe
from collegium.errors import RecipeError
from collegium.run import pipeline
from collegium.run.folder import recipe_of
from collegium.run.status import ArtifactState, run_status
from collegium.storage.files import lock_folder, write_json
from collegium.storage.records import Stage
from collegium.storage.stages import sealed
from refusals import refused
from tiny_run import recipe_text, write_zoo

CACHE = "cache={enabled: true, kind: per_teacher, targets: {name: samples, draws: 20}}"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with teachers, a recipe and a finished run in `run`, with its own cache."""
    root = write_zoo(tmp_path_factory.mktemp("original"))
    text = recipe_text(root).replace("controls: [ce_only]", "controls: []")
    (root / "tiny.yaml").write_text(text, encoding="utf-8")
    pipeline.run(load_recipe(root / "tiny.yaml", [CACHE]))
    return root


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the finished run, and of the recipe."""
    shutil.copytree(original / "run", tmp_path / "run")
    shutil.copy(original / "tiny.yaml", tmp_path)
    return tmp_path


def recipe(root: Path, *overrides: str) -> Recipe:
    return load_recipe(root / "tiny.yaml", [CACHE, f"output_dir={root / 'run'}", *overrides])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def built(root: Path, action: Callable[[], object]) -> set[str]:
    """The stages that an action has run."""

    def started() -> dict[str, str | None]:
        stages = json.loads((root / "run" / "stages.json").read_text())
        return {name: json.dumps(stage) for name, stage in stages.items()}

    before = started()
    action()
    return {name for name, stage in started().items() if before.get(name) != stage}


def states(root: Path, *overrides: str) -> dict[str, str]:
    return {one.name: one.state for one in run_status(recipe(root, *overrides))}


def test_same_recipe_makes_nothing_again(root: Path) -> None:
    assert built(root, lambda: pipeline.run(recipe(root))) == set()
    assert not (root / "run" / "previous").exists()
    assert set(states(root).values()) == {"done"}


def test_another_learning_rate_keeps_preflight_and_cache(root: Path) -> None:
    run, rate = root / "run", "train.learning_rate=0.003"
    before, results = weights(run), (run / "results.json").read_bytes()
    former = (run / "recipe.yaml").read_text()
    redone = {name for name, state in states(root, rate).items() if state != "done"}
    assert redone == {"train", "evaluate"}
    assert built(root, lambda: pipeline.run(recipe(root, rate))) == redone
    assert any(not torch.equal(value, before[name]) for name, value in weights(run).items())
    kept = run / "previous" / "1"
    assert all(torch.equal(value, before[name]) for name, value in weights(kept).items())
    assert (kept / "results.json").read_bytes() == results
    assert (kept / "train" / "checkpoint-4").is_dir()
    assert (kept / "recipe.yaml").read_text() == former
    # Back again: the second student is kept as well.
    assert built(root, lambda: pipeline.run(recipe(root))) == redone
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())
    assert (run / "previous" / "2" / "student").is_dir()
    assert states(root)["previous"] == "made by earlier recipes; delete to free"


def test_more_steps_train_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longer = "train.max_steps=6"
    built(root, lambda: pipeline.run(recipe(root, longer)))
    assert "train: goes on from step 4 of 6" in capsys.readouterr().err
    log = (root / "run" / "train" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [2, 4, 6]
    assert json.loads((root / "run" / "results.json").read_text())[-1]["steps"] == 6
    assert not (root / "run" / "previous" / "1" / "student").exists()


def test_fewer_steps_start_again(root: Path, tmp_path: Path) -> None:
    shorter = "train.max_steps=2"
    pipeline.run(recipe(root, shorter))
    fresh = pipeline.train(recipe(root, shorter, f"output_dir={tmp_path / 'fresh'}")).parent
    for name, value in weights(root / "run").items():
        assert torch.equal(value, weights(fresh)[name])
    assert (root / "run" / "previous" / "1" / "train" / "checkpoint-4").is_dir()


def test_changed_teacher_redoes_what_read_it(root: Path) -> None:
    code = tiny.save_tiny(root / "code", seed=5, model_type="qwen3", head_dim=8)
    run, changed = root / "run", f"teachers.code.model={code}"
    other = run / "cache" / "teachers" / "scripture" / "train" / "manifest.json"
    written = other.stat().st_mtime_ns
    redone = built(root, lambda: pipeline.run(recipe(root, changed)))
    assert redone == {
        "preflight",
        "cache teachers/code/train",
        "cache teachers/code/calibration",
        "train",
        "evaluate",
    }
    kept = run / "previous" / "1"
    assert (kept / "cache" / "teachers" / "code" / "train" / "manifest.json").is_file()
    assert not (kept / "cache" / "teachers" / "scripture").exists()
    assert (kept / "preflight.json").is_file()
    assert other.stat().st_mtime_ns == written
    assert (kept / "student").is_dir()


def test_cache_of_other_targets_is_built_again(root: Path) -> None:
    run, draws = root / "run", "cache.targets.draws=9"
    former = (run / "cache" / "teachers" / "code" / "train" / "manifest.json").read_bytes()
    pipeline.cache(recipe(root, draws))
    kept = run / "previous" / "1" / "cache" / "teachers"
    assert (kept / "code" / "train" / "manifest.json").read_bytes() == former
    # The calibration split is stored with other targets, which did not change.
    assert not (kept / "code" / "calibration").exists()
    found = states(root, draws)
    assert {found[f"cache teachers/{name}/train"] for name in ("code", "scripture")} == {"done"}
    assert found["preflight"] == "done"
    assert found["train"] == "done; of another recipe, made again"


def test_interrupted_training_of_another_recipe_is_kept(root: Path) -> None:
    run = root / "run"
    shutil.rmtree(run / "student")
    (run / "train" / "summary.json").unlink()
    stages = json.loads((run / "stages.json").read_text())
    stage = Stage.model_validate({**stages["train"], "status": "interrupted", "files": None})
    stages["train"] = sealed("train", stage).to_json()
    write_json(run / "stages.json", stages)
    assert states(root)["train"] == "interrupted; resumes"
    other = "train.weight_decay=0.3"
    assert states(root, other)["train"] == "interrupted; of another recipe, made again"
    pipeline.train(recipe(root, other))
    assert (run / "previous" / "1" / "train" / "checkpoint-4").is_dir()


def test_status_of_a_killed_and_of_a_running_stage(root: Path) -> None:
    run = root / "run"
    stages = json.loads((run / "stages.json").read_text())
    stage = Stage.model_validate({**stages["evaluate"], "status": "running", "files": None})
    stages["evaluate"] = sealed("evaluate", stage).to_json()
    write_json(run / "stages.json", stages)
    (run / "results.json").unlink()
    assert states(root)["evaluate"] == "killed; resumes"
    with lock_folder(run, "wait"):
        assert states(root)["evaluate"] == "running"


def test_status_of_a_killed_control_that_waits_for_preflight(tmp_path: Path) -> None:
    root = write_zoo(tmp_path)
    (root / "tiny.yaml").write_text(recipe_text(root), encoding="utf-8")
    run = root / "run"
    stage = Stage(status="running", key="k", started="2026-01-01T00:00:00", seconds=1.0)
    run.mkdir()
    write_json(run / "stages.json", {"control uniform": sealed("control uniform", stage).to_json()})
    assert states(root)["control uniform"].startswith("killed; ")
    with lock_folder(run, "wait"):
        assert states(root)["control uniform"].startswith("running; ")


def test_status_before_preflight_lists_what_is_there(tmp_path: Path) -> None:
    root = write_zoo(tmp_path)
    (root / "tiny.yaml").write_text(recipe_text(root), encoding="utf-8")
    assert states(root) == {"corpus": "missing", "preflight": "missing"}
    assert set(states(root, "fusion={weighting: uniform}")) == {
        "corpus",
        "preflight",
        "cache teachers/scripture/train",
        "cache teachers/scripture/calibration",
        "cache teachers/code/train",
        "cache teachers/code/calibration",
        "train",
        "control ce_only",
        "evaluate",
    }
    assert not (root / "run").exists()


def test_status_command_takes_a_moved_folder(root: Path) -> None:
    (root / "run").rename(root / "moved")
    result = CliRunner().invoke(app, ["status", str(root / "moved")])
    assert result.exit_code == 0, result.output
    assert "preflight" in result.output
    assert "of another" not in result.output
    result = CliRunner().invoke(app, ["status", str(root / "moved"), "train.learning_rate=1"])
    assert "of another recipe" in result.output


def test_status_of_another_folder_is_refused(tmp_path: Path) -> None:
    with refused(RecipeError, "TMP: "):
        recipe_of(tmp_path)


def test_sizes_are_those_of_the_files(root: Path) -> None:
    found = {one.name: one for one in run_status(recipe(root))}
    results: ArtifactState = found["evaluate"]
    assert results.num_bytes == (root / "run" / "results.json").stat().st_size
    student = sum(file.stat().st_size for file in (root / "run" / "student").iterdir())
    assert found["train"].num_bytes == student
