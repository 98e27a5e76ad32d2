"""How every plot looks: colors that mean the same thing everywhere, safe labels, the same bytes each time."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.ft2font import FT2Font

INK = "#1f2733"
MUTED = "#6b7585"
GRID = "#e4e8ee"
STUDENT = "#1d4fa3"
FUSED = "#111111"
UNTOUCHED = "#c3c9d2"
CONTROLS = ("#7d8794", "#b08d57", "#8a6f9e", "#5f8f8b", "#b0726c", "#4d5563")
TEACHERS = (
    "#e69f00",
    "#009e73",
    "#56b4e9",
    "#d55e00",
    "#cc79a7",
    "#a6a800",
    "#5e3c99",
    "#8c5a2b",
    "#882255",
    "#44aa99",
)
"""After Okabe and Ito, then Tol: distinct for color-blind readers; dashes tell a second round of ten apart."""
DASHES = ("-", "--", ":", "-.")
LABEL_LENGTH = 26

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b9c0ca",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "collegium",
}


@contextmanager
def house_style() -> Iterator[None]:
    """The settings of every plot, whatever the reader's own matplotlib configuration says."""
    with matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of `columns` panels side by side; width and height in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(1, columns, squeeze=False)
    return figure, list(grid[0])


def render(figure: Figure) -> bytes:
    """SVG bytes without a date: the same figure gives the same bytes."""
    stream = io.BytesIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", metadata=nothing)
    return stream.getvalue()


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, under them, in as many columns as the names leave room for."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        fitting = int(figure.get_figwidth() * 12.5) // (max(map(len, names)) + 9)
        columns = max(1, min(len(names), fitting))
        figure.legend(handles, names, loc="outside lower center", ncols=columns)


def teacher_color(name: str, teachers: Sequence[str]) -> str:
    """The color of a teacher: its place in the run, the same in every plot and table."""
    return TEACHERS[teachers.index(name) % len(TEACHERS)] if name in teachers else MUTED


def teacher_dash(name: str, teachers: Sequence[str]) -> str:
    """Solid for the first ten teachers, other dashes for the next ones."""
    return DASHES[teachers.index(name) // len(TEACHERS) % len(DASHES)] if name in teachers else "-"


@lru_cache(maxsize=1)
def _drawable() -> frozenset[int]:
    return frozenset(FT2Font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def label(name: str, length: int = LABEL_LENGTH) -> str:
    """A name as it can be drawn: one line, no control characters, no glyph that the font lacks, not too long."""
    text = " ".join(name.split()) or "(no name)"
    text = "".join(_drawn(letter) for letter in text)
    if len(text) > length:
        # Names of models often differ at the end.
        tail = length // 3
        text = f"{text[: length - tail - 1]}…{text[-tail:]}"
    # A leading underscore would hide the label from the legend.
    return f" {text}" if text.startswith("_") else text


def _drawn(letter: str) -> str:
    if unicodedata.category(letter) in ("Cc", "Cf", "Cs"):
        return ""
    return letter if ord(letter) in _drawable() else "□"
