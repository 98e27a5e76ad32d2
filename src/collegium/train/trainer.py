"""`DistillTrainer`: the Hugging Face trainer with our step, our log and our checkpoints; everything else is theirs.

Shapes: B batch, T time, N rows, K teachers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from collegium.data.pack import Collator, PackedDataset
from collegium.errors import Interrupted, TrainingError
from collegium.fusion.pooling import Fusion
from collegium.models import forward_rows
from collegium.teachers.local import LocalTeacher
from collegium.train import checkpoint, state
from collegium.train.blame import bad_gradients, find_bad_rows, sample_list
from collegium.train.meter import RunLog, StepMeter
from collegium.train.objective import InertTermCheck, Objective, ObjectiveOptions
from collegium.train.options import TrainOptions, training_arguments
from collegium.train.progress import Flow, Progress
from collegium.types import IGNORE, Batch, LossSum, Rows, StudentRows, Teacher, TeacherRows

__all__ = ["DistillTrainer", "TrainOptions", "training_arguments"]

LiveTeachers = Sequence[Teacher | PreTrainedModel] | Mapping[str, Teacher | PreTrainedModel]
_MEASURED_STEPS = 3


class DistillTrainer(Trainer):
    """Trains one student on the fused target of its teachers, or on labels alone where there are none.

    L = (1 / M) sum over all rows of the optimizer step, with M their number over all micro-batches: the gradient does
    not depend on how a step is split.
    """

    def __init__(
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
            teachers: frozen models, or anything with `score`; live models are named by their key or `teacher_0` ...
            args: training arguments; see `training_arguments` for those of a recipe.
            train_dataset: windows of `PackedDataset`, or rows with `input_ids` and, where wanted, `labels`.
            eval_dataset: the same, or a mapping of names to such.
            objective: the loss; a forward KL to the mean of the teachers by default.
            processing_class: the tokenizer, saved beside every student; gives V, else the student's head does.
            data_collator: makes a batch of examples; ours by default.
            callbacks: further callbacks; a `Progress` among them replaces the default one.
            optimizers: optimizer and scheduler, where the arguments shall not choose them.
            identity: what a resumed run must find unchanged beside seed, data and teachers, such as digests.

        Raises:
            TrainingError: the arguments ask for what this trainer does not do.
        """
        args = args or training_arguments(TrainOptions(), output_dir="runs/student", seed=42)
        _adopt(args)
        self.vocab_size = _vocab_size(model, processing_class)
        self._use_cache = model.config.use_cache
        self._flow = Flow()
        shown = [callback for callback in callbacks or () if isinstance(callback, Progress)]
        self._progress = shown[0] if shown else Progress()
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
        self.teachers = _named(teachers, model, self.vocab_size, args.device)
        self.objective = (objective or _default_objective(self.teachers)).to(args.device)
        self._identity = dict(identity or {})
        self._log = RunLog(Path(args.output_dir) / "log.jsonl")
        self._meter = self._new_meter()
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
                self.model,
                batch,
                rows,
                vocab_size=self.vocab_size,
                taps=self.objective.student_taps,
            )
        teachers = self.teachers if self.objective.needs_teachers else []
        scored = [self._ask(teacher, batch, rows) for teacher in teachers]
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
            is_target = (inputs["labels"][:, 1:] != IGNORE) & (inputs["position_ids"][:, 1:] > 0)
            total += is_target.sum().to(device)
        return total.clamp(min=1)

    def training_step(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of one micro-batch; after the last one of a step, refuse what is not finite."""
        self.objective.train()
        self._micro_batches.append(inputs)
        loss = super().training_step(model, dict(inputs), num_items_in_batch)
        self._step_loss = self._step_loss + loss
        if self.accelerator.sync_gradients:
            self._check_finite()
            self.objective.end_step()
            self._micro_batches = []
            self._step_loss = torch.zeros_like(self._step_loss)
        return loss

    def _check_finite(self) -> None:
        grads = [p.grad for _, p in self._trained() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        # The only wait for the device in a step that is not logged.
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
                found = find_bad_rows(student, teachers, loss, rows)
                if found is not None:
                    return found
                samples.append(rows.samples)
        names = bad_gradients(iter(self._trained()))
        part = f"the gradient of {names[0]}" if names else "the norm of all gradients together"
        return part, torch.cat(samples)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [*self.model.named_parameters(), *self.objective.named_parameters()]

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
        self.model.eval()
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

    # Checkpoints

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the start or from the newest checkpoint that verifies (`True`) or a given one.

        Raises:
            TrainingError: a step is not finite, or there is nothing sound to resume from.
            Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
        """
        folder = Path(self.args.output_dir)
        checkpoint.remove_temporary(folder)
        source = self._source(resume_from_checkpoint, folder)
        step = 0 if source is None else checkpoint.step_of(source)
        checkpoint.set_aside_after(folder, step)
        self._log.truncate(step)
        self._meter = self._new_meter()
        self._micro_batches = []
        try:
            with self._flow.fresh_signals() as signals:
                resume = None if source is None else str(source)
                result = super().train(resume, trial, ignore_keys_for_eval)
        finally:
            self._progress.close()
        if signals.received and self.state.global_step < self.state.max_steps:
            raise Interrupted(
                f"{signals.received}: stopped after step {self.state.global_step} of {self.state.max_steps}; "
                f"a checkpoint was saved in {folder}; resume to go on"
            )
        return result

    def _source(self, resume: str | Path | bool | None, folder: Path) -> Path | None:
        if resume is None or resume is False:
            found = checkpoint.checkpoints(folder)
            if found:
                raise TrainingError(
                    f"{folder}: holds {found[0].name} of an earlier run; must hold no checkpoints for a new one; "
                    "resume with resume_from_checkpoint=True, or give another output_dir"
                )
            return None
        if resume is True:
            source, failures = checkpoint.survey(folder)
            if source is None:
                why = "; ".join(failures) or "it holds no folder named checkpoint-N"
                raise TrainingError(f"{folder}: no usable checkpoint to resume from: {why}")
        else:
            source = Path(resume)
            checkpoint.verify(source)
        saved = state.read(source)["identity"]
        different = state.differences(saved, self._fingerprint())
        if different:
            raise TrainingError(
                f"{source.name}: belongs to another run; must be resumed unchanged; {'; '.join(different)}"
            )
        return source

    def _fingerprint(self) -> dict[str, Any]:
        dataset = self.train_dataset
        return {
            **self._identity,
            "seed": self.args.seed,
            "teachers": [teacher.name for teacher in self.teachers],
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "windows": None if dataset is None else len(dataset),
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        final = folder / f"checkpoint-{self.state.global_step}"
        if final.exists():
            return
        self.store_flos()
        temporary = checkpoint.temporary_folder(folder, self.state.global_step)
        try:
            self._write_student(temporary / state.STUDENT)
            self._write_state(temporary)
            checkpoint.commit(temporary, final)
        except OSError as error:
            checkpoint.remove_temporary(folder)
            raise TrainingError(
                f"{final}: cannot be saved ({error}); earlier checkpoints are whole; free space, then resume"
            ) from error
        checkpoint.prune(folder, keep=self.args.save_total_limit or 2)

    def _write_state(self, folder: Path) -> None:
        record, tensors = state.optimizer_state(self.optimizer)
        state.save_tensors(tensors, folder / state.OPTIMIZER)
        state.save_objective(self.objective, folder)
        self.state.save_to_json(str(folder / "trainer_state.json"))
        state.write(
            folder,
            {
                "step": self.state.global_step,
                "identity": self._fingerprint(),
                "optimizer": record,
                "scheduler": self.lr_scheduler.state_dict(),
                "rng": state.rng_state(),
                "meter": self._meter.state(),
            },
        )

    def _write_student(self, folder: Path) -> None:
        student = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # The base trainer turns the cache off for training; whoever loads the student wants it as it was.
        training_value, student.config.use_cache = student.config.use_cache, self._use_cache
        with state.no_shard_bars():
            student.save_pretrained(folder)
        student.config.use_cache = training_value
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def save_student(self, path: str | Path) -> None:
        """Write the student as a plain Hugging Face folder, whole or not at all.

        Raises:
            TrainingError: `path` holds something that this trainer did not write.
        """
        final = Path(path)
        if final.exists() and any(final.iterdir()) and not (final / checkpoint.MANIFEST).exists():
            raise TrainingError(f"{final}: is in use; must be free for the student; give another")
        temporary = checkpoint.temporary_folder(final.parent, final.name)
        self._write_student(temporary)
        checkpoint.replace(temporary, final)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`save_student` under the name that users of Hugging Face trainers know."""
        self.save_student(output_dir or Path(self.args.output_dir) / state.STUDENT)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        state.load_student(self.model, folder / state.STUDENT)
        state.load_objective(self.objective, folder)
        self._meter.load(state.read(folder)["meter"], self.args.device)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        record = state.read(Path(checkpoint))
        tensors = state.load_tensors(Path(checkpoint) / state.OPTIMIZER)
        state.load_optimizer_state(self.optimizer, record["optimizer"], tensors)
        self.lr_scheduler.load_state_dict(record["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.load_rng_state(state.read(Path(checkpoint))["rng"])

    def _new_meter(self) -> StepMeter:
        names = [teacher.name for teacher in self.teachers]
        dataset = self.train_dataset
        if not isinstance(dataset, PackedDataset):
            return StepMeter(names)
        return StepMeter(
            names, domains=dataset.domains, sample_domains=torch.as_tensor(dataset.sample_domains)
        )


def _adopt(args: TrainingArguments) -> None:
    """Refuse what would go wrong without a word, and set what this trainer cannot do without."""
    problems = [
        (args.world_size > 1, "world_size", args.world_size, "1; start a single process"),
        (args.n_gpu > 1, "n_gpu", args.n_gpu, "at most 1; set CUDA_VISIBLE_DEVICES to one device"),
        (args.fp16, "fp16", args.fp16, "False; use bf16"),
        (
            args.label_smoothing_factor != 0,
            "label_smoothing_factor",
            args.label_smoothing_factor,
            "0",
        ),
        (args.load_best_model_at_end, "load_best_model_at_end", True, "False; use the checkpoints"),
        (args.save_total_limit == 1, "save_total_limit", 1, "at least 2, in case one is damaged"),
    ]
    for is_wrong, name, value, wanted in problems:
        if is_wrong:
            raise TrainingError(f"{name}: got {value}; must be {wanted}")
    args.remove_unused_columns = False
    args.logging_nan_inf_filter = False
    if args.data_seed is None:
        # The order of the data must not depend on who drew random numbers before.
        args.data_seed = args.seed


def _vocab_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is not None:
        return max(tokenizer.get_vocab().values()) + 1
    return model.get_output_embeddings().weight.shape[0]


def _named(
    teachers: LiveTeachers, student: PreTrainedModel, vocab_size: int, device: torch.device
) -> list[Teacher]:
    """Wrap live models; everything else already answers for itself."""
    if isinstance(teachers, Mapping):
        pairs = list(teachers.items())
    else:
        pairs = [
            (f"teacher_{i}" if isinstance(teacher, PreTrainedModel) else teacher.name, teacher)
            for i, teacher in enumerate(teachers)
        ]
    found: list[Teacher] = []
    for name, teacher in pairs:
        if isinstance(teacher, PreTrainedModel):
            teacher.to(device)  # type: ignore[arg-type]
            teacher = LocalTeacher(name, teacher, vocab_size=vocab_size, student=student)
        if teacher.name != name or name in [known.name for known in found]:
            raise TrainingError(
                f"teachers: got the name `{name}` for {teacher.name}; must be one name for each; rename it"
            )
        found.append(teacher)
    return found


def _default_objective(teachers: Sequence[Teacher]) -> Objective:
    return Objective(ObjectiveOptions(), Fusion() if teachers else None)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """`{"terms": {"kd": 1}}` as `{"terms/kd": 1}`, as trackers expect it."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{name}": part for name, part in _flat(value).items()}
        else:
            flat[key] = value
    return flat
