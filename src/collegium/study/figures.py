"""The plots of a study: one point per setting and seed, so that a difference can be held against its spread."""

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
from collegium.study.sweep import Row, setting_name

WIDE = 10.4
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_LABEL_LENGTH = 44


def draw_figures(
    rows: Sequence[Row], figures: Sequence[FigureOptions], factors: Sequence[str]
) -> list[bytes | None]:
    """SVG bytes of each figure; None where no row has its measures."""
    kinds: dict[str, Callable[[Sequence[Row], FigureOptions, Sequence[str]], bytes | None]] = {
        "scatter": scatter,
        "lines": lines,
        "dots": dots,
    }
    with house_style():
        return [kinds[options.kind](rows, options, factors) for options in figures]


def by_setting(rows: Sequence[Row], factors: Sequence[str]) -> dict[str, list[Row]]:
    """The rows of each setting, in the order in which they are first met."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(setting_name(row["levels"], factors), []).append(row)
    return found


def measure_label(name: str) -> str:
    """A measure in words."""
    base, _, domain = name.partition("@")
    return MEASURES[base] + (f" on {domain}" if domain else "")


def correlations(rows: Sequence[Row], x: str, y: str, factors: Sequence[str]) -> dict[str, Any]:
    """Rank correlation of two measures over the settings: of the means over seeds, and of each seed by itself."""
    pairs = [(row["seed"], row["values"].get(x), row["values"].get(y)) for row in rows]
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for seed, one, other in pairs:
        if one is not None and other is not None:
            by_seed.setdefault(seed, []).append((one, other))
    means = []
    for group in by_setting(rows, factors).values():
        one, other = summarize(group, x).mean, summarize(group, y).mean
        if one is not None and other is not None:
            means.append((one, other))
    return {
        "settings": len(means),
        "means": spearman(*zip(*means, strict=True)) if means else None,
        "seeds": {seed: spearman(*zip(*found, strict=True)) for seed, found in by_seed.items()},
    }


def scatter(rows: Sequence[Row], options: FigureOptions, factors: Sequence[str]) -> bytes | None:
    """One point per setting and seed; each setting has a number, whose name stands in the legend."""
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
        for at, (seed, x, y) in enumerate(points):
            marker = MARKERS[seeds.index(seed) % len(MARKERS)]
            text = label(f"{number + 1}  {name}", MAX_LABEL_LENGTH) if at == 0 else None
            axes.scatter(x, y, color=color, marker=marker, s=42, label=text, zorder=3)
            axes.annotate(str(number + 1), (x, y), (5, 4), textcoords="offset points", fontsize=8)
    axes.set_title(_correlation_title(correlations(rows, options.x, options.y, factors)))
    axes.set(xlabel=measure_label(options.x), ylabel=measure_label(options.y))
    legend_below(figure, axes)
    return render(figure)


def _points(rows: Sequence[Row], options: FigureOptions) -> list[tuple[int, float, float]]:
    """(seed, x, y) of the rows that have both."""
    found = [
        (row["seed"], row["values"].get(options.x), row["values"].get(options.y)) for row in rows
    ]
    return [(seed, x, y) for seed, x, y in found if x is not None and y is not None]


def _correlation_title(found: Mapping[str, Any]) -> str:
    if found["means"] is None:
        return ""
    single = ", ".join(
        f"seed {seed}: {rho:+.2f}" for seed, rho in found["seeds"].items() if rho is not None
    )
    return f"Rank correlation over {found['settings']} settings: {found['means']:+.2f} ({single})"


def lines(rows: Sequence[Row], options: FigureOptions, factors: Sequence[str]) -> bytes | None:
    """A measure over the levels of a factor: the mean as a line, each seed as a dot."""
    known = [
        row for row in rows if _value(row, options.y) is not None and options.x in row["levels"]
    ]
    if not known:
        return None
    levels = list(dict.fromkeys(row["levels"][options.x] for row in known))
    places = _places(levels)
    groups: dict[str, list[Row]] = {}
    for row in known:
        groups.setdefault(row["levels"].get(options.by, ""), []).append(row)
    figure, (axes,) = new_figure(WIDE, 4.4)
    for number, (name, group) in enumerate(groups.items()):
        color = TEACHERS[number % len(TEACHERS)] if options.by else STUDENT
        by_level = {at: [r for r in group if r["levels"][options.x] == at] for at in levels}
        points = [
            (places[at], summarize(found, options.y).mean)
            for at, found in by_level.items()
            if found
        ]
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            marker="o",
            label=label(name or "mean", MAX_LABEL_LENGTH),
        )
        if len({row["seed"] for row in group}) > 1:
            for at, found in by_level.items():
                values = summarize(found, options.y).values
                axes.scatter([places[at]] * len(values), values, color=color, s=12, alpha=0.6)
    _level_axis(axes, levels, places)
    axes.set(xlabel=options.x, ylabel=measure_label(options.y))
    legend_below(figure, axes)
    return render(figure)


def _places(levels: Sequence[str]) -> dict[str, float]:
    """Where a level stands: at its number where all are numbers, else at its turn."""
    try:
        return {level: float(level) for level in levels}
    except ValueError:
        return {level: float(at) for at, level in enumerate(levels)}


def _level_axis(axes: Axes, levels: Sequence[str], places: Mapping[str, float]) -> None:
    values = [places[level] for level in levels]
    if min(values) > 0 and max(values) / min(values) >= 4:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()
    axes.set_xticks(values, [label(level, 18) for level in levels])


def dots(rows: Sequence[Row], options: FigureOptions, factors: Sequence[str]) -> bytes | None:
    """Every setting on a line of its own: the mean as a bar mark, each seed as a dot."""
    known = [row for row in rows if _value(row, options.y) is not None]
    if not known:
        return None
    groups = by_setting(known, factors)
    figure, (axes,) = new_figure(WIDE, 1.1 + 0.3 * len(groups))
    for place, group in enumerate(groups.values()):
        found = summarize(group, options.y)
        axes.scatter(found.values, [place] * len(found.values), color=STUDENT, s=26, zorder=3)
        if found.mean is not None:
            axes.scatter([found.mean], [place], color=MUTED, marker="|", s=220, zorder=2)
    axes.set_yticks(range(len(groups)), [label(name, MAX_LABEL_LENGTH) for name in groups])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(measure_label(options.y))
    return render(figure)


def _value(row: Row, measure: str) -> float | None:
    return row["values"].get(measure)
