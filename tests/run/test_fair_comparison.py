"""Fair comparison: same start, data and scoring for student and controls, separate splits.

Stages that were finished with other files do not count as finished.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from collegium.config.recipe import Recipe, load_recipe
from collegium.fusion.fuse import Fusion
from collegium.losses.pairing import FeatureOptions
from collegium.models.loading import count_parameters
from collegium.models.student import PretrainedStudent
from collegium.run import artifacts, choice, pipeline
from collegium.run.context import RunContext
from collegium.run.controls import CONTROLS, control_variants, main_variant
from collegium.run.students import Student
from collegium.train import options as options_module
from collegium.train.options import TrainOptions, training_arguments

CONTROL_NAMES = ["ce_only", "ce_only_equal_compute", "best_single"]
RECIPE = """
name: fair
output_dir: {root}/run
seed: 5
student:
  config: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
    num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 64,
    attention_dropout: 0.1}}
  tokenizer: {root}/scripture
teachers:
  scripture: {{model: {root}/scripture}}
  code: {{model: {root}/code}}
data:
  train:
    - {{path: {root}/scripture.jsonl}}
    - {{path: {root}/code.jsonl}}
  max_length: 32
  calibration_fraction: 0.2
  validation_fraction: 0.2
fusion: {{weighting: uniform}}
objective: {{kd_ratio: 0.5}}
train:
  {{learning_rate: 1e-2, max_steps: 2, per_device_train_batch_size: 4, logging_steps: 1,
  save_steps: 2}}
