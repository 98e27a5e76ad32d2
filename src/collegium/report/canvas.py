"""Style, labels and elements of all plots: figures, legends, curves, stacks and heat maps."""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from collegium.report.colors import INK
from collegium.storage.records import LogStep, Number

WIDE = 10.4
"""Width of a figure in inches, the same as that of the page."""
LABEL_LENGTH = 26
SMOOTH_FROM = 60
"""Curves with more points are drawn as a running mean over a faint line."""
# A diverged run can log 1e300, and one such point would flatten every curve of the panel.
MAX_DRAWN = 1e12
"""Larger values are not drawn."""
MAX_ANNOTATED = 14
"""Heat maps with more rows or columns show no numbers."""
STYLE = Path(__file__).with_name("house.mplstyle")


def house_style() -> AbstractContextManager[None]:
    """Apply the style of all plots, regardless of the user's matplotlib configuration."""
    # "default" first: it resets everything that a matplotlibrc has set.
    return matplotlib.style.context(["default", str(STYLE)])


def new_figure(height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Create a figure of `columns` panels side by side, `height` inches high."""
    # `Figure` instead of pyplot: no global state and no display backend.
    figure = Figure(figsize=(WIDE, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def render_svg(figure: Figure) -> bytes:
    """Render a figure. The same figure gives the same bytes."""
    stream = io.BytesIO()
    # matplotlib writes the current date by default.
    no_metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", metadata=no_metadata)
    return stream.getvalue()


def legend_below(figure: Figure, axes: Axes) -> None:
    """Draw one legend below all panels, in as many columns as the names allow."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        # An inch holds about 12.5 characters; handle and gap of an entry take about 9.
        capacity = int(WIDE * 12.5) // (max(map(len, names)) + 9)
        columns = max(1, min(len(names), capacity))
        figure.legend(handles, names, loc="outside lower center", ncols=columns)


@lru_cache(maxsize=1)
def _code_points() -> frozenset[int]:
    return frozenset(FT2Font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def label(name: str, length: int = LABEL_LENGTH) -> str:
    """Make a name drawable: one line, no control characters or missing glyphs, at most `length`."""
    text = " ".join(name.split()) or "(no name)"
    # Control characters, format characters and lone surrogates have no glyph.
    letters = (c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    # matplotlib warns about every glyph that the font lacks.
    text = "".join(c if ord(c) in _code_points() else "□" for c in letters)
    if len(text) > length:
        # Cut the middle: model names often differ at the end (`-7b`).
        tail = length // 3
        text = f"{text[: length - tail - 1]}…{text[-tail:]}"
    # matplotlib leaves labels with a leading underscore out of the legend.
    return f" {text}" if text.startswith("_") else text


def curve(
    axes: Axes,
    log: Sequence[LogStep],
    read: Callable[[LogStep], Number],
    name: str,
    color: str,
    dash: str = "-",
) -> None:
    """Plot one value of the log over the steps. A no-op if no step has it."""
    steps = np.array([line.step for line in log], dtype=float)
    values = array([read(line) for line in log])
    if not np.isfinite(values).any():
        return
    if len(values) > SMOOTH_FROM:
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.25)
        values = running_mean(values, max(3, len(values) // 40))
    # A line through a single point is invisible.
    marker = "o" if len(values) <= 3 else None
    axes.plot(steps, values, color=color, linestyle=dash, marker=marker, label=label(name))


def running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the mean of the finite values in a window, with NaN where the value is NaN."""
    # Divided by the finite values in the window: a gap neither spreads nor lowers the mean.
    is_finite = np.isfinite(values)
    kernel = np.ones(width)
    total = np.convolve(np.where(is_finite, values, 0.0), kernel, mode="same")
    count = np.convolve(is_finite.astype(float), kernel, mode="same")
    mean = np.full_like(values, np.nan)
    return np.divide(total, count, out=mean, where=is_finite & (count > 0))


def array(values: Iterable[Number]) -> NDArray[np.float64]:
    """Convert to float64, with NaN (a gap in the curve) for missing and oversized values."""
    return np.array([math.nan if v is None or abs(v) > MAX_DRAWN else v for v in values], float)


def keys(log: Sequence[LogStep], read: Callable[[LogStep], Mapping[str, Number]]) -> list[str]:
    """Return the names with a value in at least one step, in order of first appearance."""
    return list(dict.fromkeys(k for line in log for k, v in read(line).items() if v is not None))


def finish_curves(axes: Axes, steps: Iterable[int]) -> None:
    """Put whole steps on the x axis, and draw a legend if anything has a label."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    # A single logged step is the only tick.
    if len(logged := set(steps)) == 1:
        axes.set_xticks(list(logged))
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, names, loc="best")


def stack(
    axes: Axes, steps: Sequence[int], shares: Mapping[str, Sequence[Number]], colors: Sequence[str]
) -> None:
    """Plot shares over the steps as stacked areas. A share that was not logged counts as zero."""
    values = np.nan_to_num(np.stack([array(column) for column in shares.values()]), nan=0.0)
    positions = np.array(steps, dtype=float)
    finish_curves(axes, steps)
    if len(steps) == 1:
        # An area over one step has no width, so it is drawn as a bar.
        positions = np.array([positions[0] - 0.5, positions[0] + 0.5])
        values = np.repeat(values, 2, axis=1)
    polygons = axes.stackplot(positions, values, colors=colors, edgecolor="white", linewidth=0.4)
    for polygon, name in zip(polygons, shares, strict=True):
        polygon.set_label(label(name))
    axes.set_xlim(positions[0], positions[-1])
    axes.set_ylim(0, max(1.0, float(values.sum(axis=0).max())))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False)


def heat_map(
    axes: Axes, table: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], form: str
) -> None:
    """Draw a matrix as colors, with its numbers where they fit. NaN stays empty."""
    finite = table[np.isfinite(table)]
    top = float(finite.max()) if finite.size else 1.0
    # `or 1.0`: a matrix of zeros would have an empty color range.
    axes.imshow(np.ma.masked_invalid(table), cmap="Blues", vmin=0.0, vmax=top or 1.0, aspect="auto")
    columns = [label(name, 18) for name in columns]
    # Labels of more than about ten characters per column would overlap.
    is_crowded = max(len(columns), max(map(len, columns)) * len(columns) // 10) > 5
    axes.set_xticks(np.arange(len(columns)), columns)
    if is_crowded:
        for text in axes.get_xticklabels():
            text.set(rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(rows)), [label(name, 18) for name in rows])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    if max(table.shape) > MAX_ANNOTATED:
        return
    for (i, j), value in np.ndenumerate(table):
        if math.isfinite(value):
            # White on the dark end of the color map.
            color = "white" if value > 0.64 * top else INK
            axes.text(j, i, form.format(value), ha="center", va="center", color=color, fontsize=8.5)
