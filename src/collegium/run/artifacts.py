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

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.cache.keys import BatchKeys
from collegium.cache.processes import Ranks
from collegium.config.recipe import decode_fusion
from collegium.console import progress
from collegium.data.pack import Collator, PackedDataset
from collegium.distributions import Teacher
from collegium.errors import RecipeError
from collegium.evaluate.scoring import (
    OnProgress,
    iterate_chunks,
    results_rows,
    score_models,
    spread_windows,
)
from collegium.fusion.fuse import Fusion
from collegium.losses.features import FeatureLoss
from collegium.preflight.measure import run_preflight
from collegium.run.artifact import Artifact
from collegium.run.caches import Cache, FusedCache, HiddenCache, Split, TeacherCache
from collegium.run.context import RunContext, free_memory
from collegium.run.controls import CONTROLS, Measured, Variant, main_variant
from collegium.storage.files import fingerprint, write_json
from collegium.storage.records import (
    ModelInfo,
    PreflightReport,
    ResultRow,
    TrainSummary,
    open_record,
    read_log,
)
from collegium.teachers.cached import CachedTargets, CachedTeacher
from collegium.teachers.local import LocalTeacher
from collegium.teachers.options import LocalOptions
from collegium.teachers.prefetch import PrefetchingCollator
from collegium.teachers.recorded import record
from collegium.train.checkpoint import checkpoints
from collegium.train.objective import Objective
from collegium.train.options import training_arguments
from collegium.types import Batch, Rows

UNTOUCHED = "student (untouched)"
"""Name of the student before training."""

if TYPE_CHECKING:
    from collegium.train.trainer import DistillTrainer


class Preflight(Artifact[PreflightReport]):
    """Quality, calibration and disagreement of the teachers, and the fusion chosen from them."""

    @property
    def name(self) -> str:
        return "preflight"

    @property
    def path(self) -> Path:
        return self.context.folder.path / "preflight.json"

    def identity(self) -> Any:
        inputs = self.context.inputs("student", "teachers", "data", "preflight")
        caches = {cache.teacher: cache.identity() for cache in self.dependencies()}
        return [fingerprint(inputs), caches] if caches else inputs

    def dependencies(self) -> Sequence[TeacherCache]:
        """The per-teacher caches of the calibration split, if the recipe has them."""
        recipe = self.context.recipe
        if not recipe.cache.enabled or recipe.cache.kind == "fused":
            return ()
        return [TeacherCache(self.context, name, "calibration") for name in recipe.teachers]

    def build(self) -> None:
        context, options = self.context, self.context.recipe.preflight
        split, held_out = context.datasets["calibration"], context.datasets["validation"]
        batch_size, max_tokens = options.batch_size, options.max_tokens
        caches = self.dependencies()
        with context.scratch() as scratch, progress(self.name) as advance:
            teachers: Sequence[Teacher]
            if caches:
                keys = BatchKeys(split.sample_names)
                teachers = [CachedTeacher(one.teacher, one.open(), keys) for one in caches]
            else:
                recorder = Recorder(scratch, [split, held_out], batch_size, max_tokens)
                teachers = [recorder.teacher(context, name) for name in context.recipe.teachers]
            result = run_preflight(
                teachers,
                split,
                batch_size=batch_size,
                max_tokens=max_tokens,
                extended=options.candidates == "extended",
                # A cache of the calibration split does not cover the validation split.
                held_out=None if caches else held_out,
                progress=advance,
            )
        write_json(self.path, result.to_json())

    def open(self) -> PreflightReport:
        return open_record(self.path, PreflightReport)


