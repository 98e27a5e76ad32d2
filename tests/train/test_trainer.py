"""Training step: denominator, log and refusals."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import TrainerCallback

import collegium
from collegium.data.collate import Collator
from collegium.data.encode import Encoded
from collegium.data.windows import PackedDataset
from collegium.distributions import Answer
from collegium.errors import ModelError, TrainingError
from collegium.kernels.plain import TorchKernels
from collegium.losses.pairing import FeatureOptions
from collegium.storage.records import read_log
from collegium.train.meter import StepMeter
from collegium.train.step import row_losses
from collegium.train.trainer import DistillTrainer, TrainOptions, training_arguments
from collegium.types import LossSum, Rows
from refusals import refused
from training_runs import VOCAB, FakeTeacher, Windows, objective, small_model, trainer

SOURCE = Path(collegium.__file__).parent


class Gradients(TrainerCallback):
    """Records the gradients of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters()})


def split_run(folder: Path, batch: int, accumulate: int) -> tuple[Gradients, Any]:
    kept = Gradients()
    model = small_model().double()
    made = trainer(
        folder,
        model=model,
        teachers=[small_model(1).double(), small_model(2).double()],
        options={
            "max_steps": 3,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulate,
            "optim": "sgd",
            "max_grad_norm": 0,
        },
        callbacks=[kept],
    )
    made.train()
    return kept, model


def test_any_split_of_a_step_gives_the_same_gradient_and_weights(tmp_path: Path) -> None:
    whole, reference = split_run(tmp_path / "a", 6, 1)
    assert len(whole.steps) == 3
    for number, (batch, accumulate) in enumerate([(3, 2), (2, 3), (1, 6)]):
        parts, model = split_run(tmp_path / str(number), batch, accumulate)
        for ours, theirs in zip(parts.steps, whole.steps, strict=True):
            for name, grad in theirs.items():
                scale = grad.abs().max()
                assert scale > 0
                assert (ours[name] - grad).abs().max() <= 1e-12 * scale + 1e-15
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_without_teachers_the_loss_is_the_cross_entropy_of_transformers(tmp_path: Path) -> None:
    rows = [{"input_ids": [n, 5, 7, 3 + n], "labels": [n, -100, 7, 3 + n]} for n in range(4)]
    model = small_model()
    made = trainer(
        tmp_path,
        model=model,
        teachers=[],
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=Collator(),
        options={
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
        },
    )
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    expected = model(**batch).loss.item()
    assert made.compute_loss(model, Collator()(rows)).item() == pytest.approx(expected, rel=1e-6)
    metrics = made.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval_ce"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval_num_tokens"] == 8
    made.train()
    (row, *_) = read_log(tmp_path / "log.jsonl") or ()
    assert row.loss == pytest.approx(expected, rel=1e-5)
    assert row.terms.keys() == {"ce"}


def test_evaluation_averages_over_tokens_not_batches(tmp_path: Path) -> None:
    results = []
    for number, size in enumerate((1, 5)):
        made = trainer(
            tmp_path / str(number),
            eval_dataset=Windows(),
            options={"per_device_eval_batch_size": size},
        )
        results.append(made.evaluate())
    for name in ("eval_loss", "eval_kd", "eval_ce"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5)
    assert results[0]["eval_loss"] == pytest.approx(
        0.9 * results[0]["eval_kd"] + 0.1 * results[0]["eval_ce"], rel=1e-5
    )
    predicted = made.predict(Windows()).metrics
    assert predicted["test_loss"] == pytest.approx(results[0]["eval_loss"], rel=1e-5)
    loss, logits, labels = made.prediction_step(
        made.model, made.data_collator([Windows()[0]]), prediction_loss_only=True
    )
    assert math.isfinite(float(loss))
    assert logits is labels is None


