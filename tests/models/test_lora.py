"""LoRA in recipes: students that train only adapters, teachers that are a base and an adapter."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from collegium.config.recipe import load_recipe
from collegium.errors import ModelError, RecipeError
from collegium.models.loading import load_model
from collegium.models.lora import LoraOptions, add_lora
from collegium.models.options import ModelOptions
from collegium.models.student import PretrainedStudent
from collegium.run import pipeline
from collegium.run.context import RunContext
from collegium.teachers.local import LocalTeacher
from collegium.teachers.options import LocalOptions
from collegium.types import Batch
from refusals import refused
from tiny_run import recipe_text, write_zoo

peft = pytest.importorskip("peft")
IDS = torch.arange(48).reshape(2, 24) % 40
EVERYTHING = slice(None)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.save_tiny(tmp_path / "base", seed=1)


def save_adapter(base: Path, folder: Path, *, seed: int, targets: Any = "all-linear") -> Path:
    """Save an adapter with random values, and return its folder."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings():
        # PEFT 0.21 reads a name that transformers 5.23 deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.2, generator=generator)
    wrapped.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def reference(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of the base with W + (alpha / r) B A in every layer of the adapter's file."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    config = json.loads((adapter / "adapter_config.json").read_text())
    state = load_file(adapter / "adapter_model.safetensors")
    for name, a_rI in state.items():
        if "lora_A" in name:
            b_Or = state[name.replace("lora_A", "lora_B")].double()
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scale = config["lora_alpha"] / config["r"]
            with torch.no_grad():
                model.get_submodule(layer).weight += scale * b_Or @ a_rI.double()
    return logits(model)


def batch() -> Batch:
    position_BT = torch.arange(24).expand(2, -1).contiguous()
    sample_BT = torch.arange(2)[:, None].expand(-1, 24).contiguous()
    return Batch(IDS, position_BT, IDS, sample_BT)


def scored(teacher: LocalTeacher) -> torch.Tensor:
    return teacher.score(batch(), batch().rows()).distribution.logits(EVERYTHING)


def test_loaded_model_has_the_adapter_in_its_weights(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", seed=1)
    options = ModelOptions(model=str(base), adapter=str(adapter))
    options.check("teachers.one")
    model = load_model(options, where="teachers.one")
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(
        logits(model).double(), reference(base, adapter), atol=1e-5, rtol=1e-4
    )
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert float((logits(model) - logits(plain)).abs().max()) > 0.1


def test_teachers_with_adapters_share_their_base(base: Path, tmp_path: Path) -> None:
    adapters = [save_adapter(base, tmp_path / f"adapter{i}", seed=i) for i in range(3)]
    teachers = [
        LocalTeacher.load(
            f"teacher.{i}",
            LocalOptions(model=str(base), adapter=str(adapter), logit_scale=1.0 + i),
            vocab_size=400,
            where=f"teachers.teacher.{i}",
        )
        for i, adapter in enumerate(adapters)
    ]
    assert len({id(teacher.model) for teacher in teachers}) == 1
    assert len({teacher.num_parameters for teacher in teachers}) == 1
    wanted = [
        (1 + i) * reference(base, adapter)[:, :-1].flatten(0, 1)
        for i, adapter in enumerate(adapters)
    ]
    # In any order: each answers with its own adapter, whatever answered before.
    for i in (2, 0, 1, 1, 2):
        torch.testing.assert_close(scored(teachers[i]).double(), wanted[i], atol=1e-4, rtol=1e-4)


def test_base_without_adapter_or_with_other_options_is_not_shared(
    base: Path, tmp_path: Path
) -> None:
    adapter = str(save_adapter(base, tmp_path / "adapter", seed=1))
    first, plain, half = (
        LocalTeacher.load("t", options, vocab_size=400, where="teachers.t")
        for options in (
            LocalOptions(model=str(base), adapter=adapter),
            LocalOptions(model=str(base)),
            LocalOptions(model=str(base), adapter=adapter, dtype="bfloat16"),
        )
    )
    assert len({id(teacher.model) for teacher in (first, plain, half)}) == 3
    assert not any("lora" in name for name, _ in plain.model.named_parameters())
    assert half.model.dtype == torch.bfloat16


def test_identity_follows_the_adapter_and_not_its_path(base: Path, tmp_path: Path) -> None:
    one, two = (save_adapter(base, tmp_path / f"adapter{i}", seed=i) for i in (1, 2))
    copy = save_adapter(base, tmp_path / "copy", seed=1)

    def identity(adapter: Path | None) -> Any:
        path = None if adapter is None else str(adapter)
        return LocalOptions(model=str(base), adapter=path).identity()

    assert identity(one) == identity(copy)
    assert len({str(identity(x)) for x in (None, one, two)}) == 3


def damages() -> Iterator[tuple[str, Any]]:
    def edit(folder: Path, **values: Any) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def rewrite(folder: Path, change: Any) -> None:
        path = folder / "adapter_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path)

    def set_nan(state: dict[str, torch.Tensor]) -> None:
        state[min(state)][0, 0] = float("nan")

    yield "no weights", lambda folder: (folder / "adapter_model.safetensors").unlink()
    yield (
        "pickle",
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
    )
    yield "no config", lambda folder: (folder / "adapter_config.json").unlink()
    yield "another rank", lambda folder: edit(folder, r=4)
    yield "another kind", lambda folder: edit(folder, peft_type="IA3")
    yield "unknown layers", lambda folder: edit(folder, target_modules=["nothing"])
    yield "fewer layers", lambda folder: rewrite(folder, lambda state: state.pop(min(state)))
    yield "not finite", lambda folder: rewrite(folder, set_nan)
    yield (
        "truncated",
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 100),
    )


@pytest.mark.parametrize("name", dict(damages()))
def test_unusable_adapter_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", seed=1)
    dict(damages())[name](adapter)
    options = LocalOptions(model=str(base), adapter=str(adapter))
    with refused(ModelError, "teachers.t.adapter"):
        options.check("teachers.t")
        options.warnings("teachers.t")
    with pytest.raises(ModelError):
        LocalTeacher.load("t", options, vocab_size=400, where="teachers.t")


def test_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    other = tiny.save_tiny(tmp_path / "other", width=48)
    adapter = save_adapter(other, tmp_path / "adapter", seed=1)
    with refused(ModelError, "teachers.t.adapter"):
        LocalOptions(model=str(base), adapter=str(adapter)).check("teachers.t")


def test_check_fetches_no_adapter_of_the_hub(base: Path) -> None:
    options = LocalOptions(model=str(base), adapter="owner/adapter")
    options.check("teachers.t")
    options.warnings("teachers.t")
    with pytest.raises(ModelError, match="cannot be loaded"):
        LocalTeacher.load("t", options, vocab_size=400, where="teachers.t")


def test_new_adapters_change_nothing_and_are_all_that_trains(base: Path) -> None:
    options = PretrainedStudent(model=str(base), lora=LoraOptions(r=5, targets=["q_proj"]))
    options.check("student")
    student = options.build(seed=3, where="student")
    plain = AutoModelForCausalLM.from_pretrained(base)
    torch.testing.assert_close(logits(student), logits(plain), atol=0, rtol=0)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    # Two layers of rank 5: A (5, 32) and B (32, 5).
    assert sum(p.numel() for p in trained.values()) == 2 * (5 * 32 + 32 * 5)
    assert all("q_proj.lora_" in name for name in trained)
    again = options.build(seed=3, where="student")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, dict(student.named_parameters())[name])


