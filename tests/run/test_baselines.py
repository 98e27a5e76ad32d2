"""The recipes of the baselines, checked and trained for a few steps on models like the demo's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from collegium.config.recipe import Recipe, load_recipe
from collegium.demo.run import FULL
from collegium.errors import RecipeError
from collegium.run.checks import check_run
from collegium.run.context import RunContext
from collegium.run.students import students
from collegium.storage.records import read_log
from refusals import refused

FOLDER = Path(__file__).parents[2] / "recipes" / "baselines"
NAMES = ["distillm", "distillm2", "minilmv2", "mobilebert", "tinybert"]
"""Recipes whose terms are described in docs/design/terms.md."""
OVERRIDES = [
    "train.max_steps=10",
    "train.per_device_train_batch_size=2",
    "train.warmup_steps=0",
    "train.logging_steps=1",
    "data.max_length=32",
    "data.max_train_tokens=null",
]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained teachers with the configs of the demo's, a small tokenizer and texts."""
    root = tmp_path_factory.mktemp("zoo")
    tiny.tiny_tokenizer().save_pretrained(root / "tokenizer")
    (root / "text").mkdir()
    for number, (name, config) in enumerate(FULL.specialists.items()):
        tiny.save_tiny(root / "teachers" / name / "student", seed=number + 1, **config)
        lines = [json.dumps({"text": f"{tiny.TEXT[number]} {i}. " * 3}) for i in range(40)]
        (root / "text" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, source in (("teachers", "drama"), ("student", "python")):
        text = (root / "text" / f"{source}.jsonl").read_text(encoding="utf-8")
        (root / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def recipe(zoo: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def load(name: str, *more: str) -> Recipe:
        text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
        text = text.replace("runs/demo", str(zoo)).replace("runs/distillm2-text/", f"{zoo}/")
        file = tmp_path / f"{name}.yaml"
        file.write_text(text, encoding="utf-8")
        return load_recipe(file, [*OVERRIDES, f"output_dir={tmp_path}/run", *more])

    return load


@pytest.mark.parametrize("name", NAMES)
def test_a_baseline_trains(name: str, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    made = recipe(name)
    context = RunContext(made)
    check_run(context)
    trainer = students(context)[0].trainer(tmp_path / "train")
    start = {key: value.clone() for key, value in trainer.step.student.state_dict().items()}
    trainer.train()
    log = read_log(tmp_path / "train" / "log.jsonl")
    assert log is not None
    assert len(log) == 10
    assert all(math.isfinite(value) for row in log for value in (row.loss, *row.terms.values()))
    names = set(log[0].term_weights)
    placed = {one.name for one in made.objective.placed_terms()}
    assert {name.partition("/")[0] for name in names} == placed
    assert {n for row in log for n, weight in row.term_weights.items() if weight > 0} == names
    for row in log:
        assert set(row.terms) == {n for n, weight in row.term_weights.items() if weight > 0}
    moved = {n for row in log for n, share in row.grad_shares.items() if share > 0}
    assert moved == names
    end = trainer.step.student.state_dict()
    assert all(torch.isfinite(value).all() for value in end.values())
    assert any(not torch.equal(end[key], start[key]) for key in start)


@pytest.mark.parametrize(
    ("name", "change", "where"),
    [
        ("tinybert", "objective.terms.2.num_layers=4", "objective.terms.2.num_layers"),
        ("mobilebert", "objective.terms.1.layers={embed: layer_0}", "objective.terms.1.layers"),
        ("minilmv2", "objective.terms.0.num_heads=5", "objective.terms.0.num_heads"),
        ("minilmv2", "objective.terms.0.teachers=[dramma]", "override `objective.terms.0.teachers"),
        ("tinybert", "cache={enabled: true, kind: per_teacher}", "tinybert.yaml:"),
        ("distillm2", "objective.terms.1.domains=[studnt]", "objective.terms.1.domains"),
        ("tinybert", "objective.terms.3.schedule.stages.0.until=0.6", "objective.terms: "),
    ],
)
def test_a_baseline_that_cannot_work_is_refused(
    name: str, change: str, where: str, recipe: Callable[..., Recipe]
) -> None:
    with refused(RecipeError, where):
        check_run(RunContext(recipe(name, change)))


def test_attention_that_cannot_be_read_is_found_by_a_check(
    zoo: Path, tmp_path: Path, recipe: Callable[..., Recipe]
) -> None:
    tiny.save_tiny(tmp_path / "bloom", seed=9, model_type="bloom", num_hidden_layers=3)
    more = f"teachers.drama={{model: {tmp_path}/bloom}}", "data.packing=false"
    with refused(RecipeError, "objective.terms.2: "):
        check_run(RunContext(recipe("tinybert", *more)))