def test_the_log_has_a_row_per_logged_step_with_every_number(tmp_path: Path) -> None:
    encoded = [
        Encoded(np.arange(3, 11), np.ones(8, bool), np.ones(8, np.int64), can_split=True)
        for _ in range(6)
    ]
    data = PackedDataset(
        encoded, max_length=8, domains=["law", "code"] * 3, names=[f"doc {n}" for n in range(6)]
    )
    made = trainer(
        tmp_path,
        teachers={"big": small_model(1), "old": small_model(2)},
        train_dataset=data,
        data_collator=Collator(),
        options={"max_steps": 5, "logging_steps": 2},
    )
    made.train()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5]
    for row in rows:
        assert set(row) == {
            "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_s", "num_tokens",
            "terms", "term_weights", "grad_shares", "teacher_weights", "domain_weights", "conflict",
        }  # fmt: skip
        assert row["conflict"] == {}
        assert row["loss"] == pytest.approx(
            sum(row["term_weights"][k] * row["terms"][k] for k in ("kd", "ce")), rel=1e-5
        )
        assert sum(row["grad_shares"].values()) == pytest.approx(1)
        assert row["teacher_weights"] == pytest.approx({"big": 0.5, "old": 0.5}, abs=0.1)
        assert set(row["domain_weights"]) <= {"law", "code"}
        for weights in row["domain_weights"].values():
            assert sum(weights.values()) == pytest.approx(1, rel=1e-5)
        assert row["tokens_per_s"] > 0
    # 6 windows of 7 targets make one epoch of two steps.
    assert [row["num_tokens"] for row in rows] == [42, 84, 112]
    assert "teacher_weights/big" in made.state.log_history[0]


def test_the_log_counts_where_a_conflict_policy_acts() -> None:
    rows = Rows(*[torch.arange(6)] * 3, samples=torch.tensor([0, 0, 0, 1, 1, 2]))
    meter = StepMeter(["a"], domains=["code", "law"], sample_domains=torch.tensor([1, 0, 1]))
    for scale in (1.0, 3.0):
        meter.add(
            LossSum(
                total=torch.zeros(()),
                terms={},
                weights={},
                grad_norms={},
                rows=rows,
                teacher_weights_KN=torch.ones(1, 6),
                conflict={
                    "disagreement": 0.1 * scale * torch.ones(6),
                    "applied": torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0]),
                },
            )
        )
    again = StepMeter(["a"], domains=["code", "law"], sample_domains=torch.tensor([1, 0, 1]))
    again.load(json.loads(json.dumps(meter.state())), torch.device("cpu"))
    for row in (meter.row(), again.row()):
        conflict = row.conflict
        assert conflict.disagreement == pytest.approx(0.2)
        assert conflict.applied == pytest.approx(0.5)
        assert conflict.domains["law"].applied == pytest.approx(0.5)
        assert conflict.domains["code"].to_json() == pytest.approx(
            {"disagreement": 0.2, "applied": 0.5}
        )
    assert meter.row().conflict.to_json() == {}


def test_teachers_are_never_trained(tmp_path: Path) -> None:
    teacher = small_model(1, attention_dropout=0.5)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    made = trainer(tmp_path, teachers=[teacher], options={"max_steps": 2})
    made.train()
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    trained = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert trained == {id(parameter) for parameter in made.model.parameters()}


def test_a_teacher_that_shares_weights_with_the_student_is_refused(tmp_path: Path) -> None:
    model = small_model()
    with refused(ModelError, "teacher teacher_0: "):
        trainer(tmp_path, model=model, teachers=[model])


