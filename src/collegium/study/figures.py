"""Plots of a study. Each seed is drawn, so that differences can be compared with the spread."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from collegium.report.canvas import house_style, label, legend_below, new_figure, render_svg
from collegium.report.colors import MUTED, STUDENT, TEACHERS
from collegium.storage.records import StudyRow
from collegium.study.measurements import by_setting, measure_label, seed_values, spearman
from collegium.study.options import FigureOptions

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_LABEL_LENGTH = 44
_NUMBERED = re.compile(r"^(?:(.*), )?(\w+) = (\d+)$")
"""Level of a series: its line, the name of the number, and the number."""


def draw_figures(
    rows: Sequence[StudyRow], figures: Sequence[FigureOptions], factors: Sequence[str]
) -> list[tuple[FigureOptions, bytes]]:
    """Return the options and the SVG of each figure that some row has the measures of."""
    kinds = {"scatter": scatter, "lines": lines, "series": series, "dots": dots}
    with house_style():
        drawn = [(options, kinds[options.kind](rows, options, factors)) for options in figures]
        return [(options, render_svg(figure)) for options, figure in drawn if figure is not None]


def correlation(
    rows: Sequence[StudyRow], options: FigureOptions, factors: Sequence[str]
) -> str | None:
    """Describe the rank correlation of x and y over settings, of seed means and per seed."""
    points = list(_points(rows, options))
    by_seed = {seed: [(x, y) for other, x, y in points if other == seed] for seed, _, _ in points}
    groups = by_setting(rows, factors).values()
    values = [(seed_values(group, options.x), seed_values(group, options.y)) for group in groups]
    means = [(fmean(xs), fmean(ys)) for xs, ys in values if xs and ys]
    # `preflight_predicts` has +0.98 for the means, +0.99 and +0.90 for its seeds.
    rho = spearman(*zip(*means, strict=True)) if means else None
    if rho is None:
        return None
    seeds = {seed: spearman(*zip(*pairs, strict=True)) for seed, pairs in by_seed.items()}
    texts = [f"seed {seed}: {value:+.2f}" for seed, value in seeds.items() if value is not None]
    return f"over {len(means)} settings: {rho:+.2f} ({', '.join(texts)})"


def scatter(
    rows: Sequence[StudyRow], options: FigureOptions, factors: Sequence[str]
) -> Figure | None:
    """Plot one point per setting and seed, numbered by setting as in the legend."""
    settings = by_setting(rows, factors).items()
    groups = {name: points for name, group in settings if (points := list(_points(group, options)))}
    if not groups:
        return None
    figure, (axes,) = new_figure(4.6 + 0.11 * len(groups))
    seeds = sorted({seed for points in groups.values() for seed, _, _ in points})
    for number, (name, points) in enumerate(groups.items()):
        color = TEACHERS[number % len(TEACHERS)]
        # Only the first point has a label, or the legend would repeat the setting per seed.
        text: str | None = label(f"{number + 1}  {name}", MAX_LABEL_LENGTH)
        for seed, x, y in points:
            marker = MARKERS[seeds.index(seed) % len(MARKERS)]
            axes.scatter(x, y, color=color, marker=marker, s=42, label=text, zorder=3)
            axes.annotate(str(number + 1), (x, y), (5, 4), textcoords="offset points", fontsize=8)
            text = None
    rho = correlation(rows, options, factors)
    axes.set_title(f"Rank correlation {rho}" if rho else "")
    axes.set(xlabel=measure_label(options.x), ylabel=measure_label(options.y))
    legend_below(figure, axes)
    return figure


def _points(rows: Sequence[StudyRow], options: FigureOptions) -> Iterator[tuple[int, float, float]]:
    """Yield (seed, x, y) of the rows that have both."""
    for row in rows:
        x, y = row.values.get(options.x), row.values.get(options.y)
        if x is not None and y is not None:
            yield row.seed, x, y


def lines(
    rows: Sequence[StudyRow], options: FigureOptions, factors: Sequence[str]
) -> Figure | None:
    """Plot a measure over the levels of a factor: the mean as a line, each seed as a dot."""
    rows = [r for r in rows if r.values.get(options.y) is not None and options.x in r.levels]
    if not rows:
        return None
    levels = list(dict.fromkeys(row.levels[options.x] for row in rows))
    positions = _positions(levels)
    figure, (axes,) = new_figure(4.4)
    for number, name in enumerate(dict.fromkeys(row.levels.get(options.by, "") for row in rows)):
        color = TEACHERS[number % len(TEACHERS)] if options.by else STUDENT
        group = [row for row in rows if row.levels.get(options.by, "") == name]
        points = []
        for level, x in positions.items():
            values = seed_values([r for r in group if r.levels[options.x] == level], options.y)
            if values:
                points.append((x, fmean(values)))
            # With one seed the dot would coincide with the mean.
            if len({row.seed for row in group}) > 1:
                axes.scatter([x] * len(values), values, color=color, s=12, alpha=0.6)
        text = label(name or "mean", MAX_LABEL_LENGTH)
        axes.plot(*zip(*points, strict=True), color=color, marker="o", label=text)
    _level_axis(axes, positions)
    axes.set(xlabel=options.x, ylabel=measure_label(options.y))
    legend_below(figure, axes)
    return figure


def series(
    rows: Sequence[StudyRow], options: FigureOptions, factors: Sequence[str]
) -> Figure | None:
    """Plot a measure over the numbers that end the names of levels, as `lines`."""
    numbered = [(row, match) for row in rows for match in _NUMBERED.findall(_last_level(row))]
    starts = list(dict.fromkeys(start for _, (start, _, _) in numbered if start)) or [""]
    x, by = next((name for _, (_, name, _) in numbered), ""), "series"
    shaped = [
        row.model_copy(update={"levels": {x: number, by: part}})
        for row, (start, _, number) in numbered
        for part in ([start] if start else starts)
    ]
    return lines(shaped, replace(options, x=x, by=by), factors)


def _last_level(row: StudyRow) -> str:
    return list(row.levels.values())[-1]


def _positions(levels: Sequence[str]) -> dict[str, float]:
    """Return the position of each level: its value if all are numbers, else its index."""
    try:
        return {level: float(level) for level in levels}
    except ValueError:
        return {level: float(index) for index, level in enumerate(levels)}


def _level_axis(axes: Axes, positions: Mapping[str, float]) -> None:
    low, high = min(positions.values()), max(positions.values())
    # Levels such as 10, 25, 50, 100 would crowd at the left of a linear axis; 1 to 5 do not.
    if low > 0 and high / low >= 8:
        axes.set_xscale("log")
        # Minor ticks would put labels between the levels.
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    axes.set_xticks(list(positions.values()), [label(level, 18) for level in positions])


def dots(rows: Sequence[StudyRow], options: FigureOptions, factors: Sequence[str]) -> Figure | None:
    """Plot each setting on its own line: the mean as a vertical mark, each seed as a dot."""
    rows = [row for row in rows if row.values.get(options.y) is not None]
    if not rows:
        return None
    groups = by_setting(rows, factors)
    figure, (axes,) = new_figure(1.1 + 0.3 * len(groups))
    for position, group in enumerate(groups.values()):
        values = seed_values(group, options.y)
        axes.scatter(values, [position] * len(values), color=STUDENT, s=26, zorder=3)
        axes.scatter(fmean(values), position, color=MUTED, marker="|", s=220, zorder=2)
    axes.set_yticks(range(len(groups)), [label(name, MAX_LABEL_LENGTH) for name in groups])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(measure_label(options.y))
    return figure
