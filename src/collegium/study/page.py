"""The page of a study, and its tables as Markdown: what was asked, what came out, and the file that asks it again."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from collegium.run_folder import environment, write_text
from collegium.study.figures import correlations, draw_figures, measure_label
from collegium.study.options import StudyOptions
from collegium.study.sweep import Row
from collegium.study.tables import StudyTable, pivot_table, setting_table


@dataclass(frozen=True)
class Drawn:
    """A figure as the page shows it."""

    title: str
    caption: str
    svg: bytes

    @property
    def source(self) -> str:
        """A `data:` address; an image runs no script."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode('ascii')}"


def write_page(study: StudyOptions, rows: Sequence[Row], folder: Path, *, text: str) -> Path:
    """Write report.html, table.md and figure-N.svg into the folder of a study; returns the page.

    Args:
        study: the study.
        rows: those of all its runs.
        folder: where to write.
        text: the file of the study, as it was given.
    """
    factors = factor_names(study, rows)
    found = study_tables(study, rows)
    drawn = _figures(study, rows, factors)
    for number, figure in enumerate(drawn, start=1):
        write_text(folder / f"figure-{number}.svg", figure.svg.decode("utf-8"))
    facts = facts_of(study, rows)
    markdown = [f"### {table.title}\n\n{table.markdown()}" for table in found]
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
        tables=found,
        figures=drawn,
        num_runs=len({row["folder"] for row in rows}),
        text=text,
        machine=_machine(environment()),
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def factor_names(study: StudyOptions, rows: Sequence[Row]) -> list[str]:
    """The factors of the study, then those that its runs brought."""
    found = dict.fromkeys(study.factors)
    for row in rows:
        found.update(dict.fromkeys(row["levels"]))
    return list(found)


def study_tables(study: StudyOptions, rows: Sequence[Row]) -> list[StudyTable]:
    """One table over all settings; with two factors, also one per measure with one factor down and one across."""
    factors = factor_names(study, rows)
    tables = [setting_table(rows, study.measures, factors)]
    if len(study.factors) == 2 and study.students:
        down, across = factors[1], factors[0]
        pivots = [pivot_table(rows, name, down=down, across=across) for name in study.measures]
        return [*pivots, *tables]
    return tables


def facts_of(study: StudyOptions, rows: Sequence[Row]) -> list[str]:
    """What the scatter plots say in one sentence each."""
    factors = factor_names(study, rows)
    found = []
    for figure in study.figures:
        if figure.kind != "scatter":
            continue
        rho = correlations(rows, figure.x, figure.y, factors)
        if rho["means"] is None:
            continue
        seeds = ", ".join(f"{value:+.2f}" for value in rho["seeds"].values() if value is not None)
        found.append(
            f"Rank correlation of {measure_label(figure.x)} and {measure_label(figure.y)} over {rho['settings']} settings: "
            f"{rho['means']:+.2f} (seed by seed: {seeds})."
        )
    return found


def _figures(study: StudyOptions, rows: Sequence[Row], factors: Sequence[str]) -> list[Drawn]:
    drawn = draw_figures(rows, study.figures, factors)
    return [
        Drawn(options.title or measure_label(options.y), options.caption, svg)
        for options, svg in zip(study.figures, drawn, strict=True)
        if svg is not None
    ]


def _machine(found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    return f"{found['processor']}, {found['cpus']} cores; Python {found['python']}, {versions}"
