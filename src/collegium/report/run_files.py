"""The files of a run folder that a report shows."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from collegium.errors import CollegiumError
from collegium.storage import records
from collegium.storage.stages import STAGES, damage, read_stages

LOG = "train/log.jsonl"
HARNESS = "harness.json"
SAMPLES = "samples.json"
MEASURE = "measure.json"
DRAFT = "draft.json"
CONTINUATION = "continuation"
"""Name of the suite of held-out continuations."""


OfStudent = TypeVar(
    "OfStudent",
    records.HarnessResults,
    records.DraftResults,
    records.Measurements,
    records.ExportInfo,
)


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of a run that people look at. A missing file is None."""

    name: str
    """Name of the run folder."""
    folder: str = ""
    """Path of the run folder, for commands."""
    recipe: str | None = None
    environment: records.Environment | None = None
    stages: Mapping[str, records.Stage] | None = None
    preflight: records.PreflightReport | None = None
    results: tuple[records.ResultRow, ...] | None = None
    log: tuple[records.LogStep, ...] | None = None
    controls: Mapping[str, tuple[records.LogStep, ...]] = field(default_factory=dict)
    """Training log of each control that has one, by folder name."""
    suites: Mapping[str, records.TaskResults] = field(default_factory=dict)
    """Scores of generated text, by `continuation` and the names of the tasks of the recipe."""
    samples: records.TaskResults | None = None
    """Greedy continuations with their texts."""
    num_samples: int = 0
    """Prompts to show of them."""
    harness: records.HarnessResults | None = None
    draft: records.DraftResults | None = None
    measurements: records.Measurements | None = None
    exports: tuple[records.ExportInfo, ...] = ()
    """Those of the current student, by name."""

    def measured_models(self, *kinds: str) -> tuple[records.MeasuredModel, ...]:
        """Return the models that were measured for serving, kind by kind."""
        models = self.measurements.models if self.measurements else ()
        return tuple(model for kind in kinds for model in models if model.kind == kind)

    @property
    def measured(self) -> records.PreflightReport:
        """The preflight, without any figures if it is missing."""
        return self.preflight or records.PreflightReport()

    def teachers(self) -> tuple[str, ...]:
        """Return the names of all teachers in order of first appearance."""
        # Any of the files may be missing, so names are collected from all of them.
        names = [row.name for row in self.rows("teacher")]
        logged = itertools.chain(*(line.teacher_weights for line in self.log or ()))
        return tuple(dict.fromkeys([*names, *self.measured.teachers, *logged]))

    def rows(self, *kinds: str) -> tuple[records.ResultRow, ...]:
        """Return the evaluation rows of these kinds, kind by kind."""
        return tuple(row for kind in kinds for row in self.results or () if row.kind == kind)


def read_run(run_folder: Path) -> RunFiles:
    """Read the files that a run folder has.

    Raises:
        CollegiumError: the folder is missing, or a file does not match its format.
    """
    if not run_folder.is_dir():
        raise CollegiumError(
            f"{run_folder}: not found; must be a run folder; create one with `collegium run RECIPE`"
        )
    stages, damaged = read_stages(run_folder)
    for name in damaged:
        raise CollegiumError(
            f"{run_folder / STAGES}: {name}: fails its sha256; must be as its stage wrote it; "
            "repeat that stage with `collegium run RECIPE`"
        )
    names = [path.parent.name for path in run_folder.glob("controls/*/train")]
    # Training order, as in the stage log and in results.json: colors go by position. A copy of a
    # folder is no control.
    order = [name.removeprefix("control ") for name in stages]
    controls = [n for n in order if n in names] if stages else sorted(names)
    logs = {name: f"controls/{name}/train/log.jsonl" for name in controls}
    read = records.read_record
    recipe = read(run_folder / "recipe.json", dict[str, Any]) or {}
    suites, options = _suite_files(recipe), recipe.get("evaluate") or {}
    is_greedy = (options.get("generation") or {}).get("temperature") == 0
    samples = suites[CONTINUATION] if is_greedy else SAMPLES
    files = ["preflight.json", "results.json", LOG, *logs.values(), *suites.values()]
    files += [samples, HARNESS, DRAFT, MEASURE]
    _require_intact(run_folder, stages, files)
    return RunFiles(
        name=run_folder.resolve().name,
        folder=run_folder.as_posix(),
        recipe=_read_recipe(run_folder / "recipe.yaml"),
        environment=read(run_folder / "environment.json", records.Environment),
        stages=read(run_folder / STAGES, dict[str, records.Stage]),
        preflight=read(run_folder / "preflight.json", records.PreflightReport),
        results=read(run_folder / "results.json", tuple[records.ResultRow, ...]),
        log=records.read_log(run_folder / LOG),
        controls={
            n: log for n, file in logs.items() if (log := records.read_log(run_folder / file))
        },
        suites={
            name: results
            for name, file in suites.items()
            if (results := read(run_folder / file, records.TaskResults))
        },
        samples=read(run_folder / samples, records.TaskResults),
        num_samples=options.get("samples", 0),
        harness=_current(read(run_folder / HARNESS, records.HarnessResults), stages),
        draft=_current(read(run_folder / DRAFT, records.DraftResults), stages),
        measurements=_current(read(run_folder / MEASURE, records.Measurements), stages),
        exports=tuple(
            info
            for path in sorted(run_folder.glob("exports/*/export.json"))
            if (info := _current(read(path, records.ExportInfo), stages))
        ),
    )


def _current(result: OfStudent | None, stages: Mapping[str, records.Stage]) -> OfStudent | None:
    """Drop the scores and measurements of an earlier student."""
    trained = stages.get("train", records.Stage()).files or {}
    manifest = trained.get("student/MANIFEST.json")
    return result if result and manifest and result.student == manifest.sha256 else None


def _suite_files(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return the file of each suite that the recipe asks for: others are of an earlier one."""
    options = recipe.get("evaluate") or {}
    generation = {CONTINUATION: "generation.json"} if options.get("generation") else {}
    return generation | {name: f"tasks/{name}.json" for name in options.get("tasks") or ()}


def _require_intact(
    run_folder: Path, stages: Mapping[str, records.Stage], files: Collection[str]
) -> None:
    """Check that these files are those that the finished stages wrote, where they did."""
    for name, stage in stages.items():
        recorded = {file: digest for file, digest in (stage.files or {}).items() if file in files}
        if problem := damage(run_folder, recorded):
            raise CollegiumError(
                f"{run_folder}: {problem}; must be as the stage `{name}` wrote it; repeat that "
                "stage with `collegium run RECIPE`"
            )


def _read_recipe(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CollegiumError(f"{path}: cannot be read ({error}); must be a UTF-8 file") from error
