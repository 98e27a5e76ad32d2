"""Checkpoints of a run: choose one to resume from, save atomically, keep the newest few."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, align_special_tokens

from collegium.errors import TrainingError
from collegium.storage.files import differing_fields
from collegium.train import checkpoint, state
from collegium.train.selection import stopped_early

_FORMER_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Checkpointer:
    """The checkpoints of one run in `folder`: the newest `keep` and the best, or all for None."""

    folder: Path
    keep: int | None

    def start(
        self, resume: str | Path | bool | None, identity: Mapping[str, Any]
    ) -> tuple[Path | None, int]:
        """The checkpoint to resume from, the newest valid one for `True`, and its step, else 0.

        Later checkpoints are set aside.

        Raises:
            TrainingError: none is valid, it belongs to another run, or a new run finds some.
        """
        folder, source, step = self.folder, None, 0
        checkpoint.remove_temporary(folder)
        if resume is None or resume is False:
            for existing in checkpoint.checkpoints(folder):
                raise TrainingError(
                    f"{folder}: holds {existing.name} of an earlier run; must hold no "
                    "checkpoints for a new one; resume with resume_from_checkpoint=True, or use "
                    "another output_dir"
                )
        elif resume is True:
            source, failures = checkpoint.survey(folder)
            if source is None:
                why = "; ".join(failures) or "it holds no folder named checkpoint-N"
                raise TrainingError(f"{folder}: no usable checkpoint to resume from: {why}")
        else:
            source = Path(resume)
            checkpoint.verify(source)
        if source is not None:
            if different := differences(source, identity):
                raise TrainingError(
                    f"{source.name}: belongs to another run; must be resumed unchanged; changed "
                    f"since then: {'; '.join(different)}; undo that, or start a new run from "
                    f"{source / state.STUDENT}"
                )
            step = checkpoint.step_of(source)
            checkpoint.set_aside_after(folder, step)
        # A run that was killed between a save and its pruning has one too many.
        best = None if source is None else best_step(_state_of(source))
        checkpoint.prune(folder, keep=self.keep, best=best)
        return source, step

    def save(self, step: int, write: Callable[[Path], None], *, best: int | None = None) -> None:
        """Write checkpoint `step` atomically; a no-op if it exists. Keep that of step `best`.

        Raises:
            TrainingError: the disk refused it; earlier checkpoints are complete.
        """
        final = self.folder / f"checkpoint-{step}"
        if final.exists():
            return
        if not self.folder.is_dir():
            raise TrainingError(
                f"{self.folder}: was deleted or moved during training; must stay in place; run the "
                "same command again"
            )
        checkpoint.write(final, write, label=step)
        checkpoint.prune(self.folder, keep=self.keep, best=best)

    def finished(self, trainer: Trainer, source: Path) -> TrainOutput | None:
        """Load a run that ended at `source`, else None: the base trainer would step once more."""
        if not is_finished(trainer, source):
            return None
        args = trainer.args
        if trainer.processing_class is not None:
            # As before the first step: a student saved again has the same config.
            align_special_tokens(trainer.model, trainer.processing_class)
        trainer._load_from_checkpoint(str(source))
        trainer.state = _state_of(source)
        if args.load_best_model_at_end and best_step(trainer.state) is not None:
            trainer._load_best_model()
        return TrainOutput(trainer.state.global_step, 0.0, {})


def is_finished(trainer: Trainer, source: Path) -> bool:
    """Return True if a run of this length ends at `source`: at its last step, or early."""
    args, last_step = trainer.args, trainer.args.max_steps
    if last_step <= 0:
        num_batches = len(trainer.get_train_dataloader())
        per_epoch = math.ceil(num_batches / args.gradient_accumulation_steps)
        last_step = math.ceil(args.num_train_epochs * per_epoch)
    if checkpoint.step_of(source) >= last_step:
        return True
    saved = _state_of(source)
    # A longer run goes on, from what a shorter one has learned.
    return stopped_early(saved) and saved.max_steps == last_step


def differences(source: Path, identity: Mapping[str, Any]) -> list[str]:
    """Return `field: old -> new` for all that a checkpoint and a run should share and do not."""
    saved = dict(state.read(source)["identity"])
    if "windows_per_step" not in saved:  # of an older version, which had a single process
        parts = [saved.pop(name, 1) for name in _FORMER_SIZES]
        saved["windows_per_step"] = math.prod(parts)
    return differing_fields(saved, identity)


def callback_states(callbacks: Iterable[Any]) -> dict[str, Any]:
    """Return the states of callbacks, such as early stopping, in the form of `TrainerState`."""
    states: dict[str, list[Any]] = {}
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    # The base trainer reads a single state, or a list of several.
    return {name: each[0] if len(each) == 1 else each for name, each in states.items()}


def best_step(trainer_state: TrainerState) -> int | None:
    """Return the step of the checkpoint with the best evaluation, None without one."""
    best = trainer_state.best_model_checkpoint
    return None if best is None else checkpoint.step_of(Path(best))


def _state_of(source: Path) -> TrainerState:
    return TrainerState.load_from_json(str(source / state.TRAINER_STATE))
