"""Plot elements: curves over steps, stacked shares and heat maps."""

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
"""Curves with more points are drawn as a running mean over a faint line."""
# A diverged run can log 1e300, and one such point would flatten every curve of the panel.
MAX_DRAWN = 1e12
"""Larger values are not drawn."""
MAX_ANNOTATED = 14
"""Heat maps with more rows or columns show no numbers."""


def curve(
    axes: Axes,
    log: Sequence[LogStep],
    read: Callable[[LogStep], Number],
    name: str,
    color: str,
    dash: str,
) -> None:
    """Plot one value of the log over the steps. A no-op if no step has it."""
    steps = np.array([line.step for line in log], dtype=float)
    values = array([read(line) for line in log])
    if not np.isfinite(values).any():
        return
    if len(values) > SMOOTH_FROM:
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.25)
        values = _running_mean(values, max(3, len(values) // 40))
    # A line through a single point is invisible.
    marker = "o" if len(values) <= 3 else None
    axes.plot(steps, values, color=color, linestyle=dash, marker=marker, label=label(name))


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    # Divided by the finite values in the window: a gap neither spreads nor lowers the mean.
    is_finite = np.isfinite(values)
    kernel = np.ones(width)
    total = np.convolve(np.where(is_finite, values, 0.0), kernel, mode="same")
    count = np.convolve(is_finite.astype(float), kernel, mode="same")
    mean = np.full_like(values, np.nan)
    return np.divide(total, count, out=mean, where=is_finite & (count > 0))


def array(values: Sequence[Number]) -> NDArray[np.float64]:
    """Convert to float64, with NaN (a gap in the curve) for missing and oversized values."""
    drawable = (math.nan if value is None or abs(value) > MAX_DRAWN else value for value in values)
    return np.array(list(drawable), dtype=float)


def keys(log: Sequence[LogStep], read: Callable[[LogStep], Mapping[str, Number]]) -> list[str]:
    """Return the names with a value in at least one step, in order of first appearance."""
    return list(
        dict.fromkeys(key for line in log for key, value in read(line).items() if value is not None)
    )


def steps_axis(axes: Axes, steps: Iterable[int]) -> None:
    """Put whole steps on the x axis. A single logged step is the only tick."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    if len(logged := set(steps)) == 1:
        axes.set_xticks(list(logged))


def legend(axes: Axes) -> None:
    """Draw a legend inside the panel if anything in it has a label."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, names, loc="best")


def stack(
    axes: Axes, steps: Sequence[int], shares: Mapping[str, Sequence[Number]], colors: Sequence[str]
) -> None:
    """Plot shares over the steps as stacked areas. A share that was not logged counts as zero."""
    values = np.nan_to_num(np.stack([array(column) for column in shares.values()]), nan=0.0)
    positions = np.array(steps, dtype=float)
    if len(steps) == 1:
        # An area over one step has no width, so it is drawn as a bar.
        positions, values = (
            np.array([positions[0] - 0.5, positions[0] + 0.5]),
            np.repeat(values, 2, axis=1),
        )
    polygons = axes.stackplot(positions, values, colors=colors, edgecolor="white", linewidth=0.4)
    for polygon, name in zip(polygons, shares, strict=True):
        polygon.set_label(label(name))
    axes.set_xlim(positions[0], positions[-1])
    axes.set_ylim(0, max(1.0, float(values.sum(axis=0).max())))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False)
    steps_axis(axes, steps)


def heat_map(
    axes: Axes, table: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], form: str
) -> None:
    """Draw a matrix as colors, with its numbers where they fit. NaN stays empty."""
    finite = table[np.isfinite(table)]
    top = float(finite.max()) if finite.size else 1.0
    # `or 1.0`: a matrix of zeros would have an empty color range.
    axes.imshow(np.ma.masked_invalid(table), cmap="Blues", vmin=0.0, vmax=top or 1.0, aspect="auto")
    # Labels of more than about ten characters per column would overlap.
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
            # White on the dark end of the color map.
            color = "white" if value > 0.64 * top else canvas.INK
            axes.text(j, i, form.format(value), ha="center", va="center", color=color, fontsize=8.5)
