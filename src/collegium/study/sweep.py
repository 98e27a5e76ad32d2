"""From a study to runs: one ordinary recipe per setting and seed; what is finished is not run again."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from collegium import pipeline
from collegium.console import say
from collegium.errors import RecipeError
from collegium.recipe import Recipe, load_recipe, recipe_hash
from collegium.run_folder import fingerprint, read_json, write_json, write_text
from collegium.study.measurements import preflight_rows, run_row
from collegium.study.options import PICK, Level, StudyOptions, slug

Row = dict[str, Any]
"""`{"levels": {factor: level}, "seed", "folder", "values": {measure: number or None}}`."""
SEED = "{seed}"
NOT_MEASURED = ("student", "objective", "train", "cache", "evaluate", "fusion")
"""Sections of a recipe that a preflight does not depend on, the student's tokenizer aside."""


@dataclass(frozen=True)
class Job:
    """One setting with one seed."""

    levels: Mapping[str, str]
    seed: int
    changes: Level
    folder: Path

    @property
    def title(self) -> str:
        """How it is called on the screen."""
        return f"{', '.join(self.levels.values())} (seed {self.seed})"


def jobs_of(study: StudyOptions, folder: Path) -> list[Job]:
    """All runs of a study, seed by seed."""
    found = []
    for seed in study.seeds:
        for levels, changes in study.settings():
            name = "_".join(slug(level) for level in levels.values())
            found.append(Job(levels, seed, changes, folder / "runs" / f"{name}_seed{seed}"))
    return found


def run_jobs(study: StudyOptions, base: Path, folder: Path) -> list[Row]:
    """Do every run that is not done; returns the rows of all of them, and keeps them in rows.json after each.

    Raises:
        CollegiumError: a recipe, its data or a model cannot be used; finished runs are kept.
    """
    rows: list[Row] = []
    jobs = jobs_of(study, folder)
    for number, job in enumerate(jobs, start=1):
        say(f"[{number}/{len(jobs)}] {job.title}")
        rows += _run(study, job, base, folder)
        write_json(folder / "rows.json", rows)
    return rows


def _run(study: StudyOptions, job: Job, base: Path, folder: Path) -> list[Row]:
    recipe = _recipe(job, base, folder)
    note = job.folder / "study.json"
    key = recipe_hash(recipe)
    if note.is_file() and (done := read_json(note))["key"] == key:
        return done["rows"]
    if study.students:
        pipeline.evaluate(recipe)
        found = [run_row(recipe.output_dir)]
    else:
        found = preflight_rows(pipeline.preflight(recipe))
    head = {"seed": job.seed, "folder": str(job.folder)}
    rows = [{"levels": {**job.levels, **one.levels}, **head, "values": one.values} for one in found]
    write_json(note, {"key": key, "rows": rows})
    return rows


def _recipe(job: Job, base: Path, folder: Path) -> Recipe:
    """The recipe of a run, written beside the others; its fusion comes from a preflight where the setting picks one."""
    changes = {key: value for key, value in job.changes.items() if key != PICK}
    changes = json.loads(json.dumps(changes).replace(SEED, str(job.seed)))
    values = _with_changes(_base(base, job.seed), changes, where=job.title)
    values |= {"name": job.folder.name, "seed": job.seed, "output_dir": job.folder.as_posix()}
    if PICK in job.changes:
        values["fusion"] = _picked(job, values, folder)
    return _written(folder / "recipes" / f"{job.folder.name}.yaml", values)


def _picked(job: Job, values: Mapping[str, Any], folder: Path) -> Any:
    """The fusion of the wanted weighting, pool and calibration as a preflight with these teachers fitted it."""
    wanted = {"pool": "linear", "calibration": "raw", **job.changes[PICK]}
    own = {
        key: value
        for key, value in values.items()
        if key not in (*NOT_MEASURED, "name", "output_dir")
    }
    name = f"preflight-{fingerprint(own)[:12]}"
    place = {"name": name, "output_dir": (folder / "preflight" / name).as_posix()}
    options = {**(values.get("preflight") or {}), "candidates": "extended"}
    # Training, evaluation and cache are left out: any settings that agree in the rest share one preflight.
    measured = {
        **own,
        "student": values["student"],
        **place,
        "preflight": options,
        "fusion": "auto",
    }
    found = pipeline.preflight(_written(folder / "recipes" / f"{name}.yaml", measured))
    for entry in found["fusions"]:
        fusion = entry["fusion"]
        has = {**fusion["weighting"], "weighting": fusion["weighting"]["name"]}
        has |= {"pool": fusion["pool"], "calibration": entry["calibration"]}
        if all(has.get(key) == value for key, value in wanted.items()):
            return fusion
    raise RecipeError(
        f"{job.title}: preflight has no fusion with {json.dumps(wanted)}; must be one that it tries; "
        f"known weightings: {', '.join(sorted({e['fusion']['weighting']['name'] for e in found['fusions']}))}"
    )


def _base(path: Path, seed: int) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8").replace(SEED, str(seed))
    except OSError as error:
        raise RecipeError(
            f"base: {path}: cannot be read ({error.strerror}); must be a recipe"
        ) from error
    values = YAML(typ="safe").load(text)
    if not isinstance(values, dict):
        raise RecipeError(f"base: {path}: must be a mapping of keys, as every recipe is")
    return values


def _with_changes(values: dict[str, Any], changes: Level, *, where: str) -> dict[str, Any]:
    """The recipe with the values at dotted keys replaced; what lies on the way is made where it is missing."""
    for key, value in changes.items():
        place: Any = values
        *path, last = key.split(".")
        for part in path:
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                raise RecipeError(f"{where}: {key}: `{part}` is no mapping; set it as a whole")
        place[last] = value
    return values


def _written(path: Path, values: Mapping[str, Any]) -> Recipe:
    stream = io.StringIO()
    YAML(typ="safe").dump(dict(values), stream)
    text = stream.getvalue()
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
    return load_recipe(path)


def setting_name(levels: Mapping[str, str], factors: Sequence[str]) -> str:
    """One setting in words: its levels, in the order of the factors."""
    return " · ".join(levels[factor] for factor in factors if factor in levels)
