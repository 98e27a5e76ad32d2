"""`DistillTrainer`: the Hugging Face trainer with our step, our log and our checkpoints; everything else is theirs.

Shapes: B batch, T time, N rows, K teachers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from collegium.data.pack import Collator, PackedDataset
from collegium.errors import TrainingError
from collegium.models import forward_rows
from collegium.teachers.routed import score_teachers
from collegium.train.meter import RunLog, StepMeter
from collegium.train.nan_diagnosis import bad_gradients, first_bad_rows, sample_list
from collegium.train.objective import InertTermCheck, Objective
from collegium.train.options import TrainOptions, training_arguments
from collegium.train.parts import (
    LiveTeachers,
    adopt_arguments,
    default_objective,
    named_teachers,
    vocabulary_size,
)
from collegium.train.progress import StopCallback, TrainingProgress
from collegium.train.resume import ResumableTrainer
from collegium.types import Batch, LossSum, Rows, StudentRows, Teacher, TeacherRows, is_row

__all__ = ["DistillTrainer", "TrainOptions", "training_arguments"]

_MEASURED_STEPS = 3


class DistillTrainer(ResumableTrainer):
    """Trains one student on the fused target of its teachers, or on labels alone where there are none.

    L = (1 / M) sum over all rows of the optimizer step, with M their number over all micro-batches: the gradient does
    not depend on how a step is split.
    """

    def __init__(  # noqa: PLR0913  (the arguments of a Hugging Face trainer)
        self,
        model: PreTrainedModel,
        teachers: LiveTeachers = (),
        args: TrainingArguments | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        objective: Objective | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Any = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        identity: Mapping[str, str] | None = None,
    ) -> None:
        """Take live objects, as trainers of Hugging Face do.

        Args:
            model: the student.
            teachers: frozen models, or anything with `score`; live models are named by their key or `teacher_0` ..., and moved
                to `args.device`. Others stay where they are and answer on the device of the batch, as `LocalTeacher` does. Token
                ids must mean the same to all and to the student: a live model cannot tell, so compare tokenizers before.
            args: training arguments; see `training_arguments` for those of a recipe.
            train_dataset: windows of `PackedDataset`, or rows with `input_ids` and, where wanted, `labels`.
            eval_dataset: the same, or a mapping of names to such.
            objective: the loss; by default 0.9 forward KL to the linear pool of the teachers under prefix likelihood, and 0.1 CE.
            processing_class: the tokenizer, saved beside every student; gives V, else the student's head does.
            data_collator: makes a batch of examples; ours by default.
            callbacks: further callbacks; a `TrainingProgress` among them replaces the default one.
            optimizers: optimizer and scheduler, where the arguments shall not choose them.
            identity: what a resumed run must find unchanged beside seed, data and teachers, such as digests.

        Raises:
            TrainingError: the arguments ask for what this trainer does not do.
        """
        args = args or training_arguments(TrainOptions(), output_dir="runs/student", seed=42)
        adopt_arguments(args)
        self.student = model
        self.run_folder = Path(args.output_dir or "runs/student")
        self.vocab_size = vocabulary_size(model, processing_class)
        self._use_cache = model.config.use_cache
        self._flow = StopCallback()
        shown = [callback for callback in callbacks or () if isinstance(callback, TrainingProgress)]
        self._progress = shown[0] if shown else TrainingProgress()
        others = [callback for callback in callbacks or () if callback is not self._progress]
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or Collator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*others, self._flow, self._progress],
            optimizers=optimizers,
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.teachers = named_teachers(teachers, model, self.vocab_size, args.device)
        self.objective = (objective or default_objective(self.teachers)).to(args.device)
        self._identity = dict(identity or {})
        self._log = RunLog(self.run_folder / "log.jsonl")
        self._meter = self.new_meter()
        self._inert = InertTermCheck(_MEASURED_STEPS)
        self._micro_batches: list[Mapping[str, Tensor]] = []
        self._step_loss = torch.zeros((), device=args.device)
        if args.torch_compile:
            model.base_model.compile()

    # The step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Batch -> rows -> student and teachers -> objective -> sum / number of target tokens of the whole step."""
        measure = model.training and self._is_measured()
        _, _, loss, rows = self._score(inputs, measure=measure)
        if model.training:
            self._meter.add(loss, rows)
            if measure:
                self._inert(loss)
        num_tokens = max(len(rows), 1) if num_items_in_batch is None else num_items_in_batch
        mean = loss.total / num_tokens
        return (mean, loss) if return_outputs else mean

    def _score(
        self, inputs: Mapping[str, Tensor], *, measure: bool = False
    ) -> tuple[StudentRows, list[TeacherRows], LossSum, Rows]:
        batch = Batch.from_inputs(inputs)
        rows = batch.rows()
        with self._autocast():
            student = forward_rows(
                self.student,
                batch,
                rows,
                vocab_size=self.vocab_size,
                taps=self.objective.student_taps,
            )
        teachers = self.teachers if self.objective.needs_teachers else []
        tapped = [one.name for one in teachers if self.objective.teacher_taps(one.name)]
        scored = score_teachers(
            teachers, batch, rows, self.objective.fusion, ask=self._ask, whole=tapped
        )
        return student, scored, self.objective(student, scored, rows, measure=measure), rows

    def _ask(self, teacher: Teacher, batch: Batch, rows: Rows) -> TeacherRows:
        try:
            return teacher.score(batch, rows, self.objective.teacher_taps(teacher.name))
        except TrainingError as error:
            step = self.state.global_step + 1
            raise TrainingError(f"step {step}: {error}; nothing was updated or saved") from error

    def _autocast(self) -> AbstractContextManager[None]:
        # Only the student's layers run in bfloat16: head and losses are ours, in the dtype of the weights or wider.
        return self.accelerator.autocast() if self.args.bf16 else nullcontext()

    def _is_measured(self) -> bool:
        step = self.state.global_step + 1
        every = max(int(self.state.logging_steps), 1)
        return step <= _MEASURED_STEPS or step % every == 0 or step >= self.state.max_steps

    def _get_num_items_in_batch(
        self, batch_samples: list[Mapping[str, Tensor]], device: torch.device
    ) -> Tensor | int | None:
        """The number of rows over all micro-batches of a step, counted as `Batch.rows` chooses them."""
        total = torch.zeros((), dtype=torch.int64, device=device)
        for inputs in batch_samples:
            total += is_row(inputs["labels"], inputs["position_ids"]).sum().to(device)
        return total.clamp(min=1)

    def training_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of one micro-batch; after the last one of a step, refuse what is not finite."""
        self.objective.train()
        if not self._micro_batches:
            # The base trainer clears the gradients of its model alone.
            self.objective.zero_grad()
        self._micro_batches.append(inputs)
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        self._step_loss = self._step_loss + loss
        if self.accelerator.sync_gradients:
            try:
                self._check_finite()
            finally:
                self._micro_batches = []
                self._step_loss = torch.zeros_like(self._step_loss)
            self.objective.end_step()
        return loss

    def _check_finite(self) -> None:
        grads = [p.grad for _, p in self._trained() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        # One wait for the device per step. Choosing the rows and a teacher's check of its own states are the others.
        if bool(torch.isfinite(self._step_loss) & torch.isfinite(norm)):
            return
        part, samples = self._blame()
        dataset = self.train_dataset
        names = dataset.sample_names if isinstance(dataset, PackedDataset) else None
        raise TrainingError(
            f"step {self.state.global_step + 1}: got loss {self._step_loss.item():g} with gradient norm {norm.item():g}, "
            f"first seen in {part}, {sample_list(samples, names)}; must be finite; nothing was updated or saved; "
            "look at these samples, run that part in float32 or lower learning_rate"
        )

    def _blame(self) -> tuple[str, Tensor]:
        samples = []
        with torch.no_grad():
            for inputs in self._micro_batches:
                student, teachers, loss, rows = self._score(inputs)
                found = first_bad_rows(student, teachers, loss, rows)
                if found is not None:
                    return found
                samples.append(rows.samples)
        names = bad_gradients(iter(self._trained()))
        part = f"the gradient of {names[0]}" if names else "the norm of all gradients together"
        return part, torch.cat(samples)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [*self.student.named_parameters(), *self.objective.named_parameters()]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the arguments, with the objective's adapters as one more group, without decay."""
        optimizer = super().create_optimizer(model)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = [p for p in self.objective.parameters() if p.requires_grad and id(p) not in known]
        if own:
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        return optimizer

    # Log and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of every term, and write the row of log.jsonl where this is a training row."""
        if "loss" in logs:
            row = {"step": self.state.global_step, "epoch": self.state.epoch, **logs}
            row |= self._meter.row()
            self._log.append(row)
            logs = {**logs, **_flat(row)}
            logs.pop("step")
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss and its terms per target token, reduced exactly as in training."""
        self.student.eval()
        self.objective.eval()
        sums: dict[str, float] = {"loss": 0.0}
        num_rows = num_samples = 0
        for inputs in dataloader:
            with torch.no_grad():
                _, _, loss, rows = self._score(self._prepare_inputs(inputs))
            sums["loss"] += loss.total.item()
            for name, value in loss.terms.items():
                sums[name] = sums.get(name, 0.0) + value.item()
            num_rows += len(rows)
            num_samples += inputs["input_ids"].shape[0]
            self.control = self.callback_handler.on_prediction_step(
                self.args, self.state, self.control
            )
        metrics = {f"{metric_key_prefix}_{k}": v / max(num_rows, 1) for k, v in sums.items()}
        metrics[f"{metric_key_prefix}_num_tokens"] = num_rows
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics=metrics,
            num_samples=num_samples,
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The mean loss of one batch; logits are never held whole."""
        model.eval()
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)), None, None

    # What the checkpoints ask for

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes it must have in common."""
        dataset = self.train_dataset
        num_windows = len(dataset) if isinstance(dataset, Sized) else None
        return {
            **self._identity,
            "seed": self.args.seed,
            "teachers": [teacher.name for teacher in self.teachers],
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "data": dataset.fingerprint if isinstance(dataset, PackedDataset) else num_windows,
        }

    def new_meter(self) -> StepMeter:
        """An empty meter that knows the names of teachers and domains."""
        names = [teacher.name for teacher in self.teachers]
        dataset = self.train_dataset
        if not isinstance(dataset, PackedDataset):
            return StepMeter(names)
        return StepMeter(
            names, domains=dataset.domains, sample_domains=torch.as_tensor(dataset.sample_domains)
        )


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """`{"terms": {"kd": 1}}` as `{"terms/kd": 1}`, as trackers expect it."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": part for name, part in _flat(value).items()}
        else:
            flat[key] = value
    return flat
