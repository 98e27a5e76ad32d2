"""Checkpoints of a run: choose one to resume from, save atomically, keep the newest few."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from collegium.errors import TrainingError
from collegium.train import checkpoint, state


class Checkpointer:
    """The checkpoint folder of one run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Keep the newest `keep` checkpoints in `folder`."""
        self._folder = folder
        self._keep = keep

    def source(self, resume: str | Path | bool | None, identity: Mapping[str, Any]) -> Path | None:
        """The checkpoint to resume from: the newest valid one for `True`, none for `None`.

        Raises:
            TrainingError: none is valid, it belongs to another run, or a new run finds some.
        """
        folder = self._folder
        checkpoint.remove_temporary(folder)
        if resume is None or resume is False:
            existing = checkpoint.checkpoints(folder)
            if existing:
                raise TrainingError(
                    f"{folder}: holds {existing[0].name} of an earlier run; must hold no "
                    "checkpoints for a new one; resume with resume_from_checkpoint=True, or use "
                    "another output_dir"
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
        different = state.differences(state.read(source)["identity"], identity)
        if different:
            raise TrainingError(
                f"{source.name}: belongs to another run; must be resumed unchanged; "
                f"{'; '.join(different)}"
            )
        return source

    def prepare(self, source: Path | None) -> int:
        """Set later checkpoints aside, prune, and return the step of `source`, 0 for a new run."""
        step = 0 if source is None else checkpoint.step_of(source)
        checkpoint.set_aside_after(self._folder, step)
        # A run that was killed between a save and its pruning has one too many.
        checkpoint.prune(self._folder, keep=self._keep)
        return step

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write checkpoint `step` atomically; a no-op if it exists.

        Raises:
            TrainingError: the disk refused it; earlier checkpoints are complete.
        """
        final = self._folder / f"checkpoint-{step}"
        if final.exists():
            return
        temporary = checkpoint.temporary_folder(self._folder, step)
        try:
            write(temporary)
            checkpoint.commit(temporary, final)
        except OSError as error:
            checkpoint.remove_temporary(self._folder)
            raise TrainingError(
                f"{final}: cannot be saved ({error}); earlier checkpoints are complete; free "
                "space, then resume"
            ) from error
        checkpoint.prune(self._folder, keep=self._keep)

    def save_student(self, final: Path, write: Callable[[Path], None]) -> None:
        """Write a student folder atomically; an older one stays until the new one is complete.

        Raises:
            TrainingError: `final` holds something else.
        """
        checkpoint.recover(final)
        if final.exists() and any(final.iterdir()) and not (final / checkpoint.MANIFEST).exists():
            raise TrainingError(f"{final}: is in use; must be free for the student; use another")
        temporary = checkpoint.temporary_folder(final.parent, final.name)
        write(temporary)
        checkpoint.replace(temporary, final)

    def last_step(self, trainer: Trainer) -> int:
        """The last optimizer step of a run."""
        args = trainer.args
        if args.max_steps > 0:
            return args.max_steps
        per_epoch = math.ceil(
            len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps
        )
        return math.ceil(args.num_train_epochs * per_epoch)

    def finished(self, trainer: Trainer, source: Path) -> TrainOutput:
        """Load the student of a run that has ended; the base trainer would take one more step."""
        trainer._load_from_checkpoint(str(source))
        trainer.state = TrainerState.load_from_json(str(source / "trainer_state.json"))
        return TrainOutput(trainer.state.global_step, 0.0, {})
