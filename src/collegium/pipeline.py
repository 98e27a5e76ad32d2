"""The composition root: one function per stage; the only file that knows all parts.

    check ─▶ preflight ─▶ cache (where asked for) ─▶ train (student, then controls) ─▶ evaluate ─▶ report

Every stage reads and writes the run folder alone, is skipped when it is done with the same inputs, and goes on
from its last checkpoint when it was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from collegium.cache.processes import Ranks
from collegium.caching import (
    Built,
    build,
    calibration_identities,
    calibration_teachers,
    identities,
    open_or_build,
    open_or_build_features,
    reads_cache,
)
from collegium.checks import CheckReport, check_run
from collegium.console import progress
from collegium.errors import CollegiumError, RecipeError
from collegium.evaluate.scoring import score_models
from collegium.evaluate.table import ModelInfo, results_rows
from collegium.fusion.fuse import Fusion
from collegium.models import count_parameters
from collegium.preflight.measure import run_preflight
from collegium.recipe import Recipe, decode_fusion, load_recipe, write_fusion
from collegium.run_folder import last_row
from collegium.storage.files import fingerprint, read_json, write_json
from collegium.teachers.local import LocalTeacher, TeacherOptions
from collegium.train.checkpoint import checkpoints
from collegium.variants import Variant, control, main_variant
from collegium.workspace import Workspace


def check(recipe: Recipe) -> CheckReport:
    """Look at recipe, data, models, vocabularies and disk: nothing expensive, nothing written.

    Raises:
        CollegiumError: the run could not work.
    """
    return check_run(Workspace(recipe))


def preflight(recipe: Recipe, *, apply_to: Path | None = None) -> dict[str, Any]:
    """Measure teachers and fusions on the calibration split; no training.

    Args:
        recipe: the run.
        apply_to: a recipe file whose `fusion` is set to the chosen one.

    Returns: the content of preflight.json (docs/design/spine.md).
    """
    if not recipe.teachers:
        raise CollegiumError("teachers: none given; preflight compares teachers, name at least one")
    with _opened(recipe) as workspace:
        found = _preflight(workspace)
    if apply_to is not None:
        write_fusion(apply_to, found["chosen"]["fusion"])
    return found


def cache(recipe: Recipe) -> list[Built]:
    """Let the teachers read the corpus once, and keep what they say; returns each folder with its manifest.

    Started several times at once by a launcher, each process does its share.

    Raises:
        CollegiumError: there are no teachers, or the folder cannot be used.
    """
    share = Ranks.from_environment()
    if share.is_single:
        with _opened(recipe) as workspace:
            return build(workspace, lambda: _fusion(workspace))
    workspace = Workspace(recipe)
    check_run(workspace, trains=False)
    if share.rank == 0:
        workspace.folder.claim(workspace.values, workspace.recipe_text)
    return build(workspace, lambda: _known_fusion(workspace))


def train(recipe: Recipe) -> Path:
    """Train the student, without controls; returns its Hugging Face folder."""
    with _opened(recipe) as workspace:
        return _train(workspace, main_variant(recipe, _fusion(workspace)))


def evaluate(recipe: Recipe) -> list[dict[str, Any]]:
    """Train the controls that the recipe lists, score every model, write results.json."""
    with _opened(recipe) as workspace:
        return _evaluate(workspace)


def report(recipe: Recipe) -> Path:
    """Write report.html from the run folder alone."""
    # imported late: drawing takes longer to load than a whole check
    from collegium.report.page import write_report

    return write_report(recipe.output_dir)


def run(recipe: Recipe) -> Path:
    """All stages in order; returns the run folder."""
    with _opened(recipe) as workspace:
        _train(workspace, main_variant(recipe, _fusion(workspace)))
        _evaluate(workspace)
    report(recipe)
    return workspace.folder.path


def distill(recipe: Recipe | str | Path, *overrides: str) -> Path:
    """Run a recipe, given as an object or as a file with `key=value` overrides; returns the run folder.

    Raises:
        CollegiumError: the recipe, the data or a model cannot be used.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise CollegiumError(
                "distill: overrides go with a recipe file; change the object instead"
            )
        return run(recipe)
    return run(load_recipe(recipe, overrides))


@contextmanager
def _opened(recipe: Recipe) -> Iterator[Workspace]:
    """A checked run, alone in its folder; a run that could not work writes nothing.

    Raises:
        CollegiumError: as `check`, or another process is running on the folder.
    """
    workspace = Workspace(recipe)
    workspace.folder.check_free()
    check_run(workspace)
    with workspace.folder.lock():
        workspace.folder.claim(workspace.values, workspace.recipe_text)
        yield workspace


def _reads_calibration(workspace: Workspace) -> bool:
    """Whether preflight reads a cache in the place of the teachers."""
    cache = workspace.recipe.cache
    return cache.enabled and cache.kind == "per_teacher"


def _preflight_key(workspace: Workspace) -> str:
    key = workspace.key("student", "teachers", "data", "preflight")
    if _reads_calibration(workspace):
        key = fingerprint([key, calibration_identities(workspace)])
    return key


def _preflight_is_done(workspace: Workspace) -> bool:
    folder = workspace.folder
    is_done = folder.is_done("preflight", _preflight_key(workspace))
    return is_done and (folder.path / "preflight.json").is_file()


