"""The trained students of a run: the one that the recipe describes, and its controls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.cache.keys import BatchKeys
from collegium.data.pack import Collator
from collegium.losses.features import FeatureLoss
from collegium.run.artifact import Artifact
from collegium.run.caches import Cache, FusedCache, HiddenCache, TeacherCache
from collegium.run.choice import Preflight, resolved_fusion
from collegium.run.context import RunContext
from collegium.run.controls import CONTROLS, Measured, Variant, main_variant
from collegium.storage.files import fingerprint, write_json
from collegium.storage.records import ModelInfo, TrainSummary, open_record, read_log
from collegium.teachers.cached import CachedTargets, CachedTeacher
from collegium.teachers.local import LocalTeacher
from collegium.teachers.options import LocalOptions
from collegium.teachers.prefetch import PrefetchingCollator
from collegium.train.checkpoint import checkpoints
from collegium.train.objective import Objective
from collegium.train.options import training_arguments

if TYPE_CHECKING:
    from collegium.train.trainer import DistillTrainer


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
            self.variant.label, options, vocab_size=self.context.vocab_size, where=str(self.path)
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
    variants = [CONTROLS[name](recipe, measured) for name in recipe.evaluate.controls]
    return [Student(context, variant) for variant in variants]


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
