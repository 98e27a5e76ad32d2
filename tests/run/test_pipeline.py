"""Stages of a tiny run: from recipe to report, stopped, resumed, changed, refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import collegium
import tiny
from collegium.config.recipe import Recipe, dump_recipe, load_recipe
from collegium.errors import CollegiumError, ModelError, RecipeError, TrainingError, VocabularyError
from collegium.fusion.fuse import Fusion
from collegium.fusion.rules import BestSingle, Entropy, Uniform
from collegium.preflight import search
from collegium.run import artifacts, choice, pipeline
from collegium.run.context import RunContext
from collegium.run.controls import CONTROLS, control_variants, main_variant
from collegium.run.students import Student
from collegium.train.trainer import DistillTrainer
from refusals import refused
from tiny_run import recipe_text, write_zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers with one tokenizer, and text of two domains."""
    return write_zoo(tmp_path_factory.mktemp("zoo"))


def _recipe(zoo: Path, tmp_path: Path, *overrides: str) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_text(zoo), encoding="utf-8")
    return load_recipe(file, [f"output_dir={tmp_path / 'run'}", *overrides])


def _applied(tmp_path: Path) -> Recipe:
    return load_recipe(tmp_path / "recipe.yaml", [f"output_dir={tmp_path / 'run'}"])


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    root = tmp_path_factory.mktemp("finished")
    return collegium.distill(_recipe(zoo, root))


def test_a_run_writes_the_documented_files(finished: Path) -> None:
    for name in (
        "recipe.yaml",
        "environment.json",
        "preflight.json",
        "results.json",
        "report.html",
    ):
        assert (finished / name).is_file(), name
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (finished / "student").iterdir()
    }
    kinds = [row["kind"] for row in json.loads((finished / "results.json").read_text())]
    assert kinds == ["untouched", "teacher", "teacher", "fused", "control", "student"]
    rows = json.loads((finished / "results.json").read_text())
    assert rows[-1]["steps"] == rows[-2]["steps"] == 4
    assert rows[-1]["train_tokens"] == rows[-2]["train_tokens"] > 0
    stages = json.loads((finished / "stages.json").read_text())
    assert {state["status"] for state in stages.values()} == {"done"}
    assert set(stages) == {"corpus", "preflight", "train", "control ce_only", "evaluate"}
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(finished / "student")


def test_the_resolved_recipe_of_a_run_loads_back(finished: Path, zoo: Path, tmp_path: Path) -> None:
    kept = load_recipe(finished / "recipe.yaml")
    fresh = _recipe(zoo, tmp_path)
    assert dataclasses.replace(kept, output_dir=fresh.output_dir) == fresh


def test_a_finished_run_is_not_run_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(choice, "run_preflight", refuse)
    monkeypatch.setattr(artifacts, "score_models", refuse)
    monkeypatch.setattr(Student, "trainer", refuse)
    assert pipeline.run(load_recipe(finished / "recipe.yaml")) == finished