class Recorder:
    """Records models one after the other, on the batches that an evaluation will read.

    At most one of them is in memory. The recordings are used like the models.
    """

    def __init__(
        self,
        folder: Path,
        splits: Sequence[PackedDataset],
        batch_size: int,
        max_tokens: int | None,
    ) -> None:
        """Write to `folder`. The arguments are those of `score_models`."""
        self._folder = folder
        self._splits = splits
        self._batch_size = batch_size
        self._max_tokens = max_tokens

    def __call__(self, name: str, load: Callable[[], Teacher]) -> Teacher:
        """Load a model, record it and release it."""
        folder = self._folder / str(len(list(self._folder.iterdir())))
        with progress(f"reading with {name}") as advance:
            recorded = record(load(), self._batches(advance), folder)
        free_memory()
        return recorded

    def teacher(self, context: RunContext, name: str) -> Teacher:
        """Record a teacher of a run."""
        return self(name, partial(context.take_teacher, name))

    def _batches(self, advance: OnProgress) -> Iterator[tuple[Batch, Rows]]:
        for split in self._splits:
            windows = spread_windows(split, self._max_tokens)
            for chunk in iterate_chunks(
                split, batch_size=self._batch_size, windows=windows, progress=advance
            ):
                yield chunk.batch, chunk.rows


@dataclass(frozen=True, eq=False)
class Student(Artifact[Path]):
    """A trained student in Hugging Face format: the main one or a control."""

    variant: Variant

    @property
    def name(self) -> str:
        return self.variant.stage

    @property
    def path(self) -> Path:
        return self.context.folder.path / self.variant.folder / "student"

    @property
    def output_dir(self) -> Path:
        """Folder of the log and the checkpoints."""
        return self.path.with_name("train")

    @property
    def summary(self) -> Path:
        """File with the steps and tokens of the finished training."""
        return self.output_dir / "summary.json"

    def identity(self) -> Any:
        inputs = self.context.inputs("student", "teachers", "data", "train", "seed")
        caches = {cache.name: cache.identity() for cache in self.dependencies()}
        return [inputs, self.variant.identity(), caches]

    def dependencies(self) -> Sequence[Cache[Any]]:
        """The caches to train from, none for live teachers.

        A fused cache holds targets under the fusion of the recipe, so it serves no other.
        """
        context, variant = self.context, self.variant
        options = context.recipe.cache
        if not options.enabled or not variant.teachers or variant.objective.kd_ratio == 0:
            return ()
        if options.kind == "fused":
            main = main_variant(context.recipe, resolved_fusion(context))
            is_main = (variant.fusion, variant.teachers) == (main.fusion, main.teachers)
            return [FusedCache(context, variant.fusion)] if is_main and variant.fusion else ()
        return [
            *(TeacherCache(context, name, "train") for name in variant.teachers),
            *(HiddenCache(context, name) for name in context.kept_taps if name in variant.teachers),
        ]

    def is_done(self) -> bool:
        return super().is_done() and self.summary.is_file()

    def build(self) -> None:
        trainer = self.trainer(self.output_dir)
        trainer.train(resume_from_checkpoint=bool(checkpoints(self.output_dir)))
        trainer.save_student(self.path)
        log = read_log(self.output_dir / "log.jsonl")
        tokens = log[-1].num_tokens if log else None
        summary = TrainSummary(steps=trainer.state.global_step, train_tokens=tokens)
        write_json(self.summary, summary.to_json())

    def open(self) -> Path:
        return self.path

    def load(self) -> LocalTeacher:
        """Load the finished student, for scoring."""
        options = LocalOptions(model=str(self.path), device=self.context.recipe.student.device)
        return LocalTeacher.load(
            self.variant.label,
            options,
            vocab_size=self.context.vocab_size,
            where=str(self.path),
        )

    def info(self) -> ModelInfo:
        """Return the facts about the finished student that results.json lists."""
        return ModelInfo(
            name=self.variant.label,
            kind="student" if self.variant.name == "student" else "control",
            num_parameters=self.context.student_facts.num_parameters,
            train_seconds=self.context.folder.stages()[self.name].seconds,
            **dict(open_record(self.summary, TrainSummary)),
        )

    def trainer(self, output_dir: Path) -> DistillTrainer:
        """Return the trainer, which writes to `output_dir`."""
        # Imported here: it takes longer than a whole check.
        from collegium.train.trainer import DistillTrainer

        context, variant, recipe = self.context, self.variant, self.context.recipe
        opened = {cache: cache.open() for cache in self.dependencies()}
        teachers, targets = _cached_sources(opened, context.datasets["train"].sample_names)
        live = context.teachers(() if opened else variant.teachers)
        # A fused cache has no hidden states, so its students train without feature terms.
        tapped = (
            [c.teacher for c in opened if isinstance(c, HiddenCache)]
            if opened
            else variant.teachers
        )
        student = context.new_student()
        max_steps = round(context.num_steps * variant.steps_factor)
        return DistillTrainer(
            model=student,
            teachers=teachers or live,
            targets=targets,
            data_collator=self._collator([*teachers, *([targets] if targets else [])]),
            args=training_arguments(
                dataclasses.replace(recipe.train, max_steps=max_steps),
                output_dir=output_dir,
                seed=recipe.seed,
                on_cpu=student.device.type == "cpu",
            ),
            train_dataset=context.datasets["train"],
            objective=Objective(variant.objective, variant.fusion, features=self._features(tapped)),
            processing_class=context.tokenizer,
            identity={
                "variant": fingerprint(variant.identity()),
                **{
                    f"teacher {n}": fingerprint(context.teacher_identity(n))
                    for n in variant.teachers
                },
                **{cache.name: content.digest for cache, content in opened.items()},
            },
        )

    def _collator(
        self, sources: Sequence[CachedTeacher | CachedTargets]
    ) -> PrefetchingCollator | None:
        # Worker processes have their own memory and cannot prefetch for this one.
        if not sources or self.context.recipe.train.dataloader_num_workers:
            return None
        return PrefetchingCollator(Collator(), sources)

    def _features(self, teachers: Sequence[str]) -> FeatureLoss | None:
        """Return the feature terms of teachers whose hidden states are at hand."""
        options = self.variant.objective.features
        if options is None or not teachers:
            return None
        context = self.context
        weights = {name: w for name, w in options.teacher_weights.items() if name in teachers}
        return FeatureLoss(
            dataclasses.replace(options, teacher_weights=weights),
            context.student_facts.tap_widths,
            {name: context.teacher_widths[name] for name in teachers},
            seed=context.recipe.seed,
        )


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
                scored = score_models(
                    models,
                    teachers,
                    resolved_fusion(context),
                    split,
                    batch_size=batch_size,
                    max_tokens=max_tokens,
                    progress=advance,
                )
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


