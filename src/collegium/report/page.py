"""`report.html`: one self-contained page about a run, made from its folder alone."""

from __future__ import annotations

import base64
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from collegium.errors import CollegiumError
from collegium.report import preflight_tables, tables
from collegium.report.files import RunFiles, read_run
from collegium.report.headline import gap_closed, headline_of, key_figures
from collegium.report.plots import draw_all

__all__ = ["RunFiles", "read_run", "render_page", "write_report"]

REPORT = "report.html"
SHOWN_FUSIONS = 10
"""Candidates of a preflight beyond these are folded away."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A file the run folder does not have, what the report lacks without it, and what makes it."""

    file: str
    holds: str
    command: str


@dataclass(frozen=True, slots=True)
class Figure:
    """One plot as the template shows it."""

    key: str
    title: str
    caption: str
    source: str
    """A `data:` address of the SVG; an image runs no script."""


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder, from its files alone; whole or not at all.

    Raises:
        CollegiumError: the folder is missing, a file of it is broken, or the page cannot be written.
    """
    text = render_page(read_run(run_folder))
    path = run_folder / REPORT
    try:
        _write_whole(path, text)
    except OSError as error:
        raise CollegiumError(
            f"{path}: cannot be written ({error}); must be a folder with room for a few MB; "
            "free some space or mend its permissions, then do `collegium report`"
        ) from error
    return path


def render_page(run: RunFiles) -> str:
    """The page as HTML: no script, nothing loaded from elsewhere, every name of the run escaped."""
    environment = Environment(
        loader=PackageLoader("collegium", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        run=run,
        verdict=headline_of(run),
        tiles=key_figures(run),
        figures=[
            Figure(plot.key, plot.title, plot.caption, _data_address(plot.svg))
            for plot in draw_all(run)
        ],
        evaluation=tables.evaluation_table(run),
        domains=tables.domain_table(run),
        agreement=tables.agreement_table(run),
        teachers=preflight_tables.teacher_table(run),
        fusions=preflight_tables.fusion_table(run, slice(SHOWN_FUSIONS)),
        more_fusions=preflight_tables.fusion_table(run, slice(SHOWN_FUSIONS, None)),
        calibration=preflight_tables.calibration_table(run),
        sizes=tables.size_table(run),
        costs=tables.cost_table(run),
        stages=tables.stage_table(run),
        environment=tables.environment_table(run),
        gap=gap_closed(run),
        missing={one.file: one for one in missing_files(run)},
    )


def missing_files(run: RunFiles) -> list[Missing]:
    """What the folder lacks, in the order of the stages."""
    found = [
        (run.recipe, Missing("recipe.yaml", "the resolved recipe", "check")),
        (run.environment, Missing("environment.json", "versions and machine", "check")),
        (run.stages, Missing("stages.json", "the time of each stage", "run")),
        (
            run.preflight,
            Missing("preflight.json", "what the teachers know, alone and fused", "preflight"),
        ),
        (run.log, Missing("train/log.jsonl", "the course of the training", "train")),
        (run.results, Missing("results.json", "the comparison of the models", "evaluate")),
    ]
    return [missing for value, missing in found if value is None]


def _data_address(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"


def _write_whole(path: Path, text: str) -> None:
    """Write beside the target, make it durable, and rename: a reader sees the old page or the new one."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes the file private; a report is as readable as any other file of the run.
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
