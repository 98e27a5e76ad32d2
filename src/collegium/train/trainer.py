"""`DistillTrainer`: the Hugging Face trainer over `DistillStep`, with our log and checkpoints.

    compute_loss ─▶ DistillStep, wrapped by Accelerate    checkpoints ─▶ Checkpointer
    `model` is the student, as callbacks and users expect; `model_wrapped` is the prepared step

Shapes: B batch, T time, N rows, K teachers, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import (
    DynamoBackend,
    TorchDynamoPlugin,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
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
from transformers.utils.generic import flatten_dict

from collegium.data.collate import Collator
from collegium.data.windows import PackedDataset
from collegium.errors import CollegiumError, DataError, Interrupted, TrainingError
from collegium.fusion import requirements
from collegium.fusion.fuse import Fusion, TargetSource
from collegium.models.adapters import adapter_layers
from collegium.models.loading import model_facts
from collegium.storage.records import LogStep, ValidationScore
from collegium.teachers.local import LocalTeacher
from collegium.teachers.prefetch import PrefetchingCollator
from collegium.train import checkpoint, options, state
from collegium.train.arguments import adopt_arguments, check_accelerator
from collegium.train.identity import run_identity, teacher_identity
from collegium.train.live import (
    BatchCheck,
    LiveTeachers,
    compare_tokenizers,
    live_student,
    named_teachers,
    vocabulary_size,
)
from collegium.train.meter import RunLog, StepMeter, merged_state
from collegium.train.nan_diagnosis import NanGuard
from collegium.train.objective import InertTermCheck, Objective
from collegium.train.options import TrainOptions, training_arguments
from collegium.train.progress import StopCallback, TrainingProgress
from collegium.train.resume import Checkpointer, best_step, callback_states, differences
from collegium.train.selection import stopped_early
from collegium.train.sharded import gathered_root, is_sharded, whole
from collegium.train.step import DistillStep
from collegium.types import IGNORE, Batch, LossSum

__all__ = ["DistillTrainer", "TrainOptions", "training_arguments"]

_log = logging.getLogger(__name__)
_MEASURED_STEPS = 3
"""First steps that are always measured, to find terms without a gradient, or without a target."""


class DistillTrainer(Trainer):
    """Trains one student on the fused target of its teachers, or on labels without teachers.

    L = (1 / M) sum over all rows of the optimizer step, with M their number over all micro-batches
    and processes: the gradient does not depend on how a step is split. The router loss of a mixture
    of experts, which is no sum over rows, is a mean over the micro-batches.
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
        targets: TargetSource | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Any = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        identity: Mapping[str, str] | None = None,
        tokenizers: Mapping[str, PreTrainedTokenizerBase] | None = None,
        evaluates_labels_only: bool = False,
    ) -> None:
        """Combine the parts, as other trainers of Hugging Face do.

        Args:
            model: the student, which may be a `PeftModel`.
            teachers: frozen models, or objects with `score`. Models are named by their key or
                `teacher_0` ... and moved to `args.device`. Token ids must mean the same to all of
                them and to the student. Adapters on one base: the same `PeftModel` under the name
                of each adapter.
            args: training arguments, see docs/trainer_arguments.md; `training_arguments` makes
                those of a recipe.
            train_dataset: windows of `PackedDataset`, or items with `input_ids` and `labels`.
            eval_dataset: the same, or a mapping of names to such.
            objective: the loss; by default 0.9 forward KL to the linear pool under prefix
                likelihood, and 0.1 CE.
            targets: finished targets, such as a fused cache, instead of teachers.
            processing_class: the tokenizer, saved with every student. Gives V, else the head does.
            data_collator: makes a batch of items; `Collator` by default.
            compute_metrics: as in `Trainer`, over the student's logits.
            callbacks: more callbacks; a `TrainingProgress` replaces the default one.
            identity: digests that a resumed run must find unchanged.
            tokenizers: those of teachers by name, compared with `processing_class`.
            evaluates_labels_only: evaluate on labels, without the teachers or targets, as where
                they are cached for the training text only.

        The other arguments are those of `Trainer`.

        Raises:
            TrainingError: an argument is not supported.
            ModelError: a model computes its logits in an unsupported way.
            VocabularyError: a model has too few rows, or ids of a tokenizer differ.
            RecipeError: the objective or its fusion needs what the teachers cannot give.
        """
        args = args or training_arguments(TrainOptions(), output_dir="runs/student", seed=42)
        if not isinstance(args, TrainingArguments):
            raise TrainingError(
                f"args: got {type(args).__name__}; must be TrainingArguments; the arguments are "
                "(model, teachers, args)"
            )
        adopt_arguments(args)
        student = live_student(model, args)
        self.run_folder = Path(args.output_dir or "runs/student")
        self._use_cache = student.config.use_cache
        if objective is not None and objective.has_stages:
            # A stage leaves parameters without a gradient, for which DDP would wait.
            args.ddp_find_unused_parameters = True
        self._stop, callbacks = StopCallback(), list(callbacks or ())
        if not any(isinstance(callback, TrainingProgress) for callback in callbacks):
            callbacks.append(TrainingProgress())
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or Collator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            callbacks=[*callbacks, self._stop],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if self.is_fsdp_enabled and adapter_layers(student):
            raise TrainingError(
                "student: got adapters with FSDP2; must be trained as a whole; use DDP, since the "
                "optimizer of adapters is small"
            )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        # The step divides by the tokens of the whole optimizer step, so the trainer must not.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        vocab_size = vocabulary_size(student, processing_class)
        named = named_teachers(teachers, student, vocab_size, args.device)
        compare_tokenizers(processing_class, named, tokenizers or {})
        self._check_batch = BatchCheck.of(student, named, vocab_size)
        fusion = Fusion() if named else None
        objective = objective or Objective(options.ObjectiveOptions(), fusion)
        if objective.options.state_terms():
            live = {t.name: model_facts(t.model) for t in named if isinstance(t, LocalTeacher)}
            widths = {name: facts.tap_widths for name, facts in live.items()}
            objective.build_states(model_facts(student).tap_widths, widths, seed=args.seed)
        objective = objective.to(args.device)
        if targets is None:
            supported = {teacher.name: teacher.capabilities for teacher in named}
            requirements.check_teachers(objective.requirements(), supported)
        else:  # its fusion is built in
            requirements.check(objective.options.requirements(), [targets.capabilities])
        self.step = DistillStep(
            student, objective, vocab_size=vocab_size, teachers=named, targets=targets
        )
        self._identity = dict(identity or {})
        self._shard_teachers()
        self._fingerprint: dict[str, Any] | None = None
        limit = args.save_total_limit
        keep = limit if limit is not None and limit > 0 else None
        self._checkpointer = Checkpointer(self.run_folder, keep=keep)
        self._log = RunLog(self.run_folder / "log.jsonl")
        self._meter = self._new_meter()
        self._inert = InertTermCheck(_MEASURED_STEPS)
        names = train_dataset.sample_names if isinstance(train_dataset, PackedDataset) else ()
        self._guard = NanGuard(self.step, names)
        self._evaluated: list[tuple[Tensor, LossSum]] = []
        self._num_bytes = 0
        self._labels_only = evaluates_labels_only
        self.best_step: int | None = None
        """Step of the checkpoint that `load_best_model_at_end` has loaded."""
        self._step_loss: Tensor | None = None
        # Compiling the step would trace the losses, whose loop length depends on the batch.
        cast(TorchDynamoPlugin, self.accelerator.state.dynamo_plugin).backend = DynamoBackend.NO
        if args.torch_compile:
            how = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
            student.base_model.compile(**{k: value for k, value in how.items() if value})

    def _shard_teachers(self) -> None:
        """Shard the layers of the teachers that ask for it."""
        local = [teacher for teacher in self.step.teachers if isinstance(teacher, LocalTeacher)]
        self._teacher_weights = dict[str, str | None]()
        for teacher in local if self.args.world_size > 1 else ():
            if teacher.shard and f"teacher {teacher.name}" not in self._identity:
                # Rank 0 alone cannot read the shares of the others.
                self._teacher_weights[teacher.name] = teacher_identity(teacher)
            teacher.shard_layers()

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and check the settings of `accelerate launch`."""
        super().create_accelerator_and_postprocess()
        check_accelerator(self.accelerator)

    # The step

    def _prepare_for_training(self, *arguments: Any, **named: Any) -> tuple[nn.Module, Any]:
        student = self.model
        self.model = self.model_wrapped = self.step
        try:
            return super()._prepare_for_training(*arguments, **named)
        finally:
            self.model = self.callback_handler.model = student

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Create the optimizer, with the objective's adapters as one more group without decay."""
        optimizer = super().create_optimizer(self.step.student)
        members = {id(p) for group in optimizer.param_groups for p in group["params"]}
        adapters = [
            p for p in self.step.objective.parameters() if p.requires_grad and id(p) not in members
        ]
        if adapters:
            optimizer.add_param_group({"params": adapters, "weight_decay": 0.0})
        return optimizer

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Fetch the micro-batches of a step, and count their rows over all processes."""
        samples = list(islice(epoch_iterator, num_batches))
        if samples:
            samples[-1] = self._without_repeats(samples[-1])
        num_rows = torch.zeros((), dtype=torch.int64, device=device)
        for inputs in samples:
            batch = Batch.from_inputs(inputs)
            self._check_batch(batch)
            num_rows += batch.num_rows().to(device)
        if self.args.world_size > 1:
            # One reduction for both, and no further one after the step.
            is_stopping = num_rows.new_tensor(self._stop.received is not None)
            sums = self.accelerator.reduce(torch.stack([num_rows, is_stopping]))
            num_rows, self._stop.votes = cast(Tensor, sums).unbind()
        last = min(_MEASURED_STEPS, self.state.max_steps)
        self._check_batch.require_targets(num_rows, last)
        return samples, num_rows.clamp(min=1)

    def _without_repeats(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Leave out windows that Accelerate repeats to fill the last batch of each process."""
        loader = self.accelerator.gradient_state
        if self.args.world_size == 1 or not loader.end_of_dataloader:
            return inputs
        labels, remainder = inputs["labels"].clone(), loader.remainder
        dataset = getattr(loader.active_dataloader, "dataset", None)
        if isinstance(dataset, Sized):
            # Accelerate's own remainder is wrong where a resumed run has skipped batches.
            remainder = len(dataset) % (len(labels) * self.args.world_size)
        if remainder <= 0:
            return inputs
        labels[max(remainder - self.args.process_index * len(labels), 0) :] = IGNORE
        return {**inputs, "labels": labels}

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None
    ) -> Tensor:
        """Run forward and backward of a micro-batch; refuse a step that is not finite."""
        step = self.state.global_step + 1
        self._step_loss = None
        try:
            loss = super().training_step(model, dict(inputs), num_items_in_batch)
        except TrainingError as error:
            raise TrainingError(f"step {step}: {error}; nothing was updated or saved") from error
        if self._step_loss is not None and num_items_in_batch is not None:
            # What a subclass added to the loss is trained, so it is logged.
            added = (loss - self._step_loss) * num_items_in_batch / self.args.world_size
            self._meter.add_loss(added)
        self._guard.add(inputs, loss)
        if self.accelerator.sync_gradients:
            self._guard.check(step)
            self.step.objective.end_step()
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the step per target token; the `LossSum` is the output."""
        self.step.objective.start_step(self.state.global_step, self.state.max_steps)
        if model is self.model or model is self.step.student:  # an evaluation, or a direct call
            with self.accelerator.autocast():
                total, loss = self.step(inputs, labels_only=self._labels_only)
        else:
            step, every = self.state.global_step + 1, max(int(self.state.logging_steps), 1)
            is_due = step <= _MEASURED_STEPS or step % every == 0 or step >= self.state.max_steps
            total, loss = model(inputs, measure=model.training and is_due)
            if model.training:
                self._meter.add(loss)
                self._inert(loss)
        num_tokens = max(loss.num_rows, 1) if num_items_in_batch is None else num_items_in_batch
        # DDP and FSDP average over the processes, and the token count is already global.
        mean = total * (self.args.world_size if model.training else 1) / num_tokens
        self._step_loss = mean.detach()
        return (mean, loss) if return_outputs else mean

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # Not the adapters: their gradients are on another scale, and would shrink the student's.
        parameters = list(self.step.student.parameters())
        return self.accelerator.clip_grad_norm_(parameters, self.args.max_grad_norm)

    # Log and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of every term, and append training rows to log.jsonl."""
        if "loss" in logs:
            head = {**logs, "step": self.state.global_step, "epoch": self.state.epoch}
            # The meter's `loss` replaces the trainer's, a mean over steps instead of tokens.
            means = dict(self._meter.row())
            if self._step_loss is None:  # a subclass computes another loss
                del means["loss"]
            row = LogStep(**{**head, **means})
            if self.is_world_process_zero():
                self._log.append(row)
            # The form that trackers expect: `{"terms/kd": 1}`.
            flat = flatten_dict(row.to_json(), delimiter="/")
            logs = logs | {k: value for k, value in flat.items() if k != "step" and value != {}}
        elif "eval_nll" in logs and self.is_in_train and self.is_world_process_zero():
            values: dict[str, Any] = {
                "nll": logs["eval_nll"],
                "bits_per_byte": logs.get("eval_bits_per_byte"),
                "loss": None if self._labels_only else logs["eval_loss"],
                "num_tokens": logs["eval_num_tokens"],
                "seconds": logs["eval_runtime"],
            }
            step, epoch = self.state.global_step, self.state.epoch
            self._log.append(LogStep(step=step, epoch=epoch, validation=ValidationScore(**values)))
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return that of `Trainer`, which reads no cache: it has the training text only."""
        collator = self.data_collator
        if isinstance(collator, PrefetchingCollator):
            self.data_collator = collator.collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as `Trainer` does, with loss and terms per target token as in training.

        It changes neither the random numbers nor the speed that training goes on with.
        """
        self.step.eval()
        self._evaluated, self._num_bytes = [], 0
        generators = state.rng_state()
        # The base trainer would shard the student by itself, without the losses.
        is_fsdp_enabled, self.is_fsdp_enabled = self.is_fsdp_enabled, is_sharded(self.step)
        try:
            with self._meter.paused():
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        finally:
            self.is_fsdp_enabled = is_fsdp_enabled
        state.load_rng_state(generators)
        ours: Counter[str] = Counter(num_bytes=self._num_bytes)
        for total, loss in self._evaluated:
            values = {"loss": total, **loss.terms}
            if loss.nll is not None:
                values[options.METRIC] = loss.nll
            ours.update({name: value.item() for name, value in values.items()})
            ours["num_tokens"] += loss.num_rows
        sums: Counter[str] = Counter(loss=0, num_tokens=0)
        for part in gather_object([ours]):
            sums.update(part)
        num_tokens, num_bytes = sums.pop("num_tokens"), sums.pop("num_bytes")
        prefix = metric_key_prefix
        if num_tokens == 0:
            raise DataError(
                f"{prefix}_dataset: got no target in {output.num_samples} rows (all labels are "
                f"{IGNORE}, or start a document); must have some; check how its labels are made"
            )
        means = {f"{prefix}_{name}": value / num_tokens for name, value in sums.items()}
        metrics = {**(output.metrics or {}), **means, f"{prefix}_num_tokens": num_tokens}
        if num_bytes and options.METRIC in sums:
            metrics[f"{prefix}_bits_per_byte"] = sums[options.METRIC] / math.log(2) / num_bytes
        return output._replace(metrics=metrics)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The mean loss of a batch; (B, T, V) logits exist only where metrics are computed."""
        inputs = dict(self._without_repeats(self._prepare_inputs(inputs)))
        batch = Batch.from_inputs(inputs)
        self._check_batch(batch)
        with torch.no_grad():
            mean, loss = self.compute_loss(self.step.student, inputs, return_outputs=True)
            if not isinstance(loss, LossSum):  # a subclass computes another loss
                rows = batch.rows()
                loss, self._step_loss = LossSum(mean * 0, {}, {}, {}, rows), mean * 0
            added = mean - cast(Tensor, self._step_loss)
            self._evaluated.append((loss.total + added * loss.num_rows, loss))
            if "num_bytes" in inputs:
                self._num_bytes += int(inputs["num_bytes"].flatten()[loss.rows.index + 1].sum())
            if prediction_loss_only:
                return mean, None, None
            with gathered_root(self.step):
                logits = self.step.student(
                    input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
                ).logits
        return mean, logits, batch.labels

    # Checkpoints

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train from the start, from the newest valid checkpoint (`True`), or from a given one.

        Raises:
            TrainingError: a step is not finite, or no checkpoint is valid.
            Interrupted: SIGINT or SIGTERM was received; a checkpoint was saved.
        """
        source = self._start(resume_from_checkpoint)
        self._meter = self._new_meter()
        if source is not None and (done := self._checkpointer.finished(self, source)):
            return done
        try:
            with self._stop.catching():
                resume = None if source is None else str(source)
                result = super().train(resume, trial, ignore_keys_for_eval)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TrainingProgress):
                    callback.close()
        if self._stop.received and self.state.global_step < self.state.max_steps:
            raise Interrupted(
                f"{self._stop.received}: stopped after step {self.state.global_step} of "
                f"{self.state.max_steps}; a checkpoint was saved in {self.run_folder}; resume to "
                "continue",
                signal.Signals[self._stop.received],
            )
        return result

    def _start(self, resume: str | bool | None) -> Path | None:
        """Choose the checkpoint in rank 0, which also tidies the folder. Return that of rank 0."""
        chosen: list[Any] = [None]
        if self.is_world_process_zero():
            try:
                source, step = self._checkpointer.start(resume, self.fingerprint())
                self._log.restore(source, step)
                chosen = [source]
            except CollegiumError as error:
                chosen = [error]
        if self.args.world_size > 1:
            broadcast_object_list(chosen)
        if isinstance(chosen[0], CollegiumError):
            raise chosen[0]
        return chosen[0]

    def save_student(self, path: str | Path) -> None:
        """Write the student as a Hugging Face folder, atomically; an older one is replaced.

        Raises:
            TrainingError: `path` holds something that this trainer did not write.
        """
        weights = self._whole_weights()
        if self.args.should_save:
            path = Path(path)
            checkpoint.recover(path)
            is_ours = (path / checkpoint.MANIFEST).exists()
            if path.exists() and any(path.iterdir()) and not is_ours:
                raise TrainingError(f"{path}: is in use; must be free for the student; use another")
            checkpoint.write(path, partial(self._write_student, weights=weights))
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student into a folder, by default `output_dir`, beside the files it holds.

        Unlike `save_student` it replaces single files, and an older student's weights.
        """
        weights = self._whole_weights()
        if self.args.should_save:
            path = Path(output_dir or self.run_folder)
            temporary = checkpoint.temporary_folder(path.parent, path.name)
            self._write_student(temporary, weights=weights)
            checkpoint.move_files(temporary, path)
        self.accelerator.wait_for_everyone()

    def fingerprint(self) -> dict[str, Any]:
        """Everything that a checkpoint and the run that resumes it must share."""
        if self._fingerprint is None:
            self._fingerprint = run_identity(
                self.step, self.args, self.train_dataset, self._identity, self._teacher_weights
            )
        return self._fingerprint

    @property
    def stopped_early(self) -> bool:
        """Whether early stopping ended the run before its last step."""
        return stopped_early(self.state)

    def differences(self, source: Path) -> list[str]:
        """Return the fields in which this run is not the one of a checkpoint."""
        return differences(source, self.fingerprint())

    def _new_meter(self) -> StepMeter:
        names, dataset = [teacher.name for teacher in self.step.teachers], self.train_dataset
        if not isinstance(dataset, PackedDataset):
            return StepMeter(names)
        numbers = torch.as_tensor(dataset.sample_domains)
        return StepMeter(names, domains=dataset.domains, sample_domains=numbers)

    def _write_student(self, folder: Path, *, weights: dict[str, Tensor] | None = None) -> None:
        tokenizer, use_cache = self.processing_class, self._use_cache
        student = self.step.student
        state.save_student(folder, student, tokenizer, use_cache=use_cache, weights=weights)

    def _whole_weights(self) -> dict[str, Tensor] | None:
        """Gather the weights of a sharded student where it is saved. None for any other student."""
        weights, keep = self.step.student.state_dict(), self.args.should_save
        return whole(weights, keep=keep) if is_sharded(self.step) else None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.store_flos()
        step, best = self.state.global_step, self.state.best_global_step
        if best is not None:
            folder = self.run_folder / f"checkpoint-{best}"
            # An evaluation without a save has no checkpoint to load.
            if best == step or folder.is_dir():
                self.state.best_model_checkpoint = str(folder)
        gathered = gather_object([(state.rng_state(), self._meter.state())])
        # Collectives, if the student is sharded: one process writes what all of them hold.
        optimizer, keep = cast(Optimizer, self.optimizer), self.args.should_save
        write = partial(
            self._write_checkpoint,
            gathered=gathered,
            weights=self._whole_weights(),
            optimizer=state.optimizer_state(optimizer, keep=keep),
            objective=whole(self.step.objective.state_dict(), keep=keep),
        )
        if keep:
            self._checkpointer.save(step, write, best=best_step(self.state))
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        # By its step: the folder of the run may have moved.
        folder = self.run_folder / f"checkpoint-{best_step(self.state)}"
        try:
            checkpoint.verify(folder)
        except TrainingError as error:
            _log.warning("%s; the best model is not loaded, the student is the last one", error)
        else:
            state.load_weights(self.step.student, self.step.objective, folder)
            self.best_step = best_step(self.state)

    def _write_checkpoint(
        self,
        folder: Path,
        *,
        gathered: Sequence[Any],
        weights: dict[str, Tensor] | None,
        optimizer: tuple[dict[str, Any], dict[str, Tensor]],
        objective: dict[str, Tensor],
    ) -> None:
        self._write_student(folder / state.STUDENT, weights=weights)
        callbacks = [*self.callback_handler.callbacks, self.control]
        self.state.stateful_callbacks = cast(Any, callback_states(callbacks))
        self.state.save_to_json(str(folder / state.TRAINER_STATE))
        self._log.copy_to(folder)
        generators, meters = zip(*gathered, strict=True)
        values, tensors = optimizer
        record = {
            "step": self.state.global_step,
            "identity": self.fingerprint(),
            "optimizer": values,
            "scheduler": cast(LRScheduler, self.lr_scheduler).state_dict(),
            "rng": generators,
            "meter": merged_state(meters),
        }
        files = {
            # The adapters and running statistics of the terms, if any.
            state.OBJECTIVE: objective,
            state.TRAINED: state.trained_tensors(self.step.student),
        }
        others = {name: tensors for name, tensors in files.items() if tensors}
        state.save(folder, record, {state.OPTIMIZER: tensors, **others})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        state.load_weights(self.step.student, self.step.objective, folder)
        if self.is_world_process_zero():  # the sums of all processes
            self._meter.load(state.read(folder)["meter"], self.args.device)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer, scheduler = cast(Optimizer, self.optimizer), cast(LRScheduler, self.lr_scheduler)
        if checkpoint is not None:
            state.load_optimizer(Path(checkpoint), optimizer, scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        saved, rank = state.read(Path(checkpoint))["rng"], self.args.process_index
        # One state per process; a checkpoint of an older version has that of rank 0.
        states = saved if isinstance(saved, list) else [saved]
        if rank < len(states):
            state.load_rng_state(states[rank])
        else:  # a process more than before
            set_seed(self.args.seed + self.state.global_step + rank)
