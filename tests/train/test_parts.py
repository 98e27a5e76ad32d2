"""Parts of a trainer: feature terms with their adapters, devices of teachers, seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments

from collegium.losses.features import FeatureLoss
from collegium.losses.pairing import FeatureOptions
from collegium.models.forward import tap_names, tap_width
from collegium.storage.records import read_log
from collegium.teachers.local import LocalTeacher
from collegium.train import state
from collegium.train.arguments import adopt_arguments
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.progress import TrainingProgress
from collegium.train.trainer import DistillTrainer, TrainOptions, named_teachers, training_arguments
from training_runs import VOCAB, Windows, objective, small_model, stack, trainer


def featured() -> Objective:
    """Feature terms of two teachers, in float64."""
    model, options = small_model(), FeatureOptions(weight=0.5)
    widths = {tap: tap_width(model, tap) for tap in tap_names(model)}
    terms = FeatureLoss(options, widths, {"teacher_0": widths, "teacher_1": widths}, seed=0)
    return Objective(
        ObjectiveOptions(features=options), objective().fusion, states=[terms.double()]
    )


def test_the_scale_of_feature_terms_changes_per_step_not_per_micro_batch(tmp_path: Path) -> None:
    scales, students = [], []
    for batch, accumulate in ((6, 1), (2, 3)):
        seen: list[torch.Tensor] = []

        class Keep(TrainerCallback):
            def on_step_end(self, args, state, control, seen=seen, **kwargs):
                seen.append(made.step.objective.states[0].scale_K.clone())  # noqa: B023

        made = trainer(
            tmp_path / str(batch),
            model=small_model().double(),
            teachers=[small_model(1).double(), small_model(2).double()],
            objective=featured(),
            options={
                "max_steps": 3,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulate,
                "optim": "sgd",
            },
            callbacks=[Keep(), TrainingProgress(quiet=True)],
        )
        made.train()
        scales.append(torch.stack(seen))
        students.append({name: value.clone() for name, value in made.model.state_dict().items()})
    assert (scales[0][0] != 1).all()
    assert (scales[0][1:] != scales[0][:-1]).all()
    torch.testing.assert_close(scales[0], scales[1], rtol=1e-12, atol=0)
    for name, value in students[0].items():
        torch.testing.assert_close(students[1][name], value, rtol=1e-9, atol=1e-12)


def test_only_live_models_move_to_the_device_of_the_run() -> None:
    there = torch.device("meta")
    placed, live = LocalTeacher("placed", small_model(1), vocab_size=VOCAB), small_model(2)
    teachers = named_teachers([placed, live], small_model(), VOCAB, there)
    assert [teacher.name for teacher in teachers] == ["placed", "teacher_1"]
    assert teachers[0] is placed
    assert {parameter.device.type for parameter in placed.model.parameters()} == {"cpu"}
    assert {parameter.device for parameter in live.parameters()} == {there}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_teachers_on_both_devices_train_a_student_on_the_gpu(tmp_path: Path) -> None:
    losses = []
    for on_cpu in (True, False):
        args = training_arguments(
            TrainOptions(max_steps=3, logging_steps=1),
            output_dir=tmp_path / str(on_cpu),
            seed=3,
            on_cpu=on_cpu,
        )
        teachers = [LocalTeacher("placed", small_model(1), vocab_size=VOCAB), small_model(2)]
        made = DistillTrainer(
            small_model(), teachers, args, train_dataset=Windows(), data_collator=stack
        )
        made.train()
        assert made.model.device.type == ("cpu" if on_cpu else "cuda")
        losses.append([row.loss for row in read_log(made.run_folder / "log.jsonl") or ()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_adapters_are_in_the_optimizer_without_decay(tmp_path: Path) -> None:
    made = trainer(tmp_path, objective=featured(), options={"weight_decay": 0.3})
    groups = made.create_optimizer().param_groups
    adapters = {id(parameter) for parameter in made.step.objective.parameters()}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert adapters
    assert {decays[number] for number in adapters} == {0.0}
    assert decays[id(made.model.lm_head.weight)] == 0.3
    assert decays[id(made.model.model.norm.weight)] == 0.0


def test_the_data_order_has_a_separate_seed(tmp_path: Path) -> None:
    """Otherwise it depends on earlier random draws, so student and controls would differ."""
    args = TrainingArguments(output_dir=str(tmp_path), seed=7, report_to="none", use_cpu=True)
    assert args.data_seed is None
    adopt_arguments(args)
    assert args.data_seed == 7


def test_clipping_measures_the_student_only(tmp_path: Path) -> None:
    """Gradients of adapters are on another scale, and keep it."""
    made = trainer(tmp_path, objective=featured(), options={"max_grad_norm": 1.0})
    student = made.step.student
    own, others = list(student.parameters()), [*made.step.objective.parameters()]
    assert others
    for parameter in (*own, *others):
        parameter.grad = torch.full_like(parameter, 3.0)
    norm = 3 * sum(p.numel() for p in own) ** 0.5
    assert float(made._clip_grad_norm(made.step)) == pytest.approx(norm, rel=1e-5)
    clipped = sum(float(p.grad.square().sum()) for p in own if p.grad is not None) ** 0.5
    assert clipped == pytest.approx(1.0, rel=1e-4)
    assert all(bool((p.grad == 3.0).all()) for p in others if p.grad is not None)


def test_saving_a_student_keeps_its_cache_off_in_training(tmp_path: Path) -> None:
    student = small_model()
    student.config.use_cache = False
    state.save_student(tmp_path, student, None, use_cache=True)
    assert student.config.use_cache is False
    assert type(student).from_pretrained(tmp_path).config.use_cache is True


def test_a_longer_run_reports_the_rate_that_it_takes(tmp_path: Path) -> None:
    def schedule(length: int) -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        return optimizer, LambdaLR(optimizer, lambda step: 1 - step / length)

    optimizer, scheduler = schedule(4)
    optimizer.step()
    scheduler.step()
    scalars, tensors = state.optimizer_state(optimizer)
    record = {"optimizer": scalars, "scheduler": scheduler.state_dict()}
    state.save(tmp_path, record, {state.OPTIMIZER: tensors})
    optimizer, scheduler = schedule(10)
    state.load_optimizer(tmp_path, optimizer, scheduler)
    assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]] == [0.5 * 0.9]
