"""All artifacts of a run, by stage.

    corpus/DIGEST/     the tokens of the sources (`collegium.run.corpora`)
    preflight.json     measurements of teachers and fusions
    best_teacher.json  the best teacher, where a named fusion leaves nothing else to choose
    cache/             stored outputs of the teachers (`collegium.run.caches`)
    student/, train/   the student, and its log and checkpoints
    controls/NAME/     the same of each control
    results.json       evaluation of all models on the validation split
    documents.parquet  the NLL of each model by document
    samples.json       a few continuations by each model, for the report
    generation.json    their continuations of held-out documents (`collegium.run.tasks`)
    tasks/NAME.json    their answers to the prompts of a task
    exports/NAME/      the student in another format (`collegium.run.exports`)
    measure.json       size and speed of the models (`collegium.run.speeds`)
    report.html        one page about all of these
    student/README.md  the model card (`collegium.run.card`)

A new export or evaluation is one class, and one entry in `ARTIFACTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collegium.console import progress
from collegium.distributions import Teacher
from collegium.evaluate.documents import DOCUMENTS, documents_file
from collegium.evaluate.scoring import Windows, results_rows, score_models
from collegium.run.artifact import Artifact
from collegium.run.caches import FusedCache, HiddenCache, Split, TeacherCache
from collegium.run.card import CARD, write_card
from collegium.run.choice import Preflight, Recorder, reading, resolved_fusion
from collegium.run.context import RunContext
from collegium.run.corpora import EncodedCorpus
from collegium.run.exports import exports
from collegium.run.speeds import speeds
from collegium.run.students import Student, controls, students
from collegium.run.tasks import TaskScores, sample_suite, suite_names
from collegium.storage.files import write_bytes, write_json
from collegium.storage.records import FileDigest, ModelInfo, ResultRow, open_record
from collegium.storage.stages import digests_of
from collegium.teachers.local import LocalTeacher

SEPARATE = ("samples", "generation", "tasks")
"""Options of `evaluate` that do not concern results.json."""
UNTOUCHED = "student (untouched)"
"""Name of the student before training."""


@dataclass(frozen=True, eq=False)
class Results(Artifact[list[ResultRow]]):
    """Scores of the untouched student, the teachers and all trained students."""

    stage = "evaluate"
    file = "results.json"
    students: tuple[Student, ...]

    def identity(self) -> Any:
        variants = [student.variant.identity() for student in self.students]
        # A run folder may be renamed or moved.
        without_effect = ("name", "output_dir", "export")
        sections = [name for name in self.context.values if name not in without_effect]
        inputs = self.context.inputs(*sections)
        # Tasks and generation are artifacts of their own.
        options, content = inputs["evaluate"]
        inputs["evaluate"] = [{k: v for k, v in options.items() if k not in SEPARATE}, content]
        return [inputs, variants]

    def is_done(self) -> bool:
        """Return True if the students that it scored are undamaged as well."""
        is_done = super().is_done() and self._documents.exists()
        return is_done and all([student.is_done() for student in self.students])

    def dependencies(self) -> Sequence[Student]:
        return self.students

    def build(self) -> None:
        context, options = self.context, self.context.recipe.evaluate
        split = context.datasets["validation"]
        parameters = {
            **context.teacher_parameters,
            UNTOUCHED: context.student_facts.num_parameters,
            **{one.variant.label: context.student_facts.num_parameters for one in self.students},
        }
        costs = {reading(name): float(count or 1) for name, count in parameters.items()}
        # Heads and measures of all models, against one body each.
        costs[self.name] = 0.5 * sum(costs.values())
        with context.scratch() as scratch, progress(self.name, costs):
            recorder = Recorder(scratch, [split], options, context.processes.ranks)
            with context.processes.sharing(self.name):
                teachers, others = self._record(recorder)
            teachers, others = recorder.joined(teachers), recorder.joined(others)
            models = [others[0], *teachers, *others[1:]]
            with progress(self.name) as advance:
                windows = Windows.spread(split, options.batch_size, options.max_tokens, advance)
                scored = score_models(models, teachers, resolved_fusion(context), windows)
        size = context.student_facts.num_parameters
        infos = [ModelInfo(name=UNTOUCHED, kind="untouched", num_parameters=size)]
        for name, count in context.teacher_parameters.items():
            infos.append(ModelInfo(name=name, kind="teacher", num_parameters=count))
        rows = results_rows(scored, [*infos, *(one.info() for one in self.students)])
        write_bytes(self._documents, documents_file(scored, split.sample_names))
        write_json(self.path, [row.to_json() for row in rows])

    def _record(self, recorder: Recorder) -> tuple[list[Teacher], list[Teacher]]:
        """Record the teachers, then the untouched student and the trained ones."""
        # The teachers first, to release those that are loaded.
        teachers = recorder.teachers(self.context)
        others = [recorder(UNTOUCHED, self._load_untouched)]
        others += [recorder(one.variant.label, one.load) for one in self.students]
        return teachers, others

    def join(self) -> None:
        context = self.context
        split, options = context.datasets["validation"], context.recipe.evaluate
        folder = context.scratch_folder()
        self._record(Recorder(folder, [split], options, context.processes.ranks))

    @property
    def _documents(self) -> Path:
        return self.path.with_name(DOCUMENTS)

    def digests(self) -> Mapping[str, FileDigest]:
        return digests_of(self.context.folder.path, [self.path, self._documents])

    def _load_untouched(self) -> LocalTeacher:
        student = self.context.new_student()
        return LocalTeacher(UNTOUCHED, student, vocab_size=self.context.vocab_size)

    def open(self) -> list[ResultRow]:
        return open_record(self.path, list[ResultRow])


class Page(Artifact[Path]):
    """A page written from the run folder and no other file."""

    def identity(self) -> Any:
        return None

    def is_done(self) -> bool:
        """Return False: a page is cheap, and shows files that change without a stage."""
        return False

    def log(self) -> nullcontext[None]:
        """Record nothing: the page itself shows the record of the stages."""
        return nullcontext()

    def open(self) -> Path:
        return self.path


class Report(Page):
    """The report of a run."""

    stage = "report"
    file = "report.html"

    def build(self) -> None:
        # Imported here: drawing takes longer to load than a whole check.
        from collegium.report.page import write_report

        write_report(self.context.folder.path)


class Card(Page):
    """The model card of the student. A file beside those of its manifest: no digest covers it."""

    stage = "card"
    file = f"student/{CARD}"

    def build(self) -> None:
        write_card(self.context.folder.path)


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


def evaluations(context: RunContext) -> list[Artifact[Any]]:
    """Return the scores on the validation split, then those of generated text and tasks."""
    trained = (*students(context), *controls(context))
    options = context.recipe.evaluate
    names = [*suite_names(options), *sample_suite(options)]
    return [Results(context, trained), *(TaskScores(context, name, trained) for name in names)]


ARTIFACTS: Mapping[str, Callable[[RunContext], Sequence[Artifact[Any]]]] = {
    "corpus": lambda context: [EncodedCorpus(context)],
    "preflight": lambda context: [Preflight(context)],
    "cache": caches,
    "train": students,
    "evaluate": evaluations,
    "export": lambda context: [*exports(context), *speeds(context)],
    "report": lambda context: [Report(context), Card(context)],
}
"""The artifacts of each stage, in the order of a run."""
