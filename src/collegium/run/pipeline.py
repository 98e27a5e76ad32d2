"""The stages of a run as functions, one per command.

    check ─▶ corpus ─▶ preflight ─▶ cache ─▶ train ─▶ evaluate (controls first) ─▶ export ─▶ report

Each stage reads and writes only the run folder, is skipped if its artifacts exist with the same
inputs, and resumes from its last checkpoint after an interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from collegium.cache.processes import Ranks
from collegium.config.recipe import Recipe, decode_fusion, load_recipe, write_fusion
from collegium.errors import CollegiumError, RecipeError
from collegium.run.artifact import Artifact
from collegium.run.artifacts import ARTIFACTS
from collegium.run.caches import Cache, building
from collegium.run.checks import check_run, plan_run
from collegium.run.context import RunContext
from collegium.run.problems import CheckReport
from collegium.run.processes import Processes, noticing_loss
from collegium.run.students import STUDENT_MANIFEST, controls
from collegium.storage.records import PreflightReport, ResultRow
from collegium.train.checkpoint import set_aside_damaged

T = TypeVar("T")


def check(recipe: Recipe) -> CheckReport:
    """Check a run without writing anything. Raises CollegiumError if it could not work."""
    context = RunContext(recipe)
    report = check_run(context)
    if not context.corpus.is_readable():
        return report
    plan = plan_run(context)
    return CheckReport(report.lines + plan.lines, report.warnings + plan.warnings)


def corpus(recipe: Recipe) -> str:
    """Read the sources, and write their tokens. Return a description of the corpus."""
    line = _lead(recipe, lambda context: context.corpus.line())
    return RunContext(recipe).corpus.line() if line is None else line


def preflight(recipe: Recipe, *, apply_to: Path | None = None) -> PreflightReport:
    """Measure teachers and fusions on the calibration split, without training.

    Writes the chosen fusion into the recipe `apply_to`. Raises CollegiumError without teachers.
    """
    _require_teachers(recipe, "preflight compares them")
    (measured,) = _ensure(recipe, "preflight")
    if apply_to is not None and Ranks.from_environment().rank == 0:
        write_fusion(apply_to, measured.chosen.fusion)
        # The same run, whose fusion has a name now.
        fusion = decode_fusion(measured.chosen.fusion)
        RunContext(replace(recipe, fusion=fusion)).record_recipe()
    return measured


def cache(recipe: Recipe) -> list[Path]:
    """Run the teachers over the corpus once and store their outputs. Return the cache folders.

    Every finished shard is verified, and a damaged one is built again. Started by a launcher, each
    process builds its share. Raises CollegiumError without teachers, or for an unusable folder.
    """
    _require_teachers(recipe, "a cache stores their outputs")
    ranks = Ranks.from_environment()
    ranks.set_device()
    if ranks.is_single:
        with opened(RunContext(recipe)) as context:
            return _build_caches(context)
    context = RunContext(recipe)
    check_run(context, trains=False)
    if ranks.rank == 0:
        context.claim_folder()
    _ensure_corpus(context, trains=False)
    return _build_caches(context)


def train(recipe: Recipe) -> Path:
    """Train the student, without controls. Return its Hugging Face folder."""
    return _ensure(recipe, "train")[0]


def evaluate(recipe: Recipe) -> list[ResultRow]:
    """Train the controls that the recipe lists, score every model, and write results.json."""
    return _ensure(recipe, "evaluate")[0]


def report(recipe: Recipe) -> Path:
    """Write report.html and the model card from the run folder, whether or not models exist.

    Return the path of the report.
    """
    page, _ = (artifact.ensure() for artifact in ARTIFACTS["report"](RunContext(recipe)))
    return page


def run(recipe: Recipe) -> Path:
    """Run all stages in order. Return the run folder."""
    _lead(recipe, _run)
    return recipe.output_dir


def _run(context: RunContext) -> None:
    folder, options = context.folder.path, context.recipe.cache
    finished = [
        place
        for place in (folder / "train", *folder.glob("controls/*/train"))
        if (place / "summary.json").is_file()
    ]
    # No stage reads the checkpoints and the cache of a finished training, and users do.
    for place in finished:
        set_aside_damaged(place)
    _build(context, "train", "evaluate", "export", "report")
    if finished and options.enabled and options.url is None:
        for artifact in _caches(context):
            artifact.restore()


def distill(recipe: Recipe | str | Path, *overrides: str) -> Path:
    """Run a recipe, an object or a file with `key=value` overrides. Return the run folder.

    Raises CollegiumError if the recipe, the data or a model cannot be used.
    """
    if not isinstance(recipe, Recipe):
        return run(load_recipe(recipe, overrides))
    if overrides:
        raise CollegiumError("distill: overrides go with a recipe file; change the object instead")
    return run(recipe)


def _lead(recipe: Recipe, work: Callable[[RunContext], T]) -> T | None:
    """Do the work of a run in rank 0, and join its shared builds in the others, without a result.

    Raises CollegiumError if the run cannot work, or another process ends.
    """
    processes = Processes.join(recipe)
    context = RunContext(recipe, processes)
    with noticing_loss(processes.ranks):
        if processes.rank > 0:
            for name in processes.shared_builds():
                _shared(context, name).join()
            return None
        with opened(context):
            result = work(context)
        processes.end()
    return result


def _shared(context: RunContext, name: str) -> Artifact[Any]:
    """Return a shared artifact by its name, when rank 0 has built what comes before it."""
    stages = {**ARTIFACTS, "control": controls}
    artifacts = stages[name.split(" ")[0]](context)
    return next(one for one in artifacts if one.name == name)


@contextmanager
def opened(context: RunContext) -> Iterator[RunContext]:
    """Check a run, lock its folder and encode its corpus, or raise CollegiumError.

    A failed check writes nothing. The text of a large corpus is checked once it is encoded.
    """
    context.folder.check_free()
    check_run(context)
    with context.folder.lock():
        context.claim_folder()
        _ensure_corpus(context)
        yield context


def _ensure_corpus(context: RunContext, *, trains: bool = True) -> None:
    was_checked = context.corpus.is_readable()
    for artifact in ARTIFACTS["corpus"](context):
        artifact.ensure()
    if not was_checked:
        check_run(context, trains=trains)


def _require_teachers(recipe: Recipe, reason: str) -> None:
    if not recipe.teachers:
        raise RecipeError(f"teachers: got none; must be at least one, since {reason}; add some")


def _ensure(recipe: Recipe, *stages: str) -> Sequence[Any]:
    """Build the artifacts of stages. Return those of the last, opened."""
    built = _lead(recipe, lambda context: _build(context, *stages))
    # Of the other processes, rank 0 has built them.
    return [a.open() for a in ARTIFACTS[stages[-1]](RunContext(recipe))] if built is None else built


def _build(context: RunContext, *stages: str) -> Sequence[Any]:
    contents: list[Any] = []
    is_trained = (context.folder.path / STUDENT_MANIFEST).is_file()
    if not is_trained and {"train", "evaluate"} & {*stages}:
        # A student that cannot be trained is refused before any teacher is read for it.
        context.new_student()
    for stage in stages:
        contents = [artifact.ensure() for artifact in ARTIFACTS[stage](context)]
    return contents


def _caches(context: RunContext) -> list[Cache[Any]]:
    return [artifact for artifact in ARTIFACTS["cache"](context) if isinstance(artifact, Cache)]


def _build_caches(context: RunContext) -> list[Path]:
    built = _caches(context)
    # All folders are compared with the recipe before the first one is written.
    for artifact in built:
        artifact.is_done()
    with building(built):
        for artifact in built:
            if Ranks.from_environment().is_single:  # or one process would move what another builds
                artifact.set_aside()
            with artifact.log():
                artifact.build()
    return [artifact.path for artifact in built]
