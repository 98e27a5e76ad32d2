"""The preflight of a run, and the fusion that it chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from collegium.cache.keys import BatchKeys
from collegium.cache.processes import Ranks
from collegium.config.recipe import decode_fusion
from collegium.console import progress
from collegium.data.pack import PackedDataset
from collegium.distributions import Teacher
from collegium.errors import RecipeError
from collegium.evaluate.scoring import OnProgress, Windows
from collegium.fusion.fuse import Fusion
from collegium.preflight.measure import run_preflight
from collegium.run.artifact import Artifact
from collegium.run.caches import TeacherCache
from collegium.run.context import RunContext
from collegium.storage.files import fingerprint, write_json
from collegium.storage.records import PreflightReport, open_record
from collegium.teachers.cached import CachedTeacher
from collegium.teachers.recorded import record
from collegium.types import Batch, Rows


class Preflight(Artifact[PreflightReport]):
    """Quality, calibration and disagreement of the teachers, and the fusion chosen from them."""

    stage = "preflight"
    file = "preflight.json"

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
            keys = BatchKeys(split.sample_names)
            cached = [CachedTeacher(one.teacher, one.open(), keys) for one in caches]
            recorder = Recorder(scratch, [split, held_out], batch_size, max_tokens)
            result = run_preflight(
                cached or recorder.teachers(context),
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


def resolved_fusion(context: RunContext) -> Fusion | None:
    """Return the fusion of the recipe or, for `auto`, of the preflight. None without teachers.

    Raises RecipeError for `auto` without a finished preflight, in one of several processes.
    """
    if not context.recipe.teachers:
        return None
    if isinstance(context.recipe.fusion, Fusion):
        return context.recipe.fusion
    preflight = Preflight(context)
    if not Ranks.from_environment().is_single and not preflight.is_done():
        raise RecipeError(
            "fusion: got auto, and preflight is not done; must be known to all processes that "
            "build a cache together; run `collegium preflight` before, or name a fusion"
        )
    return decode_fusion(preflight.ensure().chosen.fusion)


@dataclass(frozen=True)
class Recorder:
    """Records models on the batches that an evaluation will read, at most one in memory."""

    folder: Path
    splits: Sequence[PackedDataset]
    batch_size: int
    max_tokens: int | None

    def __call__(self, name: str, load: Callable[[], Teacher]) -> Teacher:
        """Load a model, record it and release it."""
        folder = self.folder / str(len(list(self.folder.iterdir())))
        with progress(f"reading with {name}") as advance:
            return record(load(), self._batches(advance), folder)

    def teachers(self, context: RunContext) -> list[Teacher]:
        """Record the teachers of a run."""
        return [self(name, partial(context.take_teacher, name)) for name in context.recipe.teachers]

    def _batches(self, advance: OnProgress) -> Iterator[tuple[Batch, Rows]]:
        for split in self.splits:
            windows = Windows.spread(split, self.batch_size, self.max_tokens, advance)
            for batch, rows, _ in windows.batches():
                yield batch, rows
