"""Students and teachers with PEFT adapters: wrapped, with `add_adapter`, or several on one base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from collegium.errors import Interrupted, ModelError, TrainingError
from collegium.models.adapters import active_adapter, merged_copy, unwrapped
from collegium.train import state
from refusals import refused
from training_runs import small_model, trainer

IDS = torch.arange(2, 22).reshape(2, 10)
PLANS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Model with `tie_word_embeddings=True`:UserWarning",
)


def plan(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)


def disturb(model: Any) -> Any:
    """Give the trained parameters values other than their first ones."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(name: str, *, wraps: bool = True, **config: Any) -> Any:
    model = small_model(**config)
    torch.manual_seed(4)
    if wraps:
        return disturb(peft.get_peft_model(model, plan(**PLANS[name])))
    model.add_adapter(plan(**PLANS[name]))
    return disturb(model)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("wraps", [False, True], ids=["add_adapter", "get_peft_model"])
@pytest.mark.parametrize("name", PLANS)
def test_the_deployed_student_is_merged_and_plain(
    tmp_path: Path, name: str, wraps: bool, is_tied: bool
) -> None:
    student = adapted(name, wraps=wraps, tie_word_embeddings=is_tied)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    made = trainer(
        tmp_path / "run", model=student, options={"max_steps": 2, "save_steps": 1},
        teachers=[small_model(1)],
    )  # fmt: skip
    made.train()
    assert made.model is student
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained
    expected = logits(student)
    made.save_student(tmp_path / "student")
    made.save_model(str(tmp_path / "run"))
    for folder in ("student", "run/checkpoint-2/student", "run"):
        loaded, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, output_loading_info=True
        )
        assert not any(info.values()), info
        assert not list((tmp_path / folder).glob("adapter*"))
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)
    # Saving leaves the student as it was.
    assert torch.equal(logits(student), expected)
    if wraps:
        student.save_pretrained(tmp_path / "adapter")
        base = small_model(tie_word_embeddings=is_tied)
        beside = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
        torch.testing.assert_close(logits(beside), expected)


class StopAt(TrainerCallback):
    """Simulates a signal during one step."""

    def __init__(self, made: Any, step: int) -> None:
        self.made, self.step = made, step

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step + 1 == self.step:
            self.made._stop.received = "SIGTERM"


@pytest.mark.parametrize("wraps", [False, True], ids=["add_adapter", "get_peft_model"])
def test_a_student_with_adapters_resumes_bit_by_bit(tmp_path: Path, wraps: bool) -> None:
    def make(folder: str, **config: Any) -> Any:
        student = adapted("trained head", wraps=wraps, attention_dropout=0.2, **config)
        return trainer(tmp_path / folder, model=student)

    whole = make("a")
    whole.train()
    broken = make("b")
    broken.add_callback(StopAt(broken, 4))
    with refused(Interrupted, "SIGTERM: "):
        broken.train()
    saved = load_file(tmp_path / "b" / "checkpoint-4" / state.TRAINED)
    trained = [n for n, p in unwrapped(whole.model, "").named_parameters() if p.requires_grad]
    assert set(saved) == set(trained)
    rest = make("b")
    rest.train(resume_from_checkpoint=True)
    pairs = zip(rest.model.state_dict().items(), whole.model.state_dict().items(), strict=True)
    for (name, ours), (_, theirs) in pairs:
        assert torch.equal(ours, theirs), name
    for one in (whole, rest):
        one.save_student(tmp_path / "student")
    # The base is no part of the checkpoint, so it must be the same.
    with refused(TrainingError, "checkpoint-8: "):
        make("b", initializer_range=0.5).train(resume_from_checkpoint=True)


def law_and_code() -> peft.PeftModel:
    """One base under two adapters."""
    model = peft.get_peft_model(small_model(7), plan(**PLANS["head"]), adapter_name="law")
    model.add_adapter("code", plan(**PLANS["head"]))
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def losses(made: Any) -> list[float]:
    torch.manual_seed(7)
    made.train()
    return [row["loss"] for row in made.state.log_history if "loss" in row]


def test_adapters_on_one_base_are_teachers_like_their_merged_models(tmp_path: Path) -> None:
    shared = law_and_code()
    merged = {}
    for name in ("law", "code"):
        with active_adapter(shared.get_base_model(), name):
            merged[name] = merged_copy(shared.get_base_model())
    together = trainer(tmp_path / "a", teachers={"law": shared, "code": shared})
    apart = trainer(tmp_path / "b", teachers=merged)
    assert losses(together) == pytest.approx(losses(apart), rel=1e-5)
    alone = trainer(tmp_path / "c", teachers={"law": shared})
    assert alone.step.teachers[0].adapter is None
    with refused(ModelError, "teacher poetry: "):
        trainer(tmp_path / "d", teachers={"law": shared, "poetry": shared})


def test_a_student_and_its_teachers_share_one_base(tmp_path: Path) -> None:
    def student_of(model: peft.PeftModel) -> peft.PeftModel:
        model.add_adapter("student", plan(target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
        model.set_adapter("student")
        return model

    torch.manual_seed(0)
    shared = student_of(law_and_code())
    separate, teachers = copy.deepcopy(shared), copy.deepcopy(shared)
    before = {n: p.detach().clone() for n, p in shared.named_parameters()}
    together = trainer(
        tmp_path / "a", model=shared, teachers={"law": shared, "code": shared},
        options={"gradient_checkpointing": True},
    )  # fmt: skip
    apart = trainer(
        tmp_path / "b", model=separate, teachers={"law": teachers, "code": teachers},
        options={"gradient_checkpointing": True},
    )  # fmt: skip
    assert losses(together) == pytest.approx(losses(apart), rel=1e-5)
    moved = {n for n, p in shared.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".student." in n}
    assert together.fingerprint()["weights"] == apart.fingerprint()["weights"]
    # The active adapter of the student cannot be its teacher.
    with refused(ModelError, "teacher student: "):
        trainer(tmp_path / "c", model=shared, teachers={"student": shared, "law": shared})


def test_prompt_tuning_is_refused(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with refused(ModelError, "model: "):
        trainer(tmp_path, model=peft.get_peft_model(small_model(), config))


def test_a_frozen_base_may_have_half_precision(tmp_path: Path) -> None:
    base = small_model().half()
    student = peft.get_peft_model(base, plan(target_modules=["q_proj"]))
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}
    trainer(tmp_path, model=student, options={"max_steps": 1}).train()


def test_a_base_of_a_student_is_no_teacher_of_it(tmp_path: Path) -> None:
    base = small_model()
    student = peft.get_peft_model(base, plan(target_modules=["q_proj"]))
    with refused(ModelError, "teacher teacher_0: "):
        trainer(tmp_path, model=student, teachers=[base])
