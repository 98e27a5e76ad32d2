"""Run a study: one ordinary recipe per setting and seed. Finished runs are skipped."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collegium.config.recipe import Recipe, cache_source, recipe_hash
from collegium.console import say
from collegium.demo.run import read_values, write_recipe
from collegium.errors import RecipeError
from collegium.fusion.fitted import WEIGHTINGS
from collegium.fusion.requirements import rule_requirements, unmet
from collegium.report.tables import Table
from collegium.run import pipeline
from collegium.storage.files import fingerprint, lock_folder, write_json
from collegium.storage.records import PreflightReport, StudyRow, StudyRun, read_record
from collegium.study.measurements import preflight_values, run_values
from collegium.study.options import PICK, RANK, Level, StudyOptions, load_study, slug
from collegium.study.results import write_page
from collegium.study.zoo import prepare_zoo

SEED = "{seed}"
NOT_MEASURED = ("student", "objective", "train", "cache", "evaluate", "fusion")
"""Recipe sections that a preflight does not depend on, except for the student's tokenizer."""


@dataclass(frozen=True)
class Job:
    """One setting with one seed."""

    levels: Mapping[str, str]
    seed: int
    changes: Level
    folder: Path

    @property
    def title(self) -> str:
        """Name of the job in progress output and errors."""
        return f"{', '.join(self.levels.values())} (seed {self.seed})"


def run_study(path: Path) -> tuple[Path, list[Table[Any]]]:
    """Train missing teachers, execute the unfinished runs, and return the page and its tables.

    Raises:
        CollegiumError: the study file, a recipe, its data or a model is unusable. Finished runs
            are kept.
    """
    study = load_study(path)
    folder = study.output_dir
    if folder == Path():
        folder = Path("runs") / "study" / study.name
    # Two processes in one study folder would execute the same runs.
    with lock_folder(folder, "wait for it, or choose another output_dir"):
        _check_settings(study, path.parent / study.base, folder)
        for zoo in study.zoo:
            for seed in study.seeds:
                prepare_zoo(zoo, seed)
        rows = run_jobs(study, path.parent / study.base, folder)
        return write_page(study, rows, folder, text=path.read_text(encoding="utf-8"))


def jobs_of(study: StudyOptions, folder: Path) -> list[Job]:
    """Return all runs of a study, seed by seed."""
    jobs = []
    for seed, (levels, changes) in itertools.product(study.seeds, study.settings()):
        name = "_".join(map(slug, levels.values()))
        jobs.append(Job(levels, seed, changes, folder / "runs" / f"{name}_seed{seed}"))
    return jobs


def _check_settings(study: StudyOptions, base: Path, folder: Path) -> None:
    """Refuse settings whose recipes cannot work, before the first teacher is trained.

    A picked fusion is not known yet. Its rule is, and whether a cache can have it.
    """
    for job in jobs_of(study, folder):
        values = _values(job, base, folder)
        pick = job.changes.get(PICK)
        if pick is not None:
            values["fusion"] = "auto"
        recipe = write_recipe(folder / "recipes" / f"{job.folder.name}.yaml", values)
        if pick is not None and recipe.cache.enabled:
            wanted = rule_requirements(WEIGHTINGS[pick["weighting"]], pick.get("pool", "linear"))
            source = cache_source(recipe.cache)
            if problems := unmet(wanted, source):
                raise RecipeError("\n".join(f"{job.title}: {one}" for one in problems))


def run_jobs(study: StudyOptions, base: Path, folder: Path) -> list[StudyRow]:
    """Execute the unfinished runs and return all rows. Each run updates rows.json.

    Raises:
        CollegiumError: a recipe, its data or a model is unusable. Finished runs are kept.
    """
    rows: list[StudyRow] = []
    jobs = jobs_of(study, folder)
    for number, job in enumerate(jobs, start=1):
        say(f"[{number}/{len(jobs)}] {job.title}")
        rows += _run(study, job, base, folder)
        write_json(folder / "rows.json", [row.to_json() for row in rows])
    return rows