def test_another_control_trains_only_that_control(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    recipe = load_recipe(
        run / "recipe.yaml", [f"output_dir={run}", "evaluate.controls=[ce_only, uniform]"]
    )
    before = _weights(run)
    rows = pipeline.evaluate(recipe)
    assert [row.name for row in rows if row.kind == "control"] == [
        "control: CE only, equal steps",
        "control: uniform weights",
    ]
    assert all(torch.equal(value, before[name]) for name, value in _weights(run).items())


def test_the_same_seed_gives_the_same_student(zoo: Path, finished: Path, tmp_path: Path) -> None:
    run = pipeline.train(_recipe(zoo, tmp_path)).parent
    assert all(
        torch.equal(value, _weights(finished)[name]) for name, value in _weights(run).items()
    )
    assert not (run / "controls").exists()


def test_plain_cross_entropy_needs_no_teacher(zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(zoo, tmp_path, "teachers={}", "objective.kd_ratio=0", "train.max_steps=2")
    run = pipeline.run(recipe)
    rows = json.loads((run / "results.json").read_text())
    assert [row["name"] for row in rows] == ["student (untouched)", "student (trained)"]
    with refused(RecipeError, "teachers: "):
        pipeline.preflight(recipe)


def test_feature_terms_and_a_control_with_fewer_teachers(zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(
        zoo,
        tmp_path,
        "objective.features={teacher_weights: {scripture: 1.0, code: 0.5}}",
        "evaluate.controls=[best_single]",
        "fusion={weighting: uniform}",
        "train.max_steps=2",
    )
    pipeline.run(recipe)
    log = (tmp_path / "run" / "train" / "log.jsonl").read_text().splitlines()
    row = json.loads(log[-1])
    assert set(row["terms"]) == {"kd", "ce", "feature/scripture", "feature/code"}
    assert sum(row["grad_shares"].values()) == pytest.approx(1)
    assert not any("adapter" in name for name in _weights(tmp_path / "run"))
    # With a named fusion, only the best teacher had to be found.
    assert not (tmp_path / "run" / "preflight.json").exists()
    best = json.loads((tmp_path / "run" / "best_teacher.json").read_text())
    measured = pipeline.preflight(recipe).best_single
    assert (measured.teacher, measured.nll) == (best["teacher"], pytest.approx(best["nll"]))


def test_too_little_memory_for_a_preflight_is_refused(zoo: Path, tmp_path: Path) -> None:
    with refused(RecipeError, "override `preflight.memory=0.01`: preflight.memory: "):
        _recipe(zoo, tmp_path, "preflight.memory=0.01", "preflight.max_tokens=5000")


def test_preflight_of_live_teachers_compares_whole_distributions_on_fewer_windows(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second sweep reads a part of the windows, in batches that the first one did not have.
    monkeypatch.setattr(search, "FULL_TOKENS", 90)
    report = pipeline.preflight(_recipe(zoo, tmp_path))
    ranked = {fusion.num_tokens for fusion in report.fusions}
    assert report.num_tokens is not None
    assert 0 < max(ranked) < report.num_tokens


def test_preflight_can_write_its_choice_into_the_recipe(zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(zoo, tmp_path)
    report = pipeline.preflight(recipe, apply_to=tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert isinstance(again.fusion, Fusion)
    assert report.chosen.nll is not None
    assert report.best_single.nll is not None
    assert report.chosen.nll <= report.best_single.nll + 1e-6
    assert len(report.verdict) == 3
    # The applied recipe is the same run, and its preflight is kept.
    before = (tmp_path / "run" / "preflight.json").stat().st_mtime_ns
    pipeline.train(_applied(tmp_path))
    assert (tmp_path / "run" / "preflight.json").stat().st_mtime_ns == before


def test_a_run_goes_on_after_its_choice_is_written_into_the_recipe(
    zoo: Path, tmp_path: Path
) -> None:
    recipe = _recipe(zoo, tmp_path)
    pipeline.train(recipe)
    trained = (tmp_path / "run" / "student" / "model.safetensors").stat().st_mtime_ns
    pipeline.preflight(recipe, apply_to=tmp_path / "recipe.yaml")
    pipeline.train(_applied(tmp_path))
    assert (tmp_path / "run" / "student" / "model.safetensors").stat().st_mtime_ns == trained


def test_an_encoder_is_refused_by_check(zoo: Path, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = len(tiny.tiny_tokenizer())
    config = AutoConfig.for_model("bert", vocab_size=size, intermediate_size=64, **shape)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "bert")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "bert")
    with refused(ModelError, "teachers.bert: "):
        pipeline.check(_recipe(zoo, tmp_path, f"teachers.bert.model={tmp_path / 'bert'}"))


def test_half_precision_weights_of_the_student_are_checked(zoo: Path, tmp_path: Path) -> None:
    with refused(RecipeError, "student.dtype: "):
        pipeline.check(_recipe(zoo, tmp_path, "student.dtype=float16"))
    for rate, is_small in (("1e-5", True), ("1e-3", False)):
        overrides = "student.dtype=bfloat16", f"train.learning_rate={rate}"
        warnings = pipeline.check(_recipe(zoo, tmp_path, *overrides)).warnings
        assert any("bfloat16 weights" in line for line in warnings) == is_small


def test_check_writes_nothing_and_summarizes_the_run(zoo: Path, tmp_path: Path) -> None:
    report = pipeline.check(_recipe(zoo, tmp_path))
    text = "\n".join(report.lines)
    assert "teachers.code: vocabulary identical" in text
    assert "data.train:" in text
    assert "4 steps of 4 windows" in text
    assert not (tmp_path / "run").exists()


def test_check_refuses_the_same_weights_twice(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "code", tmp_path / "copy")
    with refused(RecipeError, "teachers.code and teachers.again "):
        pipeline.check(_recipe(zoo, tmp_path, f"teachers.again.model={tmp_path / 'copy'}"))


def test_check_refuses_the_same_weights_in_other_files(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "code", tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(zoo / "code")
    model.save_pretrained(tmp_path / "copy", max_shard_size="70KB")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    with refused(RecipeError, "teachers.code and teachers.again "):
        pipeline.check(_recipe(zoo, tmp_path, f"teachers.again.model={tmp_path / 'copy'}"))


def test_check_warns_when_the_student_is_a_teacher(zoo: Path, tmp_path: Path) -> None:
    report = pipeline.check(_recipe(zoo, tmp_path, f"student={{model: {zoo / 'code'}}}"))
    assert report.warnings == [
        "student: equals teachers.code; its distillation loss to that teacher starts at 0"
    ]


OPT = {
    **{"model_type": "opt", "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
}
BLOOM = {"model_type": "bloom", "hidden_size": 16, "n_layer": 2, "n_head": 2}
LFM2 = {
    **{"model_type": "lfm2", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
}


@pytest.mark.parametrize("config", [OPT, BLOOM, LFM2], ids=lambda config: config["model_type"])
def test_a_family_that_needs_one_document_per_window(
    zoo: Path, tmp_path: Path, config: dict[str, object]
) -> None:
    """Refused by `check` for packed windows, as a student and as a teacher, and trained without."""
    student = f"student={{config: {json.dumps(config)}, tokenizer: {zoo / 'code'}}}"
    with refused(ModelError, "student: "):
        pipeline.check(_recipe(zoo, tmp_path, student))
    folder = tiny.save_tiny(tmp_path / "m", **config)
    teacher = f"teachers.code.model={folder}"
    with refused(ModelError, "teachers.code: "):
        pipeline.check(_recipe(zoo, tmp_path, teacher))
    recipe = _recipe(zoo, tmp_path, student, teacher, "data.packing=false", "train.max_steps=2")
    pipeline.check(recipe)
    assert (pipeline.train(recipe) / "model.safetensors").is_file()


def test_check_refuses_documents_beyond_a_switch_of_the_rope(zoo: Path, tmp_path: Path) -> None:
    rope = {
        **{"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0},
        **{"original_max_position_embeddings": 16, "short_factor": [1.0] * 4},
        "long_factor": [8.0] * 4,
    }
    config = {"model_type": "phi3", "rope_parameters": rope, "pad_token_id": 0}
    folder = tiny.save_tiny(tmp_path / "m", **config, original_max_position_embeddings=16)
    teacher = f"teachers.code.model={folder}"
    with refused(ModelError, "teachers.code: "):
        pipeline.check(_recipe(zoo, tmp_path, teacher))
    pipeline.check(_recipe(zoo, tmp_path, teacher, "data.max_length=16"))


def test_a_saved_student_is_compared_with_the_trained_one(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(zoo, tmp_path, "train.max_steps=2")
    save = DistillTrainer.save_student

    def damage(self: DistillTrainer, path: Path) -> None:
        save(self, path)
        weights = load_file(path / "model.safetensors")
        weights["model.norm.weight"] *= 1.01
        save_file(weights, path / "model.safetensors", {"format": "pt"})

    with monkeypatch.context() as patch, refused(TrainingError, "", volatile=r"[\d.e-]+(?=\))"):
        patch.setattr(DistillTrainer, "save_student", damage)
        pipeline.train(recipe)
    assert pipeline.train(recipe).is_dir()


def test_check_refuses_another_vocabulary(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "code", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    with refused(VocabularyError, "teachers.code: "):
        pipeline.check(_recipe(zoo, tmp_path, f"teachers.code.model={tmp_path / 'other'}"))


def test_check_warns_of_less_text_than_one_step_takes(zoo: Path, tmp_path: Path) -> None:
    report = pipeline.check(_recipe(zoo, tmp_path, "train.per_device_train_batch_size=4096"))
    assert any("one optimizer step takes 4096" in line for line in report.warnings)


def test_non_finite_weights_stop_the_run_before_training(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "code", tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with refused(ModelError, "teachers.code: "):
        pipeline.run(_recipe(zoo, tmp_path, f"teachers.code.model={tmp_path / 'bad'}"))
    assert not (tmp_path / "run" / "train").exists()


def test_controls_differ_from_the_student_in_one_thing(zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(zoo, tmp_path)
    main = main_variant(recipe, Fusion())
    variants = control_variants(recipe, "code", 2.5)
    assert tuple(variants) == CONTROLS
    assert (
        variants["ce_only"].objective.kd_ratio
        == variants["ce_only_equal_compute"].objective.kd_ratio
        == 0
    )
    assert variants["ce_only_equal_compute"].steps_factor == 2.5
    assert variants["best_single"].fusion == Fusion(weighting=BestSingle(teacher="code"))
    assert variants["best_single"].teachers == ("code",)
    assert variants["uniform"].fusion == Fusion(weighting=Uniform())
    assert variants["entropy"].fusion == Fusion(weighting=Entropy())
    for name in ("best_single", "uniform", "entropy"):
        assert variants[name].objective == main.objective
        assert variants[name].steps_factor == 1
    identities = [json.dumps(v.identity(), sort_keys=True) for v in (main, *variants.values())]
    assert len(set(identities)) == 6


def test_distill_takes_overrides_only_with_a_file(zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(zoo, tmp_path)
    assert "max_steps: 4" in dump_recipe(recipe)
    with refused(CollegiumError):
        collegium.distill(recipe, "seed=1")


@pytest.mark.parametrize("stage", [pipeline.run, pipeline.train, pipeline.evaluate])
def test_a_student_that_cannot_be_trained_is_refused_before_its_teachers_are_read(
    stage: Callable[[Recipe], Any], zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ModelError("student: mixes documents")

    monkeypatch.setattr(RunContext, "new_student", refuse)
    recipe = _recipe(zoo, tmp_path, "cache={enabled: true, kind: per_teacher}")
    with pytest.raises(ModelError, match="mixes documents"):
        stage(recipe)
    made = {path.name for path in recipe.output_dir.iterdir()}
    assert not made & {"cache", "preflight.json", "train"}


def test_a_time_limit_shapes_no_artifact(zoo: Path, tmp_path: Path) -> None:
    """A run that was ended by it goes on with a longer one."""
    first, second, other = (
        RunContext(_recipe(zoo, tmp_path, *change)).inputs("train")
        for change in ((), ("train.ddp_timeout=7",), ("train.learning_rate=0.5",))
    )
    assert first == second != other