def test_two_teachers_of_one_name_are_refused(tmp_path: Path) -> None:
    with refused(TrainingError, "teachers: "):
        trainer(tmp_path, teachers=[FakeTeacher("a"), FakeTeacher("a")])
    with refused(TrainingError, "teachers: "):
        trainer(tmp_path, teachers={"b": FakeTeacher("a")})


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_stops(made: DistillTrainer, step: int, volatile: str = "") -> None:
    """Expect a run to fail in `step`, and check that the step left no trace."""
    seen: list[dict[str, torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            seen.append(weights(made.model))

    made.add_callback(Keep())
    with refused(TrainingError, f"step {step}: ", volatile=volatile):
        made.train()
    assert len(seen) == step - 1
    now = weights(made.model)
    assert all(torch.equal(seen[-1][name], value) for name, value in now.items())
    assert all(torch.isfinite(value).all() for value in now.values())
    assert len(list(made.run_folder.glob("checkpoint-*"))) == (step - 1) // 2


FAST = {"max_steps": 6, "save_steps": 2, "gradient_accumulation_steps": 2}


def test_a_nan_of_one_teacher_names_step_teacher_and_samples(tmp_path: Path) -> None:
    bad = FakeTeacher("broken", bad_call=5, bad_sample=6)
    made = trainer(
        tmp_path,
        teachers=[FakeTeacher("fine"), bad],
        options=FAST | {"per_device_train_batch_size": 6},
    )
    assert_stops(made, 3)


def test_a_teacher_that_checks_itself_is_reported_with_the_step(tmp_path: Path) -> None:
    class Strict(FakeTeacher):
        def score(self, batch: Any, rows: Any, taps: Any = ()) -> Answer:
            if self.num_calls == 4:
                raise TrainingError("teacher strict: non-finite")
            return super().score(batch, rows, taps)

    assert_stops(trainer(tmp_path, teachers=[Strict("strict")], options=FAST), 3)


def test_a_nan_in_the_loss_names_the_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def bad_losses(*arguments: Any, **named: Any) -> LossSum:
        """Cross-entropy that is NaN from the third step on."""
        calls.append(1)
        loss = row_losses(*arguments, **named)
        if len(calls) < 5:
            return loss
        nan = loss.total * float("nan")
        return dataclasses.replace(loss, total=nan, terms={"ce": nan.detach()})

    monkeypatch.setattr("collegium.train.step.row_losses", bad_losses)
    assert_stops(trainer(tmp_path, teachers=[], options=FAST), 3)


def test_a_nan_in_the_gradient_names_the_parameter(tmp_path: Path) -> None:
    model = small_model()
    calls = []

    def poison(grad: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return grad * float("nan") if len(calls) >= 6 else grad

    model.model.norm.weight.register_hook(poison)
    made = trainer(tmp_path, model=model, options=FAST)
    assert_stops(made, 3, volatile=r"(?<=loss )[\d.]+")


def test_nan_weights_of_the_student_are_named(tmp_path: Path) -> None:
    made = trainer(tmp_path, options=FAST | {"max_steps": 1})
    with torch.no_grad():
        made.model.model.norm.weight[0] = float("inf")
    with refused(TrainingError, "step 1: "):
        made.train()


def test_the_step_has_one_denominator_and_no_first_token_in_it(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    batch = made.data_collator([Windows()[0], Windows()[3]])
    expected = 2 * (10 - 2)
    for number in (1, 2):
        batches, num_rows = made.get_batch_samples(iter([batch] * 3), number, torch.device("cpu"))
        assert len(batches) == number
        assert int(num_rows) == number * expected
    loss, sums = made.compute_loss(made.model.eval(), batch, return_outputs=True)
    halved = made.compute_loss(made.model, batch, num_items_in_batch=2 * expected)
    assert sums.num_rows == expected
    assert halved.item() == pytest.approx(loss.item() / 2)


def test_a_kernel_and_a_teacher_are_a_few_calls_below_the_training_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader of the step passes at most 8 of our frames."""
    depths: dict[str, int] = {}

    def record(name: str) -> None:
        ours = [f.function for f in inspect.stack() if f.filename.startswith(str(SOURCE))]
        depths[name] = ours.index("training_step")

    real = TorchKernels.distill_

    def distill_(*arguments: Any, **named: Any) -> Any:
        record("kernel")
        return real(*arguments, **named)

    monkeypatch.setattr(TorchKernels, "distill_", distill_)
    teacher = small_model(1)
    made = trainer(
        tmp_path, teachers=[teacher], objective=objective(backend="torch"), options={"max_steps": 1}
    )
    # Not earlier: the teacher is probed when the trainer is made.
    teacher.base_model.register_forward_pre_hook(lambda *_: record("teacher"))
    made.train()
    assert depths.keys() == {"kernel", "teacher"}
    assert max(depths.values()) <= 8


def test_an_inert_term_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def inert(*arguments: Any, **named: Any) -> LossSum:
        loss = row_losses(*arguments, **named)
        norms = {name: torch.zeros(()) for name in loss.grad_norms}
        return dataclasses.replace(loss, grad_norms=norms)

    monkeypatch.setattr("collegium.train.step.row_losses", inert)
    made = trainer(tmp_path, teachers=[])
    with refused(TrainingError, "step 2: term `ce`: "):
        made.train()


def test_bfloat16_runs_the_layers_and_leaves_the_losses(tmp_path: Path) -> None:
    made = trainer(tmp_path, options={"max_steps": 2, "bf16": True, "logging_steps": 1})
    inner = made.model.model
    kinds = []
    inner.layers[0].mlp.register_forward_hook(lambda m, i, output: kinds.append(output.dtype))
    made.train()
    assert set(kinds) == {torch.bfloat16}
    assert {parameter.dtype for parameter in made.model.parameters()} == {torch.float32}
    plain = trainer(tmp_path / "plain", options={"max_steps": 2, "logging_steps": 1})
    plain.train()
    first = [(read_log(m.run_folder / "log.jsonl") or ())[0].loss for m in (made, plain)]
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=1e-2)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    results = []
    for flag in (False, True):
        made = trainer(
            tmp_path / str(flag),
            model=small_model(),
            options={"max_steps": 2, "gradient_checkpointing": flag},
        )
        made.train()
        results.append(weights(made.model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_steps"):
        TrainOptions(max_steps=0)
    with pytest.raises(ValidationError, match="warmup_steps"):
        TrainOptions(max_steps=10, warmup_steps=20)
    for name, value in [
        ("learning_rate", 0),
        ("learning_rate", 2),
        ("save_total_limit", 1),
        ("gradient_accumulation_steps", 0),
        ("optim", "nonsense"),
        ("unknown", 1),
    ]:
        with pytest.raises(ValidationError):
            TrainOptions(**{name: value})
    assert TrainOptions(max_steps=5).save_steps > 5


def test_arguments_are_those_of_the_options(tmp_path: Path) -> None:
    options = TrainOptions(warmup_steps=0.1, learning_rate=1e-3, weight_decay=0.2, adam_beta2=0.9)
    args = training_arguments(options, output_dir=tmp_path, seed=11)
    assert args.get_warmup_steps(50) == 5
    assert (args.learning_rate, args.weight_decay, args.adam_beta2) == (1e-3, 0.2, 0.9)
    assert (args.seed, args.data_seed) == (11, 11)
    assert args.report_to == []
    assert not args.logging_nan_inf_filter


def test_the_vocabulary_is_the_tokenizers(tmp_path: Path) -> None:
    from tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer(300)
    made = DistillTrainer(
        tiny_model(320, width=8),
        args=training_arguments(TrainOptions(max_steps=1), output_dir=tmp_path, seed=0),
        processing_class=tokenizer,
        train_dataset=[{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}],
    )
    assert made.step.vocab_size == len(tokenizer)
    assert trainer(tmp_path / "b").step.vocab_size == VOCAB
    made.train()
    made.save_model()
    assert (tmp_path / "tokenizer.json").exists()
    assert objective().needs_teachers


def test_the_gradients_of_adapters_are_cleared_after_each_step(tmp_path: Path) -> None:
    seen: list[list[bool]] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            grads = [p.grad for p in made.step.objective.parameters()]
            seen.append([grad is None or not grad.any() for grad in grads])

    part = objective(features=FeatureOptions())
    made = trainer(tmp_path, options={"max_steps": 3}, objective=part, callbacks=[Look()])
    made.train()
    assert len(seen) == 3
    assert all(seen)
    assert all(all(step) for step in seen)


def test_teachers_that_no_term_reads_are_not_scored(tmp_path: Path) -> None:
    class Silent(FakeTeacher):
        def score(self, batch, rows, taps=()):  # type: ignore[no-untyped-def]
            raise AssertionError("scored")

    made = trainer(
        tmp_path,
        teachers=[Silent("law")],
        options={"max_steps": 1},
        objective=objective(kd_ratio=0.0),
    )
    made.train()
    with pytest.raises(AssertionError, match="scored"):
        trainer(tmp_path / "kd", teachers=[Silent("law")], options={"max_steps": 1}).train()
