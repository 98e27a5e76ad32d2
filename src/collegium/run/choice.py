"""The preflight of a run, and the fusion that it chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from collegium.cache.keys import BatchKeys
from collegium.cache.processes import Ranks
from collegium.config.recipe import EvaluateOptions, PreflightOptions, Recipe, decode_fusion
from collegium.console import OnProgress, progress
from collegium.data.windows import PackedDataset
from collegium.distributions import Teacher
from collegium.errors import CollegiumError, RecipeError
from collegium.evaluate.scoring import Windows, score_models
from collegium.fusion.fuse import Fusion
from collegium.models.forward import forward_bytes
from collegium.preflight.measure import STEP_COSTS, run_preflight
from collegium.preflight.search import FULL_TOKENS
from collegium.run.artifact import Artifact
from collegium.run.caches import TeacherCache, building
from collegium.run.context import RunContext
from collegium.run.cut_mass import with_cut_mass
from collegium.storage.files import fingerprint, write_json
from collegium.storage.records import BestTeacher, PreflightReport, open_record
from collegium.teachers.cached import CachedTeacher
from collegium.teachers.local import LocalTeacher
from collegium.teachers.recorded import join_shares, record
from collegium.types import Batch, Rows


class Preflight(Artifact[PreflightReport]):
    """Quality, calibration and disagreement of the teachers, and the fusion chosen from them."""

    stage = "preflight"
    file = "preflight.json"

    def identity(self) -> Any:
        inputs = self.context.inputs("student", "teachers", "data", "preflight")
        options, content = inputs["preflight"]
        inputs["preflight"] = [{k: v for k, v in options.items() if k != "memory"}, content]
        caches = {cache.teacher: cache.identity() for cache in self.dependencies()}
        return [fingerprint(inputs), caches] if caches else inputs

    def dependencies(self) -> Sequence[TeacherCache]:
        """The per-teacher caches of the calibration split, if the recipe has them."""
        recipe = self.context.recipe
        if not recipe.cache.enabled or recipe.cache.kind == "fused":
            return ()
        return [TeacherCache(self.context, name, "calibration") for name in recipe.teachers]

    def building(self, missing: Sequence[Artifact[Any]]) -> AbstractContextManager[Any]:
        return building(missing)

    def build(self) -> None:
        context, options = self.context, self.context.recipe.preflight
        split, held_out = context.datasets["calibration"], context.datasets["validation"]
        caches = self.dependencies()
        # A cache of the calibration split does not cover the validation split.
        splits = [split] if caches else [split, held_out]
        with context.scratch() as scratch, progress(self.name, self._costs(splits)) as work:
            keys = BatchKeys(split.sample_names)
            teachers: list[Teacher] = [
                CachedTeacher(one.teacher, one.open(), keys) for one in caches
            ]
            if not caches:
                recorder = Recorder(scratch, splits, options, context.processes.ranks)
                with context.processes.sharing(self.name):
                    teachers = recorder.teachers(context)
                teachers = recorder.joined(teachers)
            result = run_preflight(
                teachers,
                split,
                batch_size=options.batch_size,
                max_tokens=options.max_tokens,
                extended=options.candidates == "extended",
                held_out=None if caches else held_out,
                memory=round(options.memory * 1e9),
                begin=work.part,
            )
        write_json(self.path, with_cut_mass(result, context).to_json())

    def join(self) -> None:
        context = self.context
        splits = [context.datasets[part] for part in ("calibration", "validation")]
        folder, options = context.scratch_folder(), context.recipe.preflight
        Recorder(folder, splits, options, context.processes.ranks).teachers(context)

    def _costs(self, splits: Sequence[PackedDataset]) -> dict[str, float]:
        """Relative costs of the bodies, from their FLOP, and of the steps of `run_preflight`."""
        context, names = self.context, list(self.context.recipe.teachers)
        limit, vocab_size = context.recipe.preflight.max_tokens, context.vocab_size
        tokens = [min(limit, int(one.targets_per_window().sum())) for one in splits]
        costs: dict[str, float] = {}
        if not self.dependencies():
            for name in names:
                num_parameters = context.teacher_parameters[name] or 0
                costs[reading(name)] = 2.0 * num_parameters * sum(tokens)
        for step, per_logit in STEP_COSTS.items():
            num_tokens = tokens[-1] if step == "validation" else tokens[0]
            if step == "fusions":
                num_tokens = min(num_tokens, FULL_TOKENS)
            costs[step] = per_logit * vocab_size * len(names) * num_tokens
        return costs

    def open(self) -> PreflightReport:
        return open_record(self.path, PreflightReport)


def resolved_fusion(context: RunContext) -> Fusion | None:
    """Return the fusion of the recipe or, for `auto`, of the preflight. None without teachers.

    Raises RecipeError for `auto` without a finished preflight, in one of several processes.
    """
    if not context.recipe.teachers:
        return None
    if isinstance(context.recipe.fusion, Fusion):
        return context.recipe.fusion
    preflight = Preflight(context)
    if context.is_uncoordinated and not preflight.is_done():
        raise RecipeError(
            "fusion: got auto, and preflight is not done; must be known to all processes that "
            "build a cache together; run `collegium preflight` before, or name a fusion"
        )
    return decode_fusion(preflight.ensure().chosen.fusion)


def recorded_fusion(recipe: Recipe) -> Fusion:
    """Return the fusion of a run from its folder, without measuring anything.

    Raises CollegiumError without teachers, or for `auto` without a preflight.
    """
    if not recipe.teachers:
        raise CollegiumError("fused: the run has no teachers; must have some to fuse")
    if isinstance(recipe.fusion, Fusion):
        return recipe.fusion
    path = recipe.output_dir / Preflight.file
    return decode_fusion(open_record(path, PreflightReport).chosen.fusion)


class TeacherRanking(Artifact[BestTeacher]):
    """The teacher of lowest NLL, for runs that have nothing else to choose."""

    stage = "best_teacher"
    file = "best_teacher.json"

    def identity(self) -> Any:
        inputs = self.context.inputs("student", "teachers", "data")
        return [inputs, self.context.recipe.preflight.max_tokens]

    def build(self) -> None:
        parameters = self.context.teacher_parameters
        costs = {reading(name): float(count or 1) for name, count in parameters.items()}
        with progress(self.name, costs):
            # One after the other: each is released before the next one is loaded.
            nll = {name: self._nll(name) for name in self.context.recipe.teachers}
        best = min(nll, key=lambda name: nll[name])
        write_json(self.path, BestTeacher(teacher=best, nll=nll[best]).to_json())

    def _nll(self, name: str) -> float:
        options, split = self.context.recipe.preflight, self.context.datasets["calibration"]
        teacher = self.context.take_teacher(name)
        size = batch_size_within(options, teacher, split)
        with progress(reading(name)) as advance:
            windows = Windows.spread(split, size, options.max_tokens, advance)
            return score_models([teacher], [], None, windows)[name].nll

    def open(self) -> BestTeacher:
        return open_record(self.path, BestTeacher)


def best_teacher_source(context: RunContext) -> Preflight | TeacherRanking | None:
    """Return the artifact that knows the best teacher. None for a single teacher."""
    if len(context.recipe.teachers) < 2:
        return None
    preflight = Preflight(context)
    # With caches of the calibration split, a preflight reads no model.
    if context.recipe.fusion == "auto" or preflight.dependencies() or preflight.is_done():
        return preflight
    return TeacherRanking(context)


def best_teacher(context: RunContext) -> str:
    """Return the teacher of lowest NLL on the calibration split."""
    source = best_teacher_source(context)
    if source is None:
        return next(iter(context.recipe.teachers))
    opened = source.ensure()
    return opened.teacher if isinstance(opened, BestTeacher) else opened.best_single.teacher


def reading(name: str) -> str:
    """Name of the work of one model."""
    return f"reading with {name}"


def batch_size_within(
    options: PreflightOptions | EvaluateOptions, teacher: Teacher, split: PackedDataset
) -> int:
    """Return the windows per forward pass whose activations fit into `preflight.memory`."""
    if isinstance(options, EvaluateOptions) or not isinstance(teacher, LocalTeacher):
        return options.batch_size
    num_bytes = forward_bytes(teacher.model) * split.longest
    return max(1, min(options.batch_size, int(options.memory * 1e9 / num_bytes)))


@dataclass(frozen=True)
class Recorder:
    """Records models on the batches that an evaluation will read, at most one in memory."""

    folder: Path
    splits: Sequence[PackedDataset]
    options: PreflightOptions | EvaluateOptions
    ranks: Ranks = field(default_factory=Ranks)
    """Processes that record the same models in the same order, each its share of the batches."""
    _folders: dict[str, Path] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, name: str, load: Callable[[], Teacher]) -> Teacher:
        """Load a model, record it and release it."""
        folder = self._folders[name] = self.folder / str(len(self._folders))
        teacher = load()
        with progress(reading(name)) as advance:
            return record(teacher, self._batches(teacher, advance), folder, self.ranks)

    def joined(self, teachers: Sequence[Teacher]) -> list[Teacher]:
        """Return recorded models with the shares of all processes, once all have ended."""
        return [join_shares(one, self._folders[one.name], self.ranks) for one in teachers]

    def teachers(self, context: RunContext) -> list[Teacher]:
        """Record the teachers of a run."""
        return [self(name, partial(context.take_teacher, name)) for name in context.recipe.teachers]

    def _batches(self, teacher: Teacher, advance: OnProgress) -> Iterator[tuple[Batch, Rows]]:
        # One count over all splits: their windows are of one kind.
        windows = [
            Windows.spread(
                split, batch_size_within(self.options, teacher, split), self.options.max_tokens
            )
            for split in self.splits
        ]
        total, done = sum(len(one.indices) for one in windows), 0
        advance(done, total)
        for one in windows:
            for batch, rows, _ in one.batches():
                yield batch, rows
                done += len(batch.input_ids)
                advance(min(done, total), total)
        advance(total, total)
