"""Training of a finished student for the rounded weights of an export, from the caches of its run.

student/ ─▶ fake quantization ─▶ trainer of the run, a few steps ─▶ float student in a scratch
folder ─▶ written and verified as every export (`collegium.export.build`)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from collegium.console import say
from collegium.errors import ExportError, Interrupted, first_line
from collegium.export.fake_quantization import WeightGrid, fake_quantize
from collegium.export.options import RecoverOptions
from collegium.models.loading import enable_checkpointing, load_model
from collegium.models.options import ModelOptions
from collegium.run.context import RunContext
from collegium.run.students import Student, students

LEARNING_RATE_FACTOR = 0.25
"""Default peak learning rate over that of the training: of 0.1 and 0.25 the better one on the demo,
for a damaged student (+0.104 and +0.064 bits per byte after 100 steps) and a sound one."""
WARMUP_FRACTION = 0.1


@dataclass(frozen=True, eq=False)
class StudentRecoverer:
    """Trains the student of a run with rounded weights. The student itself is only read."""

    context: RunContext
    options: RecoverOptions
    scratch: Path
    """Folder of the training, deleted by the caller."""

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        trained = self.context.recipe.train.learning_rate
        return self.options.learning_rate or LEARNING_RATE_FACTOR * trained

    def train(self, grid: WeightGrid, name: str) -> Path:
        """Return the folder of a float student whose weights lose less by rounding to a grid.

        Raises:
            ExportError: its layers are not divisible into the groups of the grid.
            Interrupted: SIGINT or SIGTERM was received.
        """
        (main,) = students(self.context)
        variant, title = main.variant, f"recovery of {name}"
        objective = variant.objective.continued(self.context.num_steps)
        student = Student(self.context, dataclasses.replace(variant, objective=objective))
        for cache in student.dependencies():
            if not cache.is_done():
                cache.ensure()
        options = self.context.student
        source = ModelOptions(
            model=str(main.path), device=options.device, attention=options.attention
        )
        model = load_model(source, where=str(main.path))
        try:
            fake_quantize(model, grid)
        except ValueError as error:
            raise ExportError(f"{title}: {first_line(error)}; choose another format") from error
        if options.gradient_checkpointing:
            enable_checkpointing(model)
        steps = self.options.steps
        trainer = student.trainer(
            self.scratch / "training",
            student=model,
            options=dataclasses.replace(
                self.context.recipe.train,
                learning_rate=self.learning_rate,
                max_steps=steps,
                warmup_steps=round(WARMUP_FRACTION * steps),
                eval_steps=None,
                load_best_model_at_end=None,
                early_stopping_patience=None,
                early_stopping_threshold=0.0,
                save_steps=steps,
                torch_compile=False,  # takes longer than a few steps
            ),
        )
        try:
            trainer.train()
        except Interrupted as error:
            raise Interrupted(
                f"{title}: stopped after step {trainer.state.global_step} of {steps}; nothing was "
                "exported; the same command starts it again",
                error.number,
            ) from error
        say(f"{title}: {steps} steps, done")
        trainer.save_student(self.scratch / "student")
        return self.scratch / "student"