def _preflight(workspace: Workspace) -> dict[str, Any]:
    folder, recipe = workspace.folder, workspace.recipe
    path = folder.path / "preflight.json"
    if _preflight_is_done(workspace):
        return read_json(path)
    key, is_stored = _preflight_key(workspace), _reads_calibration(workspace)
    teachers = calibration_teachers(workspace) if is_stored else workspace.teachers
    with folder.stage("preflight", key), progress("preflight") as advance:
        found = run_preflight(
            teachers,
            workspace.datasets["calibration"],
            batch_size=recipe.preflight.batch_size,
            max_tokens=recipe.preflight.max_tokens,
            extended=recipe.preflight.candidates == "extended",
            # A cache of the calibration split says nothing of the validation split.
            held_out=None if is_stored else workspace.datasets["validation"],
            progress=advance,
        )
        write_json(path, found)
    return read_json(path)


def _fusion(workspace: Workspace) -> Fusion | None:
    """The recipe's fusion, or the one that preflight chose; None without teachers."""
    recipe = workspace.recipe
    if not recipe.teachers:
        return None
    if isinstance(recipe.fusion, Fusion):
        return recipe.fusion
    return decode_fusion(_preflight(workspace)["chosen"]["fusion"])


def _known_fusion(workspace: Workspace) -> Fusion | None:
    """The same where it must not be measured now.

    Raises:
        RecipeError: it is `auto`, and preflight is not done.
    """
    if isinstance(workspace.recipe.fusion, Fusion) or _preflight_is_done(workspace):
        return _fusion(workspace)
    raise RecipeError(
        "fusion: got auto, and preflight is not done; must be known to all processes that build a cache together; run "
        "`collegium preflight` before, or name a fusion"
    )


def _train(workspace: Workspace, variant: Variant) -> Path:
    """Train one student unless it is there; returns its Hugging Face folder."""
    folder = workspace.folder
    place = folder.path / variant.folder
    inputs = [workspace.key("student", "teachers", "data", "train", "seed"), variant.identity()]
    is_cached = reads_cache(workspace, variant, lambda: _fusion(workspace))
    if is_cached:
        inputs.append(fingerprint(identities(workspace, variant)))
    key = fingerprint(inputs)
    if folder.is_done(variant.stage, key) and (place / "train" / "summary.json").is_file():
        return place / "student"
    caches = open_or_build(workspace, variant) if is_cached else None
    features = open_or_build_features(workspace, variant) if is_cached else None
    with folder.stage(variant.stage, key):
        trainer = workspace.trainer(variant, place / "train", caches=caches, features=features)
        trainer.train(resume_from_checkpoint=bool(checkpoints(place / "train")))
        trainer.save_student(place / "student")
    summary = {
        "steps": trainer.state.global_step,
        "train_tokens": last_row(place / "train" / "log.jsonl")["num_tokens"],
        "train_seconds": folder.stages()[variant.stage]["seconds"],
    }
    write_json(place / "train" / "summary.json", summary)
    return place / "student"


def _evaluate(workspace: Workspace) -> list[dict[str, Any]]:
    folder, recipe = workspace.folder, workspace.recipe
    fusion = _fusion(workspace)
    variants = [main_variant(recipe, fusion), *_controls(workspace, fusion)]
    students = [(variant, _train(workspace, variant)) for variant in variants]
    key = fingerprint([workspace.key(*workspace.values), [v.identity() for v in variants]])
    path = folder.path / "results.json"
    if folder.is_done("evaluate", key) and path.is_file():
        return read_json(path)
    with folder.stage("evaluate", key), progress("evaluate") as advance:
        models, about = _models_to_score(workspace, students)
        scored = score_models(
            models,
            workspace.teachers,
            fusion,
            workspace.datasets["validation"],
            batch_size=recipe.evaluate.batch_size,
            max_tokens=recipe.evaluate.max_tokens,
            progress=advance,
        )
        write_json(path, results_rows(scored, about))
    return read_json(path)


def _controls(workspace: Workspace, fusion: Fusion | None) -> list[Variant]:
    recipe = workspace.recipe
    if fusion is None or not recipe.evaluate.controls:
        return []
    best = _preflight(workspace)["best_single"]["teacher"]
    ratio = workspace.compute_ratio
    return [
        control(name, recipe, best_teacher=best, compute_ratio=ratio)
        for name in recipe.evaluate.controls
    ]


def _models_to_score(
    workspace: Workspace, students: list[tuple[Variant, Path]]
) -> tuple[list[LocalTeacher], dict[str, ModelInfo]]:
    """The untouched student, each teacher and every trained student, wrapped alike, and what is known of them."""
    vocab_size = workspace.vocab_size
    untouched = workspace.new_student()
    models = [LocalTeacher("student (untouched)", untouched, vocab_size=vocab_size)]
    about = {
        models[0].name: ModelInfo(kind="untouched", num_parameters=count_parameters(untouched))
    }
    for teacher in workspace.teachers:
        models.append(teacher)
        about[teacher.name] = ModelInfo(kind="teacher", num_parameters=teacher.num_parameters)
    for variant, place in students:
        options = TeacherOptions(model=str(place), device=workspace.recipe.student.device)
        model = LocalTeacher.load(variant.label, options, vocab_size=vocab_size, where=str(place))
        models.append(model)
        summary = read_json(place.parent / "train" / "summary.json")
        kind = "student" if variant.name == "student" else "control"
        about[variant.label] = ModelInfo(kind=kind, num_parameters=model.num_parameters, **summary)
    return models, about
