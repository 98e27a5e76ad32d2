"""A student cut out of a teacher, from recipe to results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from collegium.config.recipe import Recipe, load_recipe
from collegium.errors import RecipeError
from collegium.run import pipeline
from collegium.run.checks import check_run
from collegium.run.context import RunContext
from collegium.run.students import students
from refusals import refused
from tiny_run import recipe_text, write_zoo

DEEP = "{from_layers: {teacher: scripture, keep: [0, 3]}}"
RANKED = "{from_layers: {teacher: scripture, keep: by_importance, num_layers: 2}}"
NARROW = "{from_width: {teacher: scripture, hidden_size: 24, ffn: 40, heads: 2}}"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, one of them with four layers."""
    root = write_zoo(tmp_path_factory.mktemp("zoo"))
    tiny.save_tiny(root / "scripture", seed=1, num_hidden_layers=4)
    return root


def _recipe(zoo: Path, tmp_path: Path, *overrides: str) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_text(zoo), encoding="utf-8")
    fixed = [f"output_dir={tmp_path / 'run'}", "fusion={weighting: uniform}"]
    return load_recipe(file, [*fixed, "evaluate.controls=[]", *overrides])


@pytest.mark.parametrize("student", [DEEP, RANKED, NARROW])
def test_a_run_trains_and_saves_it(student: str, zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(zoo, tmp_path, f"student={student}")
    check_run(RunContext(recipe))
    folder = pipeline.run(recipe)
    rows = {row["kind"]: row for row in json.loads((folder / "results.json").read_text())}
    assert rows["untouched"]["num_parameters"] == rows["student"]["num_parameters"]
    assert rows["untouched"]["num_parameters"] < rows["teacher"]["num_parameters"] * 2
    assert rows["student"]["nll"] < rows["untouched"]["nll"]
    saved = AutoModelForCausalLM.from_pretrained(folder / "student")
    assert saved.num_parameters() == rows["student"]["num_parameters"]


def test_it_starts_the_same_at_every_call_and_from_other_layers_otherwise(
    zoo: Path, tmp_path: Path
) -> None:
    context = RunContext(_recipe(zoo, tmp_path, f"student={RANKED}"))
    one, again = context.new_student().state_dict(), context.new_student().state_dict()
    assert all(torch.equal(one[name], again[name]) for name in one)
    teacher = AutoModelForCausalLM.from_pretrained(zoo / "scripture")
    (origin,) = context.student.origins().values()
    for ours, theirs in origin.items():
        block = teacher.model.layers[int(theirs.removeprefix("layer_"))]
        copy = one[f"model.layers.{ours.removeprefix('layer_')}.mlp.up_proj.weight"]
        assert torch.equal(copy, block.mlp.up_proj.weight)


def test_the_identity_covers_the_cut_and_the_teacher(zoo: Path, tmp_path: Path) -> None:
    def identity(student: str, model: Path = zoo / "scripture") -> object:
        overrides = f"student={student}", f"teachers.scripture.model={model}"
        return students(RunContext(_recipe(zoo, tmp_path, *overrides)))[0].identity()

    other = tiny.save_tiny(tmp_path / "other", seed=7, num_hidden_layers=4)
    found = [identity(DEEP), identity(RANKED), identity(NARROW), identity(DEEP, other)]
    assert found[0] == identity(DEEP)
    assert all(one != found[0] for one in found[1:])


def test_feature_terms_follow_the_kept_layers(zoo: Path, tmp_path: Path) -> None:
    student = "{from_layers: {teacher: scripture, keep: [1, 2]}}"
    features = "objective.features={num_layers: 2}"
    recipe = _recipe(zoo, tmp_path, f"student={student}", features)
    trainer = students(RunContext(recipe))[0].trainer(tmp_path / "train")
    assert trainer.step.objective.states[0].pairs == {
        "scripture": [("layer_0", "layer_1"), ("layer_1", "layer_2")],
        "code": [("layer_0", "layer_0"), ("layer_1", "layer_1")],
    }
    cached = "cache={enabled: true, kind: per_teacher, features: {}}"
    context = RunContext(_recipe(zoo, tmp_path, f"student={student}", features, cached))
    assert context.kept_taps["scripture"] == ["layer_1", "layer_2"]


@pytest.mark.parametrize("student", [DEEP, RANKED, NARROW])
def test_check_loads_no_model(
    student: str, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium.models.loading.load_model", None)
    cached = "cache={enabled: true, kind: per_teacher, features: {}}"
    features = "objective.features={num_layers: 2}"
    recipe = _recipe(zoo, tmp_path, f"student={student}", features, cached)
    check_run(RunContext(recipe))


@pytest.mark.parametrize(
    ("student", "where"),
    [
        ("{from_layers: {teacher: scriptur, keep: 2}}", "student.from_layers.teacher: "),
        ("{from_width: {teacher: prose, ffn: 8}}", "student.from_width.teacher: "),
        (
            "{from_layers: {teacher: code, keep: 1}, from_width: {teacher: scripture, ffn: 8}}",
            "student.from_width.teacher: ",
        ),
        ("{from_layers: {teacher: code, keep: 0}}", "student.from_layers.keep: "),
        ("{from_layers: {teacher: code, keep: []}}", "student.from_layers.keep: "),
        ("{from_layers: {teacher: code, keep: middle}}", "student.from_layers.keep: "),
        ("{from_layers: {teacher: code, keep: [1, 0]}}", "student.from_layers.keep: "),
        ("{from_layers: {teacher: code, keep: [0, -1]}}", "student.from_layers.keep."),
        ("{from_layers: {teacher: code, keep: by_importance}}", "student.from_layers.num_layers: "),
        (
            "{from_layers: {teacher: code, keep: 1, num_layers: 1}}",
            "student.from_layers.num_layers: ",
        ),
        ("{from_width: {teacher: code}}", "student.from_width.hidden_size: "),
    ],
    ids=str,
)
def test_wrong_cuts_are_refused_with_the_recipe(
    student: str, where: str, zoo: Path, tmp_path: Path
) -> None:
    with refused(RecipeError, f"override `student={student}`: {where}"):
        _recipe(zoo, tmp_path, f"student={student}")
