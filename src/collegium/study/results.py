"""Page of a study and its tables: mean ± standard deviation over the seeds of each setting."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from collegium.report.formats import fixed
from collegium.report.page import REPORT, render
from collegium.report.tables import Column, Line, Table
from collegium.run.folder import environment
from collegium.storage.files import write_text
from collegium.storage.records import StudyRow
from collegium.study.comparison import comparison_table, contrast_table
from collegium.study.figures import correlation, draw_figures
from collegium.study.measurements import (
    TASK_MODELS,
    Measure,
    by_setting,
    measure_label,
    measure_of,
    seed_values,
)
from collegium.study.options import StudyOptions


def write_page(
    study: StudyOptions, rows: Sequence[StudyRow], folder: Path, *, text: str
) -> tuple[Path, list[Table[Any]]]:
    """Write report.html, table.md and figure-N.svg of a study. Return the page and its tables.

    Args:
        study: the study.
        rows: rows of all its runs.
        folder: output folder.
        text: contents of the study file, shown on the page.
    """
    factors = factor_names(study, rows)
    tables = study_tables(study, rows)
    plots = draw_figures(rows, study.figures, factors)
    # Plain files beside the page: docs/results embeds copies of them.
    for number, (_, svg) in enumerate(plots, start=1):
        write_text(folder / f"figure-{number}.svg", svg.decode("utf-8"))
    facts = [
        f"Rank correlation of {measure_label(figure.x)} and {measure_label(figure.y)} {rho}."
        for figure in study.figures
        if figure.kind == "scatter" and (rho := correlation(rows, figure, factors))
    ]
    markdown = [f"### {table.title}\n\n{table.markdown()}" for table in tables]
    write_text(folder / "table.md", "\n\n".join([*facts, *markdown]) + "\n")
    machine = environment()
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    page = render(
        "study.html",
        study=study,
        facts=facts,
        tables=tables,
        plots=[(o.title or measure_label(o.y), o.caption, svg) for o, svg in plots],
        # Without students, a run has several rows.
        num_runs=len({row.folder for row in rows}),
        text=text,
        machine=f"{machine.processor}, {machine.cpus} cores; Python {machine.python}, {versions}",
    )
    write_text(folder / REPORT, page)
    return folder / REPORT, tables


def factor_names(study: StudyOptions, rows: Sequence[StudyRow]) -> list[str]:
    """Return the factors of the study, then those that its runs added."""
    return list(dict.fromkeys([*study.factors, *(name for row in rows for name in row.levels)]))


def study_tables(study: StudyOptions, rows: Sequence[StudyRow]) -> list[Table[Any]]:
    """Return a table of all settings, of their comparisons with a baseline, and of its contrasts.

    For two factors, one pivot table per measure precedes it.
    """
    factors = factor_names(study, rows)
    columns = [_column(measure_label(name), name, lambda group: group) for name in study.measures]
    lines = [Line(name, group) for name, group in by_setting(rows, factors).items()]
    tables: list[Table[Any]] = [Table("All settings", " · ".join(factors), columns, lines)]
    if len(study.factors) == 2 and study.students:
        across, down = factors[:2]
        tables[:0] = [pivot_table(rows, m, down=down, across=across) for m in study.measures]
    if any(name.startswith("task_") for row in rows for name in row.values):
        tables.append(task_table(rows, factors))
    if study.baseline:
        tables.append(comparison_table(rows, factors, study.baseline))
    if study.contrasts:
        tables.append(contrast_table(rows, factors, study.contrasts, study.baseline))
    return tables


def pivot_table(
    rows: Sequence[StudyRow], measure: str, *, down: str, across: str
) -> Table[list[StudyRow]]:
    """Return one measure of two factors, with a line per `down` level and a column per `across`."""
    columns = [
        _column(x, measure, lambda group, x=x: [r for r in group if r.levels.get(across) == x])
        for x in by_setting(rows, [across])
    ]
    lines = [Line(y, group) for y, group in by_setting(rows, [down]).items()]
    return Table(measure_label(measure), f"{down} \\ {across}", columns, lines)


def task_table(
    rows: Sequence[StudyRow], factors: Sequence[str]
) -> Table[tuple[str, list[StudyRow]]]:
    """Return the scores of the best teacher, the fused target and the student of each setting."""
    names = dict.fromkeys(n for row in rows for n in row.values if n.startswith("task_"))
    columns: list[Column[tuple[str, list[StudyRow]]]] = [
        Column(
            measure_label(name),
            lambda line, name=name: seed_values(line[1], line[0] + name) or None,
            partial(_with_deviation, measure_of(name)),
        )
        for name in names
    ]
    lines = [
        Line(f"{setting}: {label}", (prefix, group))
        for setting, group in by_setting(rows, factors).items()
        for prefix, (_, label) in TASK_MODELS.items()
    ]
    return Table("Tasks", "Setting and model", columns, lines)


def _column(
    title: str, measure: str, select: Callable[[list[StudyRow]], list[StudyRow]]
) -> Column[list[StudyRow]]:
    options = measure_of(measure)

    def read(group: list[StudyRow]) -> list[float] | None:
        return seed_values(select(group), measure) or None

    write = partial(_with_deviation, options)
    return Column(title, read, write, statistics.fmean if options.is_lower_better else None)


def _with_deviation(measure: Measure, values: list[float] | None) -> str:
    text = measure.write(statistics.fmean(values) if values else None)
    if values is None or len(values) < 2:
        return text
    return f"{text} ± {fixed(statistics.stdev(values), measure.digits)}"
