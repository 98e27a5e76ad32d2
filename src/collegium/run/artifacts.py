"""All artifacts of a run, by stage.

    preflight.json     measurements of teachers and fusions
    cache/             stored outputs of the teachers (`collegium.run.caches`)
    student/, train/   the student, and its log and checkpoints
    controls/NAME/     the same of each control
    results.json       evaluation of all models on the validation split
    report.html        one page about all of these

A new export or evaluation is one class, and one entry in `ARTIFACTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collegium.console import progress
from collegium.evaluate.scoring import Windows, results_rows, score_models
from collegium.run.artifact import Artifact
from collegium.run.caches import FusedCache, HiddenCache, Split, TeacherCache
from collegium.run.choice import Preflight, Recorder, resolved_fusion
from collegium.run.context import RunContext
from collegium.run.students import Student, controls, students
from collegium.storage.files import write_json
from collegium.storage.records import ModelInfo, ResultRow, open_record
from collegium.teachers.local import LocalTeacher

UNTOUCHED = "student (untouched)"
"""Name of the student before training."""


@dataclass(frozen=True, eq=False)
class Results(Artifact[list[ResultRow]]):
    """Scores of the untouched student, the teachers and all trained students."""

    students: tuple[Student, ...]

    @property
    def name(self) -> str:
        return "evaluate"

    @property
    def path(self) -> Path:
        return self.context.folder.path / "results.json"

    def identity(self) -> Any:
        variants = [student.variant.identity() for student in self.students]
        return [self.context.inputs(*self.context.values), variants]

    def dependencies(self) -> Sequence[Student]:
        return self.students

    def build(self) -> None:
        context, options = self.context, self.context.recipe.evaluate
        split = context.datasets["validation"]
        batch_size, max_tokens = options.batch_size, options.max_tokens
        with context.scratch() as scratch:
            recorder = Recorder(scratch, [split], batch_size, max_tokens)
            teachers = [recorder.teacher(context, name) for name in context.recipe.teachers]
            models = [recorder(UNTOUCHED, self._load_untouched), *teachers]
            models += [recorder(one.variant.label, one.load) for one in self.students]
            with progress(self.name) as advance:
                windows = Windows.spread(split, batch_size, max_tokens, advance)
                scored = score_models(models, teachers, resolved_fusion(context), windows)
        rows = results_rows(scored, self._model_info())
        write_json(self.path, [row.to_json() for row in rows])

    def _load_untouched(self) -> LocalTeacher:
        student = self.context.new_student()
        return LocalTeacher(UNTOUCHED, student, vocab_size=self.context.vocab_size)

    def _model_info(self) -> list[ModelInfo]:
        context = self.context
        size = context.student_facts.num_parameters
        return [
            ModelInfo(name=UNTOUCHED, kind="untouched", num_parameters=size),
            *(
                ModelInfo(name=name, kind="teacher", num_parameters=count)
                for name, count in context.teacher_parameters.items()
            ),
            *(one.info() for one in self.students),
        ]

    def open(self) -> list[ResultRow]:
        return open_record(self.path, list[ResultRow])


class Report(Artifact[Path]):
    """The report page, written from the run folder and no other file."""

    @property
    def name(self) -> str:
        return "report"

    @property
    def path(self) -> Path:
        return self.context.folder.path / "report.html"

    def identity(self) -> Any:
        return None

    def is_done(self) -> bool:
        """Return False: the page is cheap, and shows files that change without a stage."""
        return False

    def log(self) -> AbstractContextManager[None]:
        """Record nothing: the page itself shows the record of the stages."""
        return nullcontext()

    def build(self) -> None:
        # Imported here: drawing takes longer to load than a whole check.
        from collegium.report.page import write_report

        write_report(self.context.folder.path)

    def open(self) -> Path:
        return self.path


def preflights(context: RunContext) -> list[Artifact[Any]]:
    """Return the preflight of the teachers."""
    return [Preflight(context)]


def caches(context: RunContext) -> list[Artifact[Any]]:
    """Return the caches that the recipe describes, for this process to build its share of."""
    recipe = context.recipe
    if recipe.cache.kind == "fused":
        fusion = resolved_fusion(context)
        assert fusion is not None  # there are teachers
        return [FusedCache(context, fusion)]
    splits: tuple[Split, ...] = ("calibration", "train")
    return [
        *(TeacherCache(context, name, split) for name in recipe.teachers for split in splits),
        *(HiddenCache(context, name) for name in context.kept_taps),
    ]


def results(context: RunContext) -> list[Artifact[Any]]:
    """Return the evaluation of the student and the controls."""
    return [Results(context, (*students(context), *controls(context)))]


ARTIFACTS: Mapping[str, Callable[[RunContext], Sequence[Artifact[Any]]]] = {
    "preflight": preflights,
    "cache": caches,
    "train": students,
    "evaluate": results,
    "report": lambda context: [Report(context)],
}
"""The artifacts of each stage, in the order of a run."""
