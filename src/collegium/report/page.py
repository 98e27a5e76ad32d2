"""`report.html`: a self-contained page about a run, rendered from the files in its folder."""

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
"""Number of preflight candidates above the fold."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A missing file, the report content that depends on it, and the command that creates it."""

    file: str
    holds: str
    command: str


@dataclass(frozen=True, slots=True)
class PageFigure:
    """One plot as the template shows it."""

    key: str
    title: str
    caption: str
    source: str
    # https://developer.mozilla.org/en-US/docs/Web/SVG/SVG_as_an_Image
    """A `data:` URL of the SVG. As an image, SVG cannot run scripts or load other files."""


def write_report(run_folder: Path) -> Path:
    """Write `report.html` atomically into a run folder, from the files there.

    Raises:
        CollegiumError: the folder is missing, a file in it is broken, or writing the page fails.
    """
    text = render_page(read_run(run_folder))
    path = run_folder / REPORT
    try:
        _write_atomic(path, text)
    except OSError as error:
        raise CollegiumError(
            f"{path}: cannot be written ({error}); must be in a writable folder; "
            "free a few MB or fix its permissions, then run `collegium report`"
        ) from error
    return path


def render_page(run: RunFiles) -> str:
    """Render the page as HTML without scripts or external resources, with every name escaped."""
    environment = Environment(
        loader=PackageLoader("collegium", "report"),
        # Names of teachers, domains and controls are untrusted text.
        autoescape=True,
        # A misspelled variable of the template raises instead of rendering as nothing.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        run=run,
        headline=headline_of(run),
        tiles=key_figures(run),
        figures=[
            PageFigure(plot.key, plot.title, plot.caption, _data_url(plot.svg))
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
        missing={missing.file: missing for missing in missing_files(run)},
    )


def missing_files(run: RunFiles) -> list[Missing]:
    """Return the files that the folder lacks, in the order of the stages."""
    files = [
        (run.recipe, Missing("recipe.yaml", "the resolved recipe", "check")),
        (run.environment, Missing("environment.json", "software versions and machine", "check")),
        (run.stages, Missing("stages.json", "the stage timings", "run")),
        (
            run.preflight,
            Missing("preflight.json", "the quality of teachers and fusions", "preflight"),
        ),
        (run.log, Missing("train/log.jsonl", "the training curves", "train")),
        (run.results, Missing("results.json", "the comparison of the models", "evaluate")),
    ]
    return [missing for value, missing in files if value is None]


def _data_url(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"


def _write_atomic(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            # fsync before the rename: after a crash, the old or the complete new page is there.
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp creates files with mode 0600. A report is as readable as the other files of a run.
        temporary.chmod(0o644)
        temporary.replace(path)
    # Also on KeyboardInterrupt: no temporary file may stay behind.
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
