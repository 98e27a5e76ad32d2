"""HTML pages without scripts or external resources, and `report.html` of a run."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from collegium.errors import CollegiumError
from collegium.report import run_tables as tables
from collegium.report.draft_tables import acceptance_table, draft_table
from collegium.report.export_tables import export_notes, export_table
from collegium.report.formats import amount, duration, fixed, percent, perplexity, ratio
from collegium.report.headline import best, gap_closed, headline_of
from collegium.report.next_steps import next_steps
from collegium.report.plots import draw_all
from collegium.report.run_files import RunFiles, read_run
from collegium.report.samples import samples
from collegium.report.serving import serving_sentences, serving_table
from collegium.report.task_tables import domain_score_table, harness_table, task_notes, task_table
from collegium.storage.files import write_text

REPORT = "report.html"
# File, its content, and the command that creates it, in the order of the stages.
FILES = (
    ("recipe.yaml", "recipe", "the resolved recipe", "check"),
    ("environment.json", "environment", "software versions and machine", "check"),
    ("stages.json", "stages", "the stage timings", "run"),
    ("preflight.json", "preflight", "the quality of teachers and fusions", "preflight"),
    ("train/log.jsonl", "log", "the training curves", "train"),
    ("results.json", "results", "the comparison of the models", "evaluate"),
)


def write_report(run_folder: Path) -> Path:
    """Write `report.html` atomically into a run folder, from the files there.

    Raises:
        CollegiumError: the folder is missing, a file in it is broken, or writing the page fails.
    """
    text = render_run(read_run(run_folder))
    path = run_folder / REPORT
    try:
        write_text(path, text)
    except OSError as error:
        raise CollegiumError(
            f"{path}: cannot be written ({error}); must be in a writable folder; "
            "free a few MB or fix its permissions, then run `collegium report`"
        ) from error
    return path


def render_run(run: RunFiles) -> str:
    """Render the page of a run."""
    return render(
        "run.html",
        run=run,
        headline=headline_of(run),
        student=best(run.rows("student")),
        gap=gap_closed(run),
        teacher_sizes=[row.num_parameters for row in run.rows("teacher") if row.num_parameters],
        plots=draw_all(run),
        evaluation=tables.evaluation_table(run),
        domains=tables.domain_table(run),
        agreement=tables.agreement_table(run),
        acceptance=acceptance_table(run),
        draft=draft_table(run),
        tasks=task_table(run),
        domain_scores=domain_score_table(run),
        task_notes=list(task_notes(run)),
        harness=harness_table(run),
        teachers=tables.teacher_tables(run),
        chosen=tables.chosen_table(run),
        fusions=tables.fusion_tables(run),
        fitted=[t for c in run.measured.fusions if (t := tables.number_table(c.fusion)).lines],
        calibration=tables.calibration_tables(run),
        costs=tables.cost_table(run),
        exports=export_table(run),
        export_notes=list(export_notes(run)),
        serving=serving_table(run),
        serving_sentences=list(serving_sentences(run)),
        stages=tables.stage_table(run),
        total_seconds=sum(stage.seconds or 0.0 for stage in (run.stages or {}).values()),
        cost_note=tables.cost_note(run),
        samples=samples(run),
        next_steps=next_steps(run),
        environment=tables.environment_table(run),
        missing={file: rest for file, key, *rest in FILES if getattr(run, key) is None},
    )


def render(template: str, **values: Any) -> str:
    """Render a template of this folder as HTML, with every value escaped."""
    environment = Environment(
        loader=PackageLoader("collegium", "report"),
        # Names of teachers, domains and controls are untrusted text.
        autoescape=True,
        # A misspelled variable of the template raises instead of rendering as nothing.
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for write in (amount, duration, fixed, percent, perplexity, ratio):
        environment.filters[write.__name__] = write
    environment.filters["data_url"] = _data_url
    return environment.get_template(template).render(values)


def _data_url(svg: bytes) -> str:
    # As an image, SVG cannot run scripts or load other files:
    # https://developer.mozilla.org/en-US/docs/Web/SVG/SVG_as_an_Image
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"
