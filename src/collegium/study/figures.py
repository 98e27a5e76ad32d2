"""Plots of a study. Each seed is drawn, so that differences can be compared with the spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from collegium.report.canvas import (
    MUTED,
    STUDENT,
    TEACHERS,
    house_style,
    label,
    legend_below,
    new_figure,
    render,
)
from collegium.study.measurements import spearman, summarize
from collegium.study.options import MEASURES, FigureOptions
from collegium.study.sweep import StudyRow, setting_name

WIDE = 10.4
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_LABEL_LENGTH = 44


def draw_figures(
    rows: Sequence[StudyRow], figures: Sequence[FigureOptions], factors: Sequence[str]
) -> list[bytes | None]:
    """Return each figure as SVG bytes, or None where no row has its measures."""
    kinds: dict[str, Callable[[Sequence[StudyRow], FigureOptions, Sequence[str]], bytes | None]] = {
        "scatter": scatter,
        "lines": lines,
        "dots": dots,
    }
    with house_style():
        return [kinds[options.kind](rows, options, factors) for options in figures]


def by_setting(rows: Sequence[StudyRow], factors: Sequence[str]) -> dict[str, list[StudyRow]]:
    """Group the rows by setting, in order of first appearance."""
    groups: dict[str, list[StudyRow]] = {}
    for row in rows:
        groups.setdefault(setting_name(row["levels"], factors), []).append(row)
    return groups


def measure_label(name: str) -> str:
    """Return the label of a measure, such as `NLL of the student on code`."""
    base, _, domain = name.partition("@")
    return MEASURES[base] + (f" on {domain}" if domain else "")


def correlations(
    rows: Sequence[StudyRow], x: str, y: str, factors: Sequence[str]
) -> dict[str, Any]:
    """Return the rank correlation of two measures over settings, of seed means and per seed."""
    pairs = [(row["seed"], row["values"].get(x), row["values"].get(y)) for row in rows]
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for seed, x_value, y_value in pairs:
        if x_value is not None and y_value is not None:
            by_seed.setdefault(seed, []).append((x_value, y_value))
    means = []
    for group in by_setting(rows, factors).values():
        x_mean, y_mean = summarize(group, x).mean, summarize(group, y).mean
        if x_mean is not None and y_mean is not None:
            means.append((x_mean, y_mean))
    # `preflight_predicts` has +0.98 for the means, +0.99 and +0.90 for its seeds.
    return {
        "settings": len(means),
        "means": spearman(*zip(*means, strict=True)) if means else None,
        "seeds": {seed: spearman(*zip(*xy, strict=True)) for seed, xy in by_seed.items()},
    }


def scatter(
    rows: Sequence[StudyRow], options: FigureOptions, factors: Sequence[str]
) -> bytes | None:
    """Plot one point per setting and seed, numbered by setting as in the legend."""
    groups = {
        name: points
        for name, group in by_setting(rows, factors).items()
        if (points := _points(group, options))
    }
    if not groups:
        return None
    figure, (axes,) = new_figure(WIDE, 4.6 + 0.11 * len(groups))
    seeds = sorted({seed for points in groups.values() for seed, _, _ in points})
    for number, (name, points) in enumerate(groups.items()):
        color = TEACHERS[number % len(TEACHERS)]
        for i, (seed, x, y) in enumerate(points):
            marker = MARKERS[seeds.index(seed) % len(MARKERS)]
            # Only the first point has a label, or the legend would repeat the setting per seed.
            text = label(f"{number + 1}  {name}", MAX_LABEL_LENGTH) if i == 0 else None
            axes.scatter(x, y, color=color, marker=marker, s=42, label=text, zorder=3)
            axes.annotate(str(number + 1), (x, y), (5, 4), textcoords="offset points", fontsize=8)
    axes.set_title(_correlation_title(correlations(rows, options.x, options.y, factors)))
    axes.set(xlabel=measure_label(options.x), ylabel=measure_label(options.y))
    legend_below(figure, axes)
    return render(figure)


def _points(rows: Sequence[StudyRow], options: FigureOptions) -> list[tuple[int, float, float]]:
    """Return (seed, x, y) of the rows that have both."""
    points = [
        (row["seed"], row["values"].get(options.x), row["values"].get(options.y)) for row in rows
    ]
    return [(seed, x, y) for seed, x, y in points if x is not None and y is not None]


def _correlation_title(rho: Mapping[str, Any]) -> str:
    if rho["means"] is None:
        return ""
    single = ", ".join(
        f"seed {seed}: {value:+.2f}" for seed, value in rho["seeds"].items() if value is not None
    )
    return f"Rank correlation over {rho['settings']} settings: {rho['means']:+.2f} ({single})"


def lines(rows: Sequence[StudyRow], options: FigureOptions, factors: Sequence[str]) -> bytes | None:
    """Plot a measure over the levels of a factor: the mean as a line, each seed as a dot."""
    measured = [
        row for row in rows if _value(row, options.y) is not None and options.x in row["levels"]
    ]
    if not measured:
        return None
    levels = list(dict.fromkeys(row["levels"][options.x] for row in measured))
    positions = _positions(levels)
    groups: dict[str, list[StudyRow]] = {}
    for row in measured:
        groups.setdefault(row["levels"].get(options.by, ""), []).append(row)
    figure, (axes,) = new_figure(WIDE, 4.4)
    for number, (name, group) in enumerate(groups.items()):
        color = TEACHERS[number % len(TEACHERS)] if options.by else STUDENT
        by_level = {x: [r for r in group if r["levels"][options.x] == x] for x in levels}
        points = [
            (positions[x], summarize(level_rows, options.y).mean)
            for x, level_rows in by_level.items()
            if level_rows
        ]
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            marker="o",
            label=label(name or "mean", MAX_LABEL_LENGTH),
        )
        # With one seed the dot would coincide with the mean.
        if len({row["seed"] for row in group}) > 1:
            for x, level_rows in by_level.items():
                values = summarize(level_rows, options.y).values
                axes.scatter([positions[x]] * len(values), values, color=color, s=12, alpha=0.6)
    _level_axis(axes, levels, positions)
    axes.set(xlabel=options.x, ylabel=measure_label(options.y))
    legend_below(figure, axes)
    return render(figure)


def _positions(levels: Sequence[str]) -> dict[str, float]:
    """Return the position of each level: its value if all are numbers, else its index."""
    try:
        return {level: float(level) for level in levels}
    except ValueError:
        return {level: float(index) for index, level in enumerate(levels)}


def _level_axis(axes: Axes, levels: Sequence[str], positions: Mapping[str, float]) -> None:
    values = [positions[level] for level in levels]
    # Levels such as 10, 25, 50, 100 would crowd at the left of a linear axis.
    if min(values) > 0 and max(values) / min(values) >= 4:
        axes.set_xscale("log")
        # Minor ticks would put labels between the levels.
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    axes.set_xticks(values, [label(level, 18) for level in levels])


def dots(rows: Sequence[StudyRow], options: FigureOptions, factors: Sequence[str]) -> bytes | None:
    """Plot each setting on its own line: the mean as a vertical mark, each seed as a dot."""
    measured = [row for row in rows if _value(row, options.y) is not None]
    if not measured:
        return None
    groups = by_setting(measured, factors)
    figure, (axes,) = new_figure(WIDE, 1.1 + 0.3 * len(groups))
    for position, group in enumerate(groups.values()):
        seeds = summarize(group, options.y)
        axes.scatter(seeds.values, [position] * len(seeds.values), color=STUDENT, s=26, zorder=3)
        if seeds.mean is not None:
            axes.scatter([seeds.mean], [position], color=MUTED, marker="|", s=220, zorder=2)
    axes.set_yticks(range(len(groups)), [label(name, MAX_LABEL_LENGTH) for name in groups])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(measure_label(options.y))
    return render(figure)


def _value(row: StudyRow, measure: str) -> float | None:
    return row["values"].get(measure)