def resolved_fusion(context: RunContext) -> Fusion | None:
    """Return the fusion of the recipe or, for `auto`, of the preflight. None without teachers.

    Raises:
        RecipeError: it is `auto` without a finished preflight, in one of several processes.
    """
    recipe = context.recipe
    if not recipe.teachers or isinstance(recipe.fusion, Fusion):
        return recipe.fusion if isinstance(recipe.fusion, Fusion) and recipe.teachers else None
    preflight = Preflight(context)
    if not Ranks.from_environment().is_single and not preflight.is_done():
        raise RecipeError(
            "fusion: got auto, and preflight is not done; must be known to all processes that "
            "build a cache together; run `collegium preflight` before, or name a fusion"
        )
    return decode_fusion(preflight.ensure().chosen.fusion)


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


def students(context: RunContext) -> list[Student]:
    """Return the student that the recipe describes."""
    return [Student(context, main_variant(context.recipe, resolved_fusion(context)))]


def controls(context: RunContext) -> list[Student]:
    """Return the control students that `evaluate.controls` lists."""
    recipe = context.recipe
    if not recipe.teachers or not recipe.evaluate.controls:
        return []
    best = Preflight(context).ensure().best_single.teacher
    measured = Measured(best_teacher=best, compute_ratio=context.compute_ratio)
    return [Student(context, CONTROLS[name](recipe, measured)) for name in recipe.evaluate.controls]


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


def _cached_sources(
    opened: Mapping[Cache[Any], Any], documents: Sequence[str]
) -> tuple[list[CachedTeacher], CachedTargets | None]:
    """Return teachers read from per-teacher caches, or the targets of a fused one."""
    keys = BatchKeys(documents)
    hidden = {c.teacher: content for c, content in opened.items() if isinstance(c, HiddenCache)}
    fused = [content for c, content in opened.items() if isinstance(c, FusedCache)]
    teachers = [
        CachedTeacher(c.teacher, content, keys, hidden.get(c.teacher))
        for c, content in opened.items()
        if isinstance(c, TeacherCache)
    ]
    return teachers, CachedTargets(fused[0], documents) if fused else None
