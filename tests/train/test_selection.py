"""Evaluations during training: their values, early stopping, the best checkpoint, and resume."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import TrainerCallback

from collegium.errors import Interrupted
from collegium.storage.records import LogStep, ValidationScore, read_log
from collegium.teachers.prefetch import PrefetchingCollator
from collegium.train import checkpoint, state
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions, TrainOptions
from collegium.train.progress import TrainingProgress
from collegium.train.selection import selection_callback
from collegium.types import Batch
from refusals import refused
from training_runs import FakeTeacher, Windows, objective, stack, trainer

# At this rate the student soon gets worse, so that a run stops before its last step.
STOPPING: dict[str, Any] = {
    "max_steps": 16,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "eval_steps": 2,
    "save_steps": 5,
    "gradient_accumulation_steps": 1,
    "early_stopping_patience": 3,
}


class Other(Windows):
    """Validation windows: other tokens, with a number of bytes each."""

    def __init__(self) -> None:
        super().__init__(5)
        for number, row in enumerate(self.rows):
            ids = (row["input_ids"] + number + 1) % 24
            labels = torch.where(row["labels"] < 0, row["labels"], ids)
            row |= {"input_ids": ids, "labels": labels, "num_bytes": torch.full_like(ids, 3)}


def made(folder: Path, options: dict[str, Any], **more: Any) -> Any:
    more.setdefault("callbacks", [TrainingProgress(quiet=True)])
    more["callbacks"] += [selection_callback(TrainOptions(**options))]
    labels = Objective(ObjectiveOptions(kd_ratio=0), None)
    return trainer(
        folder, teachers=[], objective=labels, options=options, eval_dataset=Other(), **more
    )


def digest(run: Any) -> dict[str, Any]:
    """Everything of a run that must not depend on interruptions."""
    logged = [row.to_json() for row in read_log(run.run_folder / "log.jsonl") or ()]
    for row in logged:
        row.pop("tokens_per_s", None)
        row.get("validation", {}).pop("seconds", None)
    return {
        "weights": {name: p.tolist() for name, p in run.model.state_dict().items()},
        "log": logged,
        "checkpoints": [path.name for path in checkpoint.checkpoints(run.run_folder)],
        "steps": run.state.global_step,
        "best": (run.best_step, run.state.best_metric),
        "stopped": run.stopped_early,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = made(tmp_path_factory.mktemp("whole"), STOPPING)
    run.train()
    return digest(run)


def curve(result: dict[str, Any]) -> dict[int, float]:
    return {r["step"]: r["validation"]["nll"] for r in result["log"] if "validation" in r}


def test_a_run_stops_early_and_its_student_is_the_best_one(whole: dict[str, Any]) -> None:
    nll = curve(whole)
    best = min(nll, key=lambda step: nll[step])
    assert whole["stopped"]
    assert whole["best"] == (best, nll[best])
    # Three evaluations in a row that are no better.
    assert whole["steps"] == max(nll) == best + 6 < 16
    assert all(nll[step] >= nll[best] for step in nll)
    # The best is kept beyond the limit of two, and the end is there to be found again.
    assert whole["checkpoints"] == [f"checkpoint-{whole['steps']}", f"checkpoint-{best}"]


@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupted_run_stops_at_the_same_step(
    whole: dict[str, Any], tmp_path: Path, step: int
) -> None:
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step + 1 == step:
                os.kill(os.getpid(), signal.SIGINT)

    broken = made(tmp_path, STOPPING, callbacks=[TrainingProgress(quiet=True), Stop()])
    with refused(Interrupted, "SIGINT: "):
        broken.train()
    rest = made(tmp_path, STOPPING)
    rest.train(resume_from_checkpoint=True)
    assert digest(rest) == whole


def test_a_run_that_has_stopped_takes_no_more_steps(whole: dict[str, Any], tmp_path: Path) -> None:
    made(tmp_path, STOPPING).train()
    again = made(tmp_path, STOPPING)
    again.train(resume_from_checkpoint=True)
    assert digest(again) == whole
    # A longer run goes on from there, with the count of the shorter one.
    longer = made(tmp_path, STOPPING | {"max_steps": 40})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step > whole["steps"]


def test_the_threshold_asks_for_more_than_any_fall(tmp_path: Path) -> None:
    run = made(tmp_path, STOPPING | {"early_stopping_threshold": 50.0, "max_steps": 20})
    run.train()
    # No evaluation after the first lowers the NLL by 50 nats.
    assert run.state.global_step == 8
    assert run.stopped_early


def test_evaluations_change_no_number_of_the_training(tmp_path: Path) -> None:
    steps = {"learning_rate": 0.1, "max_steps": 6}
    plain = trainer(tmp_path / "plain", options=steps)
    plain.train()
    run = trainer(tmp_path / "run", options=steps | {"eval_steps": 2}, eval_dataset=Other())
    run.train()
    assert run.best_step is None
    for ours, theirs in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
def test_the_nll_of_an_evaluation(tmp_path: Path, kd_ratio: float) -> None:
    options = {"max_steps": 3, "eval_steps": 2}
    run = trainer(
        tmp_path, options=options, eval_dataset=Other(), objective=objective(kd_ratio=kd_ratio)
    )
    run.train()
    log = read_log(tmp_path / "log.jsonl") or ()
    scores = {row.step: row.validation for row in log if row.validation is not None}
    assert list(scores) == [2, 3]  # the last step, too
    nats = num_tokens = 0.0
    for inputs in Other().rows:
        batch = Batch.from_inputs({key: value[None] for key, value in inputs.items()})
        rows = batch.rows()
        for document in rows.documents.unique():
            # Each document of a window by itself, in float64.
            is_here = rows.documents == document
            end = rows.index[is_here].max() + 2
            start = end - 1 - batch.position_ids[0, end - 1]
            ids = batch.input_ids[:, start:end]
            with torch.no_grad():
                logp = run.model.double().eval()(ids).logits[0].log_softmax(-1)
            label = batch.labels[0, rows.index[is_here] + 1]
            nats -= float(logp[rows.index[is_here] - start, label].sum())
            num_tokens += len(label)
    last = scores[3]
    assert last is not None
    assert last.num_tokens == num_tokens
    assert last.nll == pytest.approx(nats / num_tokens, rel=1e-5)
    assert last.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * num_tokens), rel=1e-5)
    assert last.loss is not None
    assert (last.loss == pytest.approx(last.nll)) == (kd_ratio == 0)


def test_an_evaluation_on_labels_asks_no_teacher_and_prefetches_nothing(tmp_path: Path) -> None:
    teacher = FakeTeacher("a")
    prefetched: list[Batch] = []
    run = trainer(
        tmp_path,
        teachers=[teacher],
        options={"max_steps": 1, "eval_steps": 1, "gradient_accumulation_steps": 1},
        eval_dataset=Other(),
        evaluates_labels_only=True,
        data_collator=PrefetchingCollator(stack, [prefetched.append]),
    )
    run.train()
    calls, batches = teacher.num_calls, len(prefetched)
    assert calls == 1
    metrics = run.evaluate()
    assert (teacher.num_calls, len(prefetched)) == (calls, batches)
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_nll"])
    (row,) = [r.validation for r in read_log(tmp_path / "log.jsonl") or () if r.validation]
    assert row.loss is None  # that of the objective needs the teachers
    assert isinstance(run.data_collator, PrefetchingCollator)
    assert state.read(tmp_path / "checkpoint-1")["step"] == 1


def test_an_evaluation_joins_the_line_of_its_step(tmp_path: Path) -> None:
    lines = [LogStep(step=2, loss=3.0), LogStep(step=2, validation=ValidationScore(nll=4.0))]
    lines.append(LogStep(step=4, validation=ValidationScore(nll=3.5)))
    text = "".join(f"{line.model_dump_json(exclude_unset=True)}\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text)
    first, second = read_log(tmp_path / "log.jsonl") or ()
    assert (first.loss, first.validation) == (3.0, ValidationScore(nll=4.0))
    assert second.validation == ValidationScore(nll=3.5)


@pytest.mark.parametrize(
    "options",
    [
        {"load_best_model_at_end": True},
        {"early_stopping_patience": 2},
        {"early_stopping_patience": 2, "load_best_model_at_end": False},
        {"eval_steps": 5, "early_stopping_threshold": 0.1},
    ],
)
def test_a_choice_without_evaluations_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"eval_steps|early_stopping_patience"):
        TrainOptions(**options)


def test_the_best_student_is_that_of_its_checkpoint(tmp_path: Path) -> None:
    """Without a patience the run is complete, and its best evaluation is no save step."""
    options = {k: v for k, v in STOPPING.items() if k != "early_stopping_patience"}
    run = made(tmp_path, options | {"load_best_model_at_end": True})
    run.train()
    assert run.state.global_step == 16
    assert not run.stopped_early
    assert run.best_step is not None
    assert run.best_step % 5
    best = tmp_path / f"checkpoint-{run.best_step}" / state.STUDENT / "model.safetensors"
    saved = load_file(best)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(saved.get(name, tensor), tensor)
    run.save_student(tmp_path / "final")
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == best.read_bytes()
