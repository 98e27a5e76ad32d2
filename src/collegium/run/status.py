"""States of the artifacts of a run folder, and those that a recipe would make again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collegium.config.recipe import Recipe
from collegium.errors import CacheError
from collegium.report.formats import amount, duration
from collegium.report.tables import Column, Line, Table
from collegium.run.artifact import Artifact
from collegium.run.artifacts import ARTIFACTS
from collegium.run.choice import Preflight, best_teacher_source
from collegium.run.context import RunContext
from collegium.run.folder import PREVIOUS
from collegium.storage.records import Stage


@dataclass(frozen=True)
class ArtifactState:
    """One artifact of a run."""

    name: str
    state: str
    num_bytes: int
    seconds: float | None = None


def run_status(recipe: Recipe) -> list[ArtifactState]:
    """Compare every artifact with the recipe. Reads the files of finished ones, writes nothing.

    Raises:
        CollegiumError: the recipe, its data or a model cannot be used.
    """
    context = RunContext(recipe)
    stages = context.folder.stages()
    artifacts = [*ARTIFACTS["corpus"](context)]
    if context.corpus.is_readable():  # the identity of all others depends on the text
        artifacts += _artifacts(context)
    named = {artifact.name: artifact for artifact in artifacts}
    states = [_state(artifact, stages) for artifact in named.values()]
    for name, stage in stages.items():
        if name not in named:
            size = sum(file.bytes for file in (stage.files or {}).values())
            status = stage.status
            if status == "running" and not context.folder.is_in_use():
                status = "killed"
            state = f"{status}; waits for preflight, or not in this recipe"
            states.append(ArtifactState(name, state, size, stage.seconds))
    previous = context.folder.path / PREVIOUS
    if previous.is_dir():
        states.append(
            ArtifactState(PREVIOUS, "made by earlier recipes; delete to free", _size(previous))
        )
    return states


def status_table(states: Iterable[ArtifactState], folder: Path) -> Table[ArtifactState]:
    """Return the states as a table."""
    columns: list[Column[ArtifactState]] = [
        Column("state", "state", str, is_text=True),
        Column("bytes", "num_bytes", amount),
        Column("time", "seconds", duration),
    ]
    return Table(str(folder), "artifact", columns, [Line(one.name, one) for one in states])


def _artifacts(context: RunContext) -> Iterator[Artifact[Any]]:
    """Yield the artifacts of all stages but those that wait for an unfinished preflight."""
    recipe = context.recipe
    stages = ["train", "evaluate", "export"]
    if recipe.teachers and recipe.cache.enabled:
        stages.insert(0, "cache")
    if recipe.teachers:
        yield from ARTIFACTS["preflight"](context)
        if recipe.fusion == "auto" and not Preflight(context).is_done():
            return
        source = best_teacher_source(context)
        if source is not None and "best_single" in recipe.evaluate.controls:
            if not isinstance(source, Preflight):
                yield source
            if not source.is_done():
                stages.remove("evaluate")
    for stage in stages:
        for artifact in ARTIFACTS[stage](context):
            if stage == "evaluate":
                yield from artifact.dependencies()
            yield artifact


def _state(artifact: Artifact[Any], stages: dict[str, Stage]) -> ArtifactState:
    stage = stages.get(artifact.name, Stage())
    size = _size(artifact.path) if artifact.path.exists() else 0
    return ArtifactState(artifact.name, _describe(artifact, stage), size, stage.seconds)


def _describe(artifact: Artifact[Any], stage: Stage) -> str:
    try:
        if artifact.is_done():
            return "done"
    except CacheError:
        return "of another run, in a shared folder; refused"
    if stage.status is None:
        return "missing"
    if stage.status == "running":
        if artifact.context.folder.is_in_use():
            return "running"
        # Of a process that was killed: it could not record its end.
        return "killed; resumes" if stage.key == artifact.key else "killed; of another recipe"
    if stage.key != artifact.key:
        return f"{stage.status}; of another recipe, made again"
    if stage.status == "done":
        return "damaged or incomplete; made again"
    return f"{stage.status}; resumes"


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
