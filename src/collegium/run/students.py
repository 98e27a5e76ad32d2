"""The trained students of a run: the one that the recipe describes, and its controls."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Subset

from collegium.cache.keys import BatchKeys
from collegium.console import say
from collegium.data.collate import Collator
from collegium.errors import CollegiumError, TrainingError
from collegium.evaluate.scoring import spread_windows
from collegium.losses.states import StateLoss
from collegium.models.forward import forward_rows
from collegium.models.probe import is_close
from collegium.run.artifact import Artifact
from collegium.run.caches import Cache, FusedCache, HiddenCache, TeacherCache, building
from collegium.run.choice import best_teacher, resolved_fusion
from collegium.run.context import RunContext
from collegium.run.controls import Variant, control_variants, main_variant
from collegium.storage.files import fingerprint, write_json
from collegium.storage.records import (
    FileDigest,
    ModelInfo,
    Stage,
    TrainSummary,
    open_record,
    read_log,
)
from collegium.storage.stages import file_digest
from collegium.teachers.cached import CachedTargets, CachedTeacher
from collegium.teachers.local import LocalTeacher
from collegium.teachers.options import LocalOptions
from collegium.teachers.prefetch import PrefetchingCollator
from collegium.train.checkpoint import MANIFEST, checkpoints, read_manifest, step_of, survey
from collegium.train.objective import Objective, state_losses
from collegium.train.options import TrainOptions, training_arguments
from collegium.types import Batch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from collegium.train.trainer import DistillTrainer

STUDENT_MANIFEST = f"student/{MANIFEST}"
"""File of a run folder that marks a trained student."""
SAMPLED_ROWS = 16
"""Rows on which a saved student is compared with the trained one."""


@dataclass(frozen=True, eq=False)
class Student(Artifact[Path]):
    """A trained student in Hugging Face format: the main one or a control."""

    variant: Variant
    is_shared = True

    @property
    def name(self) -> str:
        return "train" if self._is_main else f"control {self.variant.name}"

    @property
    def path(self) -> Path:
        folder = self.context.folder.path
        return (folder if self._is_main else folder / "controls" / self.variant.name) / "student"

    @property
    def _is_main(self) -> bool:
        return self.variant.name == "student"

    @property
    def output_dir(self) -> Path:
        """Folder of the log and the checkpoints."""
        return self.path.with_name("train")

    @property
    def log_file(self) -> Path:
        """One line per logged step."""
        return self.output_dir / "log.jsonl"

    @property
    def summary(self) -> Path:
        """File with the steps and tokens of the finished training."""
        return self.output_dir / "summary.json"

    def identity(self) -> Any:
        inputs = self.context.inputs("student", "teachers", "data", "train", "seed")
        caches = {cache.name: cache.identity() for cache in self.dependencies()}
        return [inputs, self.variant.identity(), caches]

    def building(self, missing: Sequence[Artifact[Any]]) -> AbstractContextManager[Any]:
        return building(missing)

    def dependencies(self) -> Sequence[Cache[Any]]:
        """The caches to train from, none for live teachers."""
        context, variant = self.context, self.variant
        options = context.recipe.cache
        if not options.enabled or not variant.teachers or not variant.objective.has_divergence:
            return ()
        if options.kind == "fused":
            # It holds targets under the fusion of the recipe, so it serves no other.
            main = resolved_fusion(context), tuple(context.recipe.teachers)
            is_cached = (variant.fusion, variant.teachers) == main
            return [FusedCache(context, variant.fusion)] if is_cached and variant.fusion else ()
        return [
            *(TeacherCache(context, name, "train") for name in variant.teachers),
            *(HiddenCache(context, name) for name in context.kept_taps if name in variant.teachers),
        ]

    def is_done(self) -> bool:
        return super().is_done() and self.summary.is_file()

    def digests(self) -> dict[str, FileDigest]:
        """Return those of the student, its summary and its log."""
        folder = self.context.folder.path
        # From its manifest, written a moment ago: large weights are not read twice.
        digests = {self.path / n: one for n, one in read_manifest(self.path).digests().items()}
        for file in (self.path / MANIFEST, self.summary, self.log_file):
            if file.is_file():  # a short run may log nothing
                digests[file] = file_digest(file)
        return {file.relative_to(folder).as_posix(): one for file, one in digests.items()}

    def products(self, stage: Stage) -> Sequence[Path]:
        # Checkpoints may belong to a shorter run of the same student, see `_retire_other`.
        has_checkpoints = bool(checkpoints(self.output_dir))
        return [] if has_checkpoints else [self.path, self.output_dir]

    def _retire_other(self, trainer: DistillTrainer) -> None:
        """Set aside the student of checkpoints that this run cannot continue."""
        from collegium.train.resume import is_finished

        source, _ = survey(self.output_dir)
        if source is None:
            return
        step, last = step_of(source), trainer.args.max_steps
        if not trainer.differences(source) and step <= last:
            if not is_finished(trainer, source):
                say(f"{self.name}: goes on from step {step:,} of {last:,}")
            return
        self.context.folder.retire(self.name, [self.path, self.output_dir])
        self.output_dir.mkdir(parents=True)

    def build(self) -> None:
        trainer = self.trainer(self.output_dir)
        self._retire_other(trainer)
        trainer.train(resume_from_checkpoint=bool(checkpoints(self.output_dir)))
        if self.path.exists() and not (self.path / MANIFEST).is_file():
            # A damaged student of this run: the trainer replaces only what it has written.
            aside = f"{self.path.name}-damaged-{uuid.uuid4().hex[:8]}"
            say(f"{self.path}: has no {MANIFEST}; set aside as {aside}")
            self.path.rename(self.path.with_name(aside))
        trainer.save_student(self.path)
        log = read_log(self.log_file)
        summary = TrainSummary(
            steps=trainer.state.global_step,
            train_tokens=log[-1].num_tokens if log else None,
            max_steps=trainer.args.max_steps,
            best_step=trainer.best_step,
        )
        if trainer.stopped_early:
            say(f"{self.name}: stopped early at step {summary.steps:,} of {summary.max_steps:,}")
        if summary.best_step is not None:
            say(f"{self.name}: the student is that of step {summary.best_step:,}")
        trained = self._sampled_logits(trainer.step.student)
        del trainer  # with the optimizer's state, before the student is loaded again
        self._check_saved(trained)
        write_json(self.summary, summary.to_json())

    def join(self) -> None:
        trainer = self.trainer(self.output_dir)
        # Rank 0 chooses the checkpoint, and saves.
        trainer.train(resume_from_checkpoint=True)
        trainer.save_student(self.path)

    def open(self) -> Path:
        return self.path

    def load(self) -> LocalTeacher:
        """Load the finished student, for scoring."""
        where, size = str(self.path), self.context.vocab_size
        student = self.context.student
        options = LocalOptions(model=where, device=student.device, attention=student.attention)
        return LocalTeacher.load(self.variant.label, options, vocab_size=size, where=where)

    @torch.no_grad()
    def _sampled_logits(self, student: PreTrainedModel) -> Tensor:
        """Return logits (n, V) of a few rows of the first validation window."""
        batch = Batch.from_inputs(Collator()([{**self.context.datasets["validation"][0]}]))
        batch, size = batch.to(student.device), self.context.vocab_size
        rows = forward_rows(student.eval(), batch, batch.rows(), vocab_size=size)
        return rows.logits(slice(SAMPLED_ROWS)).cpu()

    def _check_saved(self, trained: Tensor) -> None:
        loaded = self.load().model
        logits = self._sampled_logits(loaded)
        # Merging adapters rounds every weight of their layers.
        factor = 8 if self.context.student.lora is None else 64
        if not is_close(logits, trained, loaded.dtype, factor=factor):
            raise TrainingError(
                f"{self.path}: the saved student gives other logits than the trained one (largest "
                f"difference {float((logits - trained).abs().max()):.3g}); must give the same; "
                "use another model family for the student"
            )

    def info(self) -> ModelInfo:
        """Return the facts about the finished student that results.json lists."""
        return ModelInfo(
            name=self.variant.label,
            kind="student" if self._is_main else "control",
            num_parameters=self.context.student_facts.num_parameters,
            train_seconds=self.context.folder.stages()[self.name].seconds,
            **dict(open_record(self.summary, TrainSummary)),
        )

    def trainer(
        self,
        output_dir: Path,
        *,
        student: PreTrainedModel | None = None,
        options: TrainOptions | None = None,
    ) -> DistillTrainer:
        """Return the trainer, which writes to `output_dir`.

        Further training has a trained `student` and `options` with its own `max_steps`.
        """
        # Imported here: it takes longer than a whole check.
        from collegium.train.selection import selection_callback
        from collegium.train.trainer import DistillTrainer

        context, variant, recipe = self.context, self.variant, self.context.recipe
        opened = {cache: cache.open() for cache in self.dependencies()}
        teachers, targets = _cached_sources(opened, context.datasets["train"].sample_names)
        live = context.teachers(() if opened else variant.teachers, in_step=True)
        release_freed_memory()  # of the teachers that built the caches
        # A fused cache has no hidden states, so its students train without feature terms.
        cached = [c.teacher for c in opened if isinstance(c, HiddenCache)]
        tapped = cached if opened else variant.teachers
        # Worker processes have their own memory and cannot prefetch for this one.
        sources = () if recipe.train.dataloader_num_workers else (*teachers, *targets)
        prefetches = [source.prefetch for source in sources]
        identity = {"variant": fingerprint(variant.identity())}
        for name in variant.teachers:
            identity[f"teacher {name}"] = fingerprint(context.teacher_identity(name))
        identity |= {cache.name: content.manifest.sha256 for cache, content in opened.items()}
        student = student or context.new_student()
        on_cpu = student.device.type == "cpu"
        if options is None:
            max_steps = round(context.num_steps * variant.steps_factor)
            options = dataclasses.replace(recipe.train, max_steps=max_steps)
        validation, callbacks = None, []
        if options.eval_steps is not None:
            validation = self._validation_windows()
            callbacks.append(selection_callback(options))
        if options.selects_checkpoint:
            identity["selection"] = self._selection_identity()
        return DistillTrainer(
            model=student,
            teachers=teachers or live,
            targets=targets[0] if targets else None,
            data_collator=PrefetchingCollator(Collator(), prefetches) if prefetches else None,
            args=training_arguments(
                options, output_dir=output_dir, seed=recipe.seed, on_cpu=on_cpu
            ),
            train_dataset=context.datasets["train"],
            eval_dataset=validation,
            evaluates_labels_only=bool(opened),
            callbacks=callbacks,
            objective=Objective(
                variant.objective.limited_to(tapped), variant.fusion, states=self._states(tapped)
            ),
            processing_class=context.tokenizer,
            identity=identity,
        )

    def _validation_windows(self) -> Subset[Any]:
        """Return the windows that evaluations during training read."""
        split, options = self.context.datasets["validation"], self.context.recipe.train
        return Subset(split, spread_windows(split, options.eval_max_tokens))

    def _selection_identity(self) -> str:
        """Return a digest of everything that the choice of a checkpoint depends on."""
        options = self.context.recipe.train
        own = (
            options.loads_best,
            options.early_stopping_patience,
            options.early_stopping_threshold,
            options.eval_steps,
            options.eval_max_tokens,
        )
        return fingerprint([*own, self.context.datasets["validation"].fingerprint])

    def _states(self, teachers: Sequence[str]) -> list[StateLoss]:
        """Return the terms on inner states of teachers that have them at hand."""
        context, options = self.context, self.variant.objective.limited_to(teachers)
        if not teachers or not options.state_terms():
            return []
        widths = {name: context.teacher_widths[name] for name in teachers}
        seed = context.recipe.seed
        ours, origins = context.student_facts.tap_widths, context.student.origins()
        return state_losses(options, ours, widths, seed=seed, origins=origins)


def release_freed_memory() -> None:
    """Return memory that was freed to the system, which glibc and Arrow keep for themselves.

    After a cache was built they kept 60 MB, as much as half of what the training then took.
    """
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def require_student(run_folder: Path) -> None:
    """Raise CollegiumError without a trained student."""
    if not (run_folder / STUDENT_MANIFEST).is_file():
        raise CollegiumError(
            f"{run_folder}: has no trained student; must be a run folder with `student/`; run "
            "`collegium train RECIPE`"
        )


def students(context: RunContext) -> list[Student]:
    """Return the student that the recipe describes."""
    return [Student(context, main_variant(context.recipe, resolved_fusion(context)))]


def controls(context: RunContext) -> list[Student]:
    """Return the control students that `evaluate.controls` lists."""
    recipe = context.recipe
    if not recipe.teachers or not recipe.evaluate.controls:
        return []
    # Only one control needs the best teacher, which takes a pass over the calibration split.
    is_needed = "best_single" in recipe.evaluate.controls
    best = best_teacher(context) if is_needed else next(iter(recipe.teachers))
    variants = control_variants(recipe, best, context.compute_ratio)
    return [Student(context, variants[name]) for name in recipe.evaluate.controls]


def _cached_sources(
    opened: Mapping[Cache[Any], Any], documents: Sequence[str]
) -> tuple[list[CachedTeacher], list[CachedTargets]]:
    """Return teachers read from per-teacher caches, or the targets of a fused one."""
    keys, caches = BatchKeys(documents), opened.items()
    hidden = {c.teacher: content for c, content in caches if isinstance(c, HiddenCache)}
    teachers = [
        CachedTeacher(c.teacher, content, keys, hidden.get(c.teacher))
        for c, content in caches
        if isinstance(c, TeacherCache)
    ]
    return teachers, [
        CachedTargets(content, documents) for c, content in caches if isinstance(c, FusedCache)
    ]
