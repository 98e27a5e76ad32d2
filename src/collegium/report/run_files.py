"""The files of a run folder that a report shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from collegium.errors import CollegiumError
from collegium.storage.records import (
    Environment,
    LogStep,
    PreflightReport,
    ResultRow,
    Stage,
    read_log,
    read_record,
)


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of a run that people look at. A missing file is None."""

    name: str
    """Name of the run folder."""
    recipe: str | None = None
    environment: Environment | None = None
    stages: Mapping[str, Stage] | None = None
    preflight: PreflightReport | None = None
    results: tuple[ResultRow, ...] | None = None
    log: tuple[LogStep, ...] | None = None
    controls: Mapping[str, tuple[LogStep, ...]] = field(default_factory=dict)
    """Training log of each control that has one, by folder name."""

    def teachers(self) -> tuple[str, ...]:
        """Return the names of all teachers in order of first appearance."""
        # Any of the files may be missing, so names are collected from all of them.
        names = dict.fromkeys(row.name for row in self.rows("teacher"))
        if self.preflight is not None:
            names |= dict.fromkeys(self.preflight.teachers)
        for line in self.log or ():
            names |= dict.fromkeys(line.teacher_weights)
        return tuple(names)

    def rows(self, *kinds: str) -> tuple[ResultRow, ...]:
        """Return the evaluation rows of these kinds, kind by kind."""
        return tuple(row for kind in kinds for row in self.results or () if row.kind == kind)

    def domains(self) -> tuple[str, ...]:
        """Return the names of all evaluated domains in order of first appearance."""
        return tuple(dict.fromkeys(name for row in self.results or () for name in row.domains))


def read_run(run_folder: Path) -> RunFiles:
    """Read the files that a run folder has.

    Raises:
        CollegiumError: the folder is missing, or a file does not match its format.
    """
    if not run_folder.is_dir():
        raise CollegiumError(
            f"{run_folder}: not found; must be a run folder; create one with `collegium run RECIPE`"
        )
    stages = read_record(run_folder / "stages.json", dict[str, Stage])
    logs = {
        folder.name: read_log(folder / "train" / "log.jsonl")
        for folder in sorted(run_folder.glob("controls/*/"))
    }
    # Training order, as in the stage log and in results.json: colors go by position.
    order = [name.removeprefix("control ") for name in stages or {}]
    names = sorted(logs, key=lambda name: order.index(name) if name in order else len(order))
    return RunFiles(
        name=run_folder.resolve().name,
        recipe=_read_recipe(run_folder / "recipe.yaml"),
        environment=read_record(run_folder / "environment.json", Environment),
        stages=stages,
        preflight=read_record(run_folder / "preflight.json", PreflightReport),
        results=read_record(run_folder / "results.json", tuple[ResultRow, ...]),
        log=read_log(run_folder / "train" / "log.jsonl"),
        controls={name: log for name in names if (log := logs[name]) is not None},
    )


def _read_recipe(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CollegiumError(f"{path}: cannot be read ({error}); must be a UTF-8 file") from error
