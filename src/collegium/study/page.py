"""Page of a study, and its tables as Markdown: question, results and the study file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from collegium.run.folder import environment
from collegium.storage.files import write_text
from collegium.study.figures import correlations, draw_figures, measure_label
from collegium.study.options import StudyOptions
from collegium.study.sweep import StudyRow
from collegium.study.tables import StudyTable, pivot_table, setting_table


@dataclass(frozen=True)
class StudyFigure:
    """A figure as the page shows it."""

    title: str
    caption: str
    svg: bytes

    @property
    def source(self) -> str:
        """A `data:` URL. As an image, SVG cannot run scripts."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode('ascii')}"


def write_page(study: StudyOptions, rows: Sequence[StudyRow], folder: Path, *, text: str) -> Path:
    """Write report.html, table.md and figure-N.svg into a study folder, and return the page path.

    Args:
        study: the study.
        rows: rows of all its runs.
        folder: output folder.
        text: contents of the study file, shown on the page.
    """
    factors = factor_names(study, rows)
    tables = study_tables(study, rows)
    figures = _figures(study, rows, factors)
    # Plain files beside the page: docs/results embeds copies of them.
    for number, figure in enumerate(figures, start=1):
        write_text(folder / f"figure-{number}.svg", figure.svg.decode("utf-8"))
    facts = facts_of(study, rows)
    markdown = [f"### {table.title}\n\n{table.markdown()}" for table in tables]
    write_text(folder / "table.md", "\n\n".join([*facts, *markdown]) + "\n")
    pages = Environment(
        loader=PackageLoader("collegium", "study"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = pages.get_template("page.html").render(
        study=study,
        facts=facts,
        tables=tables,
        figures=figures,
        # Without students, a run has several rows.
        num_runs=len({row["folder"] for row in rows}),
        text=text,
        machine=_machine(environment()),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def factor_names(study: StudyOptions, rows: Sequence[StudyRow]) -> list[str]:
    """Return the factors of the study, then those that its runs added."""
    names = dict.fromkeys(study.factors)
    for row in rows:
        names.update(dict.fromkeys(row["levels"]))
    return list(names)


def study_tables(study: StudyOptions, rows: Sequence[StudyRow]) -> list[StudyTable]:
    """Return a table of all settings, preceded for two factors by one pivot table per measure."""
    factors = factor_names(study, rows)
    tables = [setting_table(rows, study.measures, factors)]
    if len(study.factors) == 2 and study.students:
        down, across = factors[1], factors[0]
        pivots = [pivot_table(rows, name, down=down, across=across) for name in study.measures]
        return [*pivots, *tables]
    return tables


def facts_of(study: StudyOptions, rows: Sequence[StudyRow]) -> list[str]:
    """Return one sentence per scatter plot, with its rank correlation."""
    factors = factor_names(study, rows)
    facts = []
    for figure in study.figures:
        if figure.kind != "scatter":
            continue
        rho = correlations(rows, figure.x, figure.y, factors)
        if rho["means"] is None:
            continue
        seeds = ", ".join(f"{value:+.2f}" for value in rho["seeds"].values() if value is not None)
        facts.append(
            f"Rank correlation of {measure_label(figure.x)} and {measure_label(figure.y)} "
            f"over {rho['settings']} settings: {rho['means']:+.2f} (by seed: {seeds})."
        )
    return facts


def _figures(
    study: StudyOptions, rows: Sequence[StudyRow], factors: Sequence[str]
) -> list[StudyFigure]:
    plots = draw_figures(rows, study.figures, factors)
    return [
        StudyFigure(options.title or measure_label(options.y), options.caption, svg)
        for options, svg in zip(study.figures, plots, strict=True)
        if svg is not None
    ]


def _machine(info: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in info["packages"].items())
    return f"{info['processor']}, {info['cpus']} cores; Python {info['python']}, {versions}"
