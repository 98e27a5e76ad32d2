"""The part of the trainer that saves, stops and resumes; it knows the step only by its state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from collegium.errors import Interrupted, TrainingError
from collegium.train import checkpoint, state
from collegium.train.meter import RunLog, StepMeter
from collegium.train.objective import Objective
from collegium.train.progress import StopCallback, TrainingProgress


class ResumableTrainer(Trainer):
    """A Hugging Face trainer whose checkpoints are whole or invisible and hold no pickle."""

    student: PreTrainedModel
    """The live model; the base trainer knows it as `model`, under any of its wrappers."""
    run_folder: Path
    objective: Objective
    _meter: StepMeter
    _log: RunLog
    _flow: StopCallback
    _progress: TrainingProgress
    _use_cache: bool | None

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint and the run that resumes it must have in common."""
        raise NotImplementedError

    def new_meter(self) -> StepMeter:
        """An empty meter."""
        raise NotImplementedError

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
        folder = self.run_folder
        checkpoint.remove_temporary(folder)
        source = self._source(resume_from_checkpoint, folder)
        step = 0 if source is None else checkpoint.step_of(source)
        checkpoint.set_aside_after(folder, step)
        # A run that was killed between a save and its pruning has one too many.
        checkpoint.prune(folder, keep=self.args.save_total_limit or 2)
        self._log.truncate(step)
        self._meter = self.new_meter()
        if source is not None and step >= self._last_step():
            return self._already_done(source)
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

    def _last_step(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        per_epoch = math.ceil(
            len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps
        )
        return math.ceil(self.args.num_train_epochs * per_epoch)

    def _already_done(self, source: Path) -> TrainOutput:
        """The student of a run that has ended; the base trainer would take one step more."""
        self._load_from_checkpoint(str(source))
        self.state = TrainerState.load_from_json(str(source / "trainer_state.json"))
        return TrainOutput(self.state.global_step, 0.0, {})

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
        different = state.differences(saved, self.fingerprint())
        if different:
            raise TrainingError(
                f"{source.name}: belongs to another run; must be resumed unchanged; {'; '.join(different)}"
            )
        return source

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.run_folder
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
        record, tensors = state.optimizer_state(cast(Optimizer, self.optimizer))
        state.save_tensors(tensors, folder / state.OPTIMIZER)
        state.save_objective(self.objective, folder)
        self.state.save_to_json(str(folder / "trainer_state.json"))
        state.write(
            folder,
            {
                "step": self.state.global_step,
                "identity": self.fingerprint(),
                "optimizer": record,
                "scheduler": cast(LRScheduler, self.lr_scheduler).state_dict(),
                "rng": state.rng_state(),
                "meter": self._meter.state(),
            },
        )

    def _write_student(self, folder: Path) -> None:
        student = self.student
        # The base trainer turns the cache off for training; whoever loads the student wants it as it was.
        training_value, student.config.use_cache = student.config.use_cache, self._use_cache
        with state.no_shard_bars():
            student.save_pretrained(folder)
        student.config.use_cache = training_value
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def save_student(self, path: str | Path) -> None:
        """Write the student as a plain Hugging Face folder, whole or not at all; an older one stays until the new one is whole.

        Raises:
            TrainingError: `path` holds something that this trainer did not write.
        """
        final = Path(path)
        checkpoint.recover(final)
        if final.exists() and any(final.iterdir()) and not (final / checkpoint.MANIFEST).exists():
            raise TrainingError(f"{final}: is in use; must be free for the student; give another")
        temporary = checkpoint.temporary_folder(final.parent, final.name)
        self._write_student(temporary)
        checkpoint.replace(temporary, final)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`save_student` under the name that users of Hugging Face trainers know."""
        self.save_student(output_dir or self.run_folder / state.STUDENT)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        state.load_student(self.student, folder / state.STUDENT)
        state.load_objective(self.objective, folder)
        self._meter.load(state.read(folder)["meter"], self.args.device)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        record = state.read(Path(checkpoint))
        tensors = state.load_tensors(Path(checkpoint) / state.OPTIMIZER)
        state.load_optimizer_state(cast(Optimizer, self.optimizer), record["optimizer"], tensors)
        cast(LRScheduler, self.lr_scheduler).load_state_dict(record["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.load_rng_state(state.read(Path(checkpoint))["rng"])