def _run(study: StudyOptions, job: Job, base: Path, folder: Path) -> list[StudyRow]:
    recipe = _recipe(job, base, folder)
    record = job.folder / "study.json"
    # The hash of the whole recipe: after an edit of the base or a level, its runs are repeated.
    key = recipe_hash(recipe)
    done = read_record(record, StudyRun)
    if done is not None and done.key != key:
        done = None
    if study.students:
        if done is None:
            pipeline.evaluate(recipe)
        # A finished run is read again, for measures that are newer than it.
        measured = [({}, run_values(recipe))]
    elif done is not None:
        return list(done.rows)
    else:
        measured = preflight_values(pipeline.preflight(recipe))
    rows = [
        StudyRow(levels={**job.levels, **more}, seed=job.seed, folder=str(job.folder), values=read)
        for more, read in measured
    ]
    write_json(record, StudyRun(key=key, rows=rows).to_json())
    return rows


def _recipe(job: Job, base: Path, folder: Path) -> Recipe:
    """Write and load the recipe of a run, with the fitted fusion if the setting picks one."""
    values = _values(job, base, folder)
    if RANK in job.changes:
        values["teachers"] = _ranked_teachers(job, values, folder)
    if PICK in job.changes:
        values["fusion"] = _fitted_fusion(job, values, folder)
    return write_recipe(folder / "recipes" / f"{job.folder.name}.yaml", values)


def _values(job: Job, base: Path, folder: Path) -> dict[str, Any]:
    """Return the recipe of a run as far as it is known before any preflight."""
    changes = {key: value for key, value in job.changes.items() if key not in (PICK, RANK)}
    overrides = [
        # As JSON, so that `{seed}` is replaced at any depth.
        f"{key}={json.dumps(value, ensure_ascii=False)}".replace(SEED, str(job.seed))
        for key, value in changes.items()
    ]
    values = read_values(base, SEED, str(job.seed), overrides)
    values |= {"name": job.folder.name, "seed": job.seed, "output_dir": job.folder.as_posix()}
    # One corpus for all runs, unless the study names its place.
    return values | {"data": {"corpus": (folder / "corpus").as_posix(), **values["data"]}}


def _fitted_fusion(job: Job, values: Mapping[str, Any], folder: Path) -> Any:
    """Return the fusion that a preflight with these teachers fitted for the pick of a setting."""
    pick = {"pool": "linear", "calibration": "raw", **job.changes[PICK]}
    # `extended` tries every rule in every pool, so that a pick finds its candidate.
    report = _preflight(values, folder, candidates="extended")
    names = set()
    for candidate in report.fusions:
        fusion = candidate.fusion
        fitted = {**fusion["weighting"], "weighting": fusion["weighting"]["name"]}
        fitted |= {"pool": fusion["pool"], "calibration": candidate.calibration}
        if all(fitted.get(key) == value for key, value in pick.items()):
            return fusion
        names.add(fitted["weighting"])
    raise RecipeError(
        f"{job.title}: preflight has no fusion with {json.dumps(pick)}; must be one that it tries; "
        f"weightings: {', '.join(sorted(names))}"
    )


def _ranked_teachers(job: Job, values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the first teachers of a setting, in the order of their NLL or in a random one."""
    order, number, teachers = (
        job.changes[RANK]["order"],
        job.changes[RANK]["number"],
        values["teachers"],
    )
    if not 1 <= number <= len(teachers):
        raise RecipeError(
            f"{job.title}: rank.number: got {number}; must be 1 to {len(teachers)}, the number of "
            "teachers"
        )
    if order in ("best", "worst"):
        measured = _preflight(values, folder, candidates="standard").teachers
        names = sorted(teachers, key=lambda name: measured[name].nll or 0.0)
        names = names[::-1] if order == "worst" else names
    else:
        names = random.Random(order).sample(sorted(teachers), len(teachers))
    return {name: teachers[name] for name in names[:number]}


def _preflight(values: Mapping[str, Any], folder: Path, *, candidates: str) -> PreflightReport:
    """Run the preflight of a setting, once for all settings that agree in what it depends on."""
    ignored = (*NOT_MEASURED, "name", "output_dir")
    shared = {key: value for key, value in values.items() if key not in ignored}
    name = f"preflight-{fingerprint([shared, candidates])[:12]}"
    # Without training, evaluation and cache: settings that agree in the rest share one preflight.
    measured = {
        **shared,
        "student": values["student"],
        "name": name,
        "output_dir": (folder / "preflight" / name).as_posix(),
        "preflight": {**(values.get("preflight") or {}), "candidates": candidates},
        "fusion": "auto",
    }
    return pipeline.preflight(write_recipe(folder / "recipes" / f"{name}.yaml", measured))