preflight: {{max_tokens: 200, batch_size: 4}}
evaluate: {{controls: [{controls}], batch_size: 4}}
"""


def make_zoo(root: Path) -> Recipe:
    """Write two teachers with one tokenizer and text of two domains; return their recipe."""
    tiny.save_tiny(root / "scripture", seed=1)
    tiny.save_tiny(root / "code", seed=2, width=24, num_attention_heads=2)
    for domain, text in (("scripture", tiny.TEXT[0]), ("code", tiny.TEXT[2])):
        lines = [json.dumps({"text": f"{text} number {i}. " * 4}) for i in range(40)]
        (root / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    file = root / "recipe.yaml"
    text = RECIPE.format(root=root, controls=", ".join(CONTROL_NAMES))
    file.write_text(text, encoding="utf-8")
    return load_recipe(file)


@dataclasses.dataclass
class Witness:
    """Observations of a run."""

    recipe: Recipe
    context: RunContext
    ranking_data: str
    evaluate_data: str
    trainers: dict[str, dict[str, Any]]
    scored: dict[str, dict[str, torch.Tensor]]


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Witness:
    """Observe a complete run with three controls."""
    recipe = make_zoo(tmp_path_factory.mktemp("fair"))
    observed: dict[str, Any] = {"trainers": {}, "scored": {}}
    real_rank, real_score = choice.score_models, artifacts.score_models
    real_record, real_trainer = choice.record, Student.trainer

    def rank(models: Any, teachers: Any, fusion: Any, windows: Any) -> Any:
        observed["ranking_data"] = windows.dataset.fingerprint
        return real_rank(models, teachers, fusion, windows)

    def score_models(models: Any, teachers: Any, fusion: Any, windows: Any) -> Any:
        observed["evaluate_data"] = windows.dataset.fingerprint
        return real_score(models, teachers, fusion, windows)

    def record(teacher: Any, *arguments: Any) -> Any:
        observed["scored"][teacher.name] = state(teacher.model)
        return real_record(teacher, *arguments)

    def trainer(self: Student, output_dir: Path) -> Any:
        made = real_trainer(self, output_dir)
        observed["trainers"][self.variant.name] = {
            "start": state(made.model),
            "data": made.train_dataset.fingerprint,
            "args": {**made.args.to_dict(), "output_dir": "", "logging_dir": ""},
            "teachers": [teacher.name for teacher in made.step.teachers],
            "terms": (made.step.objective.options, made.step.objective.states),
        }
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "score_models", rank)
        patch.setattr(artifacts, "score_models", score_models)
        patch.setattr(choice, "record", record)
        patch.setattr(Student, "trainer", trainer)
        pipeline.run(recipe)
    return Witness(recipe=recipe, context=RunContext(recipe), **observed)


def test_each_split_is_used_for_its_purpose(seen: Witness) -> None:
    """Teachers are ranked on calibration, students trained on train, results from validation."""
    data = seen.context.datasets
    assert len({dataset.fingerprint for dataset in data.values()}) == 3
    assert seen.ranking_data == data["calibration"].fingerprint
    assert seen.evaluate_data == data["validation"].fingerprint
    for made in seen.trainers.values():
        assert made["data"] == data["train"].fingerprint
    rows = json.loads((seen.recipe.output_dir / "results.json").read_text())
    assert {row["num_tokens"] for row in rows} == {data["validation"].num_target_tokens}


def test_all_variants_start_from_the_same_weights_with_the_same_arguments(seen: Witness) -> None:
    assert set(seen.trainers) == {"student", *CONTROL_NAMES}
    student = seen.trainers["student"]
    for name, made in seen.trainers.items():
        for key, tensor in student["start"].items():
            assert torch.equal(made["start"][key], tensor), (name, key)
        steps = {"ce_only_equal_compute": made["args"]["max_steps"]}.get(name, 2)
        assert made["args"] == {**student["args"], "max_steps": steps}
    assert student["args"]["seed"] == student["args"]["data_seed"] == 5


def test_equal_compute_counts_the_forward_passes_of_the_teachers(seen: Witness) -> None:
    teachers = [
        count_parameters(teacher.model)
        for teacher in seen.context.teachers(list(seen.recipe.teachers))
    ]
    student = count_parameters(seen.context.new_student())
    ratio = 1 + sum(teachers) / (3 * student)
    assert ratio > 2
    assert seen.context.compute_ratio == pytest.approx(ratio)
    assert seen.trainers["ce_only_equal_compute"]["args"]["max_steps"] == round(2 * ratio)
    rows = json.loads((seen.recipe.output_dir / "results.json").read_text())
    steps = {row["name"]: row["steps"] for row in rows if row["steps"] is not None}
    assert sorted(steps.values()) == [2, 2, 2, round(2 * ratio)]


def test_every_row_is_scored_with_the_right_weights(seen: Witness) -> None:
    """The untouched student has the initial weights, each trained one those of its folder."""
    run = seen.recipe.output_dir
    start = seen.trainers["student"]["start"]
    for key, tensor in seen.scored["student (untouched)"].items():
        assert torch.equal(tensor, start[key])
    folders = {"student (distilled)": run / "student"}
    folders["control: CE only, equal steps"] = run / "controls" / "ce_only" / "student"
    (best,) = [name for name in seen.scored if name.startswith("control: best single")]
    folders[best] = run / "controls" / "best_single" / "student"
    for name, folder in folders.items():
        saved = load_file(folder / "model.safetensors")
        scored = seen.scored[name]
        assert all(torch.equal(scored[key], tensor) for key, tensor in saved.items()), name
        assert not torch.equal(scored["lm_head.weight"], start["lm_head.weight"]), name


def test_controls_on_labels_use_no_teacher_and_no_hidden_state(seen: Witness) -> None:
    recipe = dataclasses.replace(
        seen.recipe, objective=dataclasses.replace(seen.recipe.objective, features=FeatureOptions())
    )
    controls = control_variants(recipe, "code", 2.0)
    for name in ("ce_only", "ce_only_equal_compute"):
        made = controls[name]
        assert made.objective == dataclasses.replace(recipe.objective, kd_ratio=0.0, features=None)
        assert made.fusion is None
        assert made.teachers == ()
        assert seen.trainers[name]["teachers"] == []
    for name in set(CONTROLS) - {"ce_only", "ce_only_equal_compute"}:
        made = controls[name]
        assert made.objective == main_variant(recipe, Fusion()).objective


def test_other_weights_under_the_same_path_are_another_run(seen: Witness, tmp_path: Path) -> None:
    root = seen.recipe.output_dir.parent
    file = root / "code" / "model.safetensors"
    kept = tmp_path / "kept"
    shutil.copy(file, kept)
    inputs = RunContext(seen.recipe).inputs("teachers")
    assert inputs == RunContext(seen.recipe).inputs("teachers")
    try:
        weights = load_file(file)
        weights["lm_head.weight"] = weights["lm_head.weight"] * 1.5
        save_file(weights, file, metadata={"format": "pt"})
        assert RunContext(seen.recipe).inputs("teachers") != inputs
    finally:
        shutil.copy(kept, file)
    assert RunContext(seen.recipe).inputs("teachers") == inputs


def test_keys_cover_the_text_and_the_initial_weights_of_a_student(tmp_path: Path) -> None:
    recipe = make_zoo(tmp_path)
    trained = dataclasses.replace(recipe, student=PretrainedStudent(model=str(tmp_path / "code")))
    before = RunContext(recipe).inputs("data"), RunContext(trained).inputs("student")
    assert before == (RunContext(recipe).inputs("data"), RunContext(trained).inputs("student"))
    with (tmp_path / "code.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "one more document, " * 9}) + "\n")
    tiny.save_tiny(tmp_path / "code", seed=3, width=24, num_attention_heads=2)
    after = RunContext(recipe).inputs("data"), RunContext(trained).inputs("student")
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_a_student_on_the_cpu_is_trained_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even on a machine with an accelerator, to which the trainer would silently move it."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    options = TrainOptions(max_steps=1)
    args = training_arguments(options, output_dir=tmp_path, seed=0, on_cpu=True)
    assert args.use_cpu
    assert not args.dataloader_pin_memory
    values: list[bool | None] = []
    real = options_module.training_arguments

    def arguments(options: Any, *, on_cpu: bool | None = None, **named: Any) -> Any:
        values.append(on_cpu)
        return real(options, on_cpu=True, **named)

    monkeypatch.setattr("collegium.run.students.training_arguments", arguments)
    recipe = make_zoo(tmp_path)
    recipe = dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, device="cpu"))
    context = RunContext(recipe)
    Student(context, main_variant(recipe, Fusion())).trainer(tmp_path / "train")
    assert values == [True]
