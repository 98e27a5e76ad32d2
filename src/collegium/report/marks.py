"""The marks that plots are made of: curves over steps, stacked shares, heat maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from collegium.report import canvas
from collegium.report.canvas import label
from collegium.report.files import LogStep, Number

SMOOTH_FROM = 60
"""Curves with more points than this are drawn as a running mean over a faint line."""
MAX_DRAWN = 1e12
"""Larger values are not drawn."""
MAX_ANNOTATED = 14
"""Heat maps with more rows or columns than this carry no numbers."""


def curve(
    axes: Axes,
    log: Sequence[LogStep],
    read: Callable[[LogStep], Number],
    name: str,
    color: str,
    dash: str,
) -> None:
    """One value of the log over the steps; nothing when no step has it."""
    steps = np.array([line.step for line in log], dtype=float)
    values = array([read(line) for line in log])
    if not np.isfinite(values).any():
        return
    if len(values) > SMOOTH_FROM:
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.25)
        values = _running_mean(values, max(3, len(values) // 40))
    marker = "o" if len(values) <= 3 else None
    axes.plot(steps, values, color=color, linestyle=dash, marker=marker, label=label(name))


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    known = np.isfinite(values)
    kernel = np.ones(width)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    mean = np.full_like(values, np.nan)
    return np.divide(total, count, out=mean, where=known & (count > 0))


def array(values: Sequence[Number]) -> NDArray[np.float64]:
    """NaN, a gap in the curve, for what is not known or larger than any axis can show."""
    known = (math.nan if value is None or abs(value) > MAX_DRAWN else value for value in values)
    return np.array(list(known), dtype=float)


def keys(log: Sequence[LogStep], read: Callable[[LogStep], Mapping[str, Number]]) -> list[str]:
    """Names that have a value in at least one step, in the order in which they are first met."""
    return list(
        dict.fromkeys(key for line in log for key, value in read(line).items() if value is not None)
    )


def steps_axis(axes: Axes, steps: Iterable[int]) -> None:
    """Whole steps along the bottom; a single logged step is the only tick."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    if len(logged := set(steps)) == 1:
        axes.set_xticks(list(logged))


def legend(axes: Axes) -> None:
    """A legend inside the panel, where there is anything to tell apart."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, names, loc="best")


def stack(
    axes: Axes, steps: Sequence[int], shares: Mapping[str, Sequence[Number]], colors: Sequence[str]
) -> None:
    """Shares over the steps as stacked areas; a share that was not logged counts as zero."""
    values = np.nan_to_num(np.stack([array(column) for column in shares.values()]), nan=0.0)
    places = np.array(steps, dtype=float)
    if len(steps) == 1:
        # One logged step has no width: draw it as a bar.
        places, values = np.array([places[0] - 0.5, places[0] + 0.5]), np.repeat(values, 2, axis=1)
    polygons = axes.stackplot(places, values, colors=colors, edgecolor="white", linewidth=0.4)
    for polygon, name in zip(polygons, shares, strict=True):
        polygon.set_label(label(name))
    axes.set_xlim(places[0], places[-1])
    axes.set_ylim(0, max(1.0, float(values.sum(axis=0).max())))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False)
    steps_axis(axes, steps)


def heat_map(
    axes: Axes, table: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], form: str
) -> None:
    """A table as colors, with its numbers where they fit; NaN stays empty."""
    known = table[np.isfinite(table)]
    top = float(known.max()) if known.size else 1.0
    axes.imshow(np.ma.masked_invalid(table), cmap="Blues", vmin=0.0, vmax=top or 1.0, aspect="auto")
    is_crowded = max(len(columns), max(map(len, columns)) * len(columns) // 10) > 5
    axes.set_xticks(np.arange(len(columns)), columns)
    if is_crowded:
        for text in axes.get_xticklabels():
            text.set(rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(rows)), rows)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if max(table.shape) > MAX_ANNOTATED:
        return
    for (i, j), value in np.ndenumerate(table):
        if math.isfinite(value):
            color = "white" if value > 0.64 * top else canvas.INK
            axes.text(j, i, form.format(value), ha="center", va="center", color=color, fontsize=8.5)
