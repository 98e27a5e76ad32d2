"""Style, palette, safe labels and reproducible SVG output shared by all plots."""

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
# https://jfly.uni-koeln.de/color/ and https://personal.sron.nl/~pault/
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
"""After Okabe and Ito, then Tol: distinct for color-blind readers. Repeats differ by dashes."""
DASHES = ("-", "--", ":", "-.")
LABEL_LENGTH = 26

STYLE = {
    # Ships with matplotlib, so the layout does not depend on installed fonts.
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
    # A teacher may be named `$\frac{$`. Parsed as math, the name would raise.
    "text.parse_math": False,
    "text.usetex": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    # Glyphs as paths look the same in every browser, and no name enters the SVG as text.
    "svg.fonttype": "path",
    # Without a salt, matplotlib draws random element ids and the bytes change with every run.
    "svg.hashsalt": "collegium",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Apply the style of all plots, regardless of the user's matplotlib configuration."""
    # "default" first: it resets everything that a matplotlibrc has set.
    with matplotlib.style.context(["default", STYLE]):
        yield


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Create a figure of `columns` panels side by side, `width` x `height` inches."""
    # `Figure` instead of pyplot: no global state and no display backend.
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(1, columns, squeeze=False)
    return figure, list(grid[0])


def render(figure: Figure) -> bytes:
    """Render a figure as SVG; the same figure gives the same bytes."""
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
        capacity = int(figure.get_figwidth() * 12.5) // (max(map(len, names)) + 9)
        columns = max(1, min(len(names), capacity))
        figure.legend(handles, names, loc="outside lower center", ncols=columns)


def teacher_color(name: str, teachers: Sequence[str]) -> str:
    """Return the color of a teacher, set by its position in the run."""
    return TEACHERS[teachers.index(name) % len(TEACHERS)] if name in teachers else MUTED


def teacher_dash(name: str, teachers: Sequence[str]) -> str:
    """Return a solid line for the first ten teachers and other dashes after them."""
    return DASHES[teachers.index(name) // len(TEACHERS) % len(DASHES)] if name in teachers else "-"


@lru_cache(maxsize=1)
def _code_points() -> frozenset[int]:
    return frozenset(FT2Font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def label(name: str, length: int = LABEL_LENGTH) -> str:
    """Make a name drawable: one line, no control characters or missing glyphs, at most `length`."""
    text = " ".join(name.split()) or "(no name)"
    text = "".join(_drawable(letter) for letter in text)
    if len(text) > length:
        # Cut the middle: model names often differ at the end (`-7b`).
        tail = length // 3
        text = f"{text[: length - tail - 1]}…{text[-tail:]}"
    # matplotlib leaves labels with a leading underscore out of the legend.
    return f" {text}" if text.startswith("_") else text


def _drawable(letter: str) -> str:
    # Control characters, format characters and lone surrogates have no glyph.
    if unicodedata.category(letter) in ("Cc", "Cf", "Cs"):
        return ""
    # matplotlib warns about every glyph that the font lacks.
    return letter if ord(letter) in _code_points() else "□"
