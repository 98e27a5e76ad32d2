"""Baselines on the distributions of the teachers: each recipe loads, passes `check` and trains."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path

import pytest

import tiny
from collegium.config.recipe import Recipe, load_recipe
from collegium.run import pipeline
from collegium.run.checks import check_run
from collegium.run.context import RunContext
from collegium.storage.records import read_log
from tiny_run import CONFIG

FOLDER = Path(__file__).parents[2] / "recipes" / "baselines"
TEACHERS = ("scripture", "drama", "encyclopedia", "python")
SAME = ("student", "teachers", "data", "train", "seed", "evaluate")
BASELINES = {
    "generalized_jsd": {"objective.divergence.beta": 0.1},
    "adaptive_kl": {"objective.divergence.head": 0.5},
    "total_variation": {},
    "logit_mse": {"objective.kd_ratio": 1.0},
    "fusellm_mince": {"objective.kd_ratio": 0.1},
    "ca_mkd": {"fusion.weighting.granularity": "token"},
    "static_linear": {"fusion.pool": "linear"},
    "static_log_linear": {"fusion.pool": "log_linear"},
    "single_teacher": {"fusion.weighting.teacher": "encyclopedia"},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four teachers with one tokenizer, and text."""
    root = tmp_path_factory.mktemp("zoo")
    for seed, name in enumerate(TEACHERS):
        tiny.save_tiny(root / name, seed=seed)
    lines = [json.dumps({"text": f"{tiny.TEXT[i % 4]} {i}. "}) for i in range(60)]
    (root / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def _tiny_recipe(name: str, zoo: Path, tmp_path: Path) -> Recipe:
    student = {"config": CONFIG, "tokenizer": str(zoo / "drama")}
    return load_recipe(
        FOLDER / f"{name}.yaml",
        [
            f"output_dir={tmp_path / 'run'}",
            f"student={json.dumps(student)}",
            *(f"teachers.{teacher}.model={zoo / teacher}" for teacher in TEACHERS),
            f"data.train=[{{path: {zoo / 'text.jsonl'}}}]",
            "data.max_length=32",
            "data.calibration_fraction=0.2",
            "data.validation_fraction=0.2",
            "train.max_steps=2",
            "train.per_device_train_batch_size=4",
            "train.warmup_steps=0",
            "train.logging_steps=1",
        ],
    )


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_passes_check_and_trains(name: str, zoo: Path, tmp_path: Path) -> None:
    recipe = _tiny_recipe(name, zoo, tmp_path)
    check_run(RunContext(recipe))
    pipeline.train(recipe)
    log = read_log(tmp_path / "run" / "train" / "log.jsonl")
    assert [line.step for line in log] == [1, 2]
    assert all(math.isfinite(line.loss) and line.loss > 0 for line in log)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_differ_only_in_their_objective_and_fusion(name: str) -> None:
    recipe, other = (load_recipe(FOLDER / f"{stem}.yaml") for stem in (name, "static_linear"))
    assert {f.name for f in fields(recipe)} >= {*SAME}
    assert all(getattr(recipe, section) == getattr(other, section) for section in SAME)
    assert (recipe.name, recipe.output_dir) == (name, Path("runs/baselines") / name)
    for path, value in BASELINES[name].items():
        option = recipe
        for key in path.split("."):
            option = getattr(option, key)
        assert option == value