def test_adapters_of_a_half_precision_model_are_float32(base: Path) -> None:
    model = load_model(ModelOptions(model=str(base), dtype="bfloat16"), where="student")
    add_lora(model, LoraOptions(r=2), seed=0, where="student")
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert bool(torch.isfinite(logits(model)).all())


def test_unknown_layers_of_a_student_are_refused(base: Path) -> None:
    options = PretrainedStudent(model=str(base), lora=LoraOptions(targets=["nothing"]))
    with refused(ModelError, "student.lora.targets"):
        options.check("student")


def test_fresh_student_has_no_adapters(tmp_path: Path) -> None:
    write_zoo(tmp_path)
    path = tmp_path / "tiny.yaml"
    text = recipe_text(tmp_path).replace("student:\n", "student:\n  lora: {r: 2}\n")
    path.write_text(text, encoding="utf-8")
    with refused(RecipeError, "tiny.yaml"):
        load_recipe(path)


def test_run_trains_adapters_under_teachers_with_adapters(tmp_path: Path) -> None:
    write_zoo(tmp_path)
    base = tmp_path / "scripture"
    one, two = (save_adapter(base, tmp_path / f"adapter{i}", seed=i) for i in (1, 2))
    text = recipe_text(tmp_path).replace("controls: [ce_only]", "controls: []")
    start = text.index("student:")
    models = f"""student:
  model: {base}
  lora: {{r: 2, targets: [q_proj, down_proj]}}
teachers:
  scripture: {{model: {base}, adapter: {one}}}
  code: {{model: {base}, adapter: {two}}}
cache: {{enabled: true, kind: per_teacher, targets: {{name: samples, draws: 20}}}}
"""
    path = tmp_path / "tiny.yaml"
    path.write_text(text[:start] + models + text[text.index("data:") :], encoding="utf-8")
    recipe = load_recipe(path)
    pipeline.run(recipe)
    student = load_file(recipe.output_dir / "student" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    changed = {name for name in before if not torch.equal(student[name], before[name])}
    assert student.keys() == before.keys()
    assert changed
    assert all("q_proj" in name or "down_proj" in name for name in changed)
    context = RunContext(recipe)
    teachers = context.teachers(["scripture", "code"])
    assert isinstance(teachers[0], LocalTeacher)
    assert isinstance(teachers[1], LocalTeacher)
    assert teachers[0].model is teachers[1].model
