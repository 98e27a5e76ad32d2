"""Number formatting for tables, plots and sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

MISSING = "–"
# As wide as a plus sign, unlike a hyphen.
MINUS = "\N{MINUS SIGN}"
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def fixed(value: float | None, digits: int = 3) -> str:
    """Format with fixed digits and a real minus sign (`4.768`), or a dash if missing."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{value:,.{digits}f}"
    # -0.0001 would be written as -0.000: a value that rounds to zero has no sign.
    return text.replace("-", MINUS) if float(text.replace(",", "")) else text.lstrip("-")


def signed(value: float | None, digits: int = 3) -> str:
    """Format with an explicit sign: `+0.120` or `−0.120`."""
    text = fixed(value, digits)
    is_positive = value is not None and value > 0 and any(digit in text for digit in "123456789")
    return f"+{text}" if is_positive else text


def perplexity(value: float | None) -> str:
    """Format with three to four significant digits: `8.42`, `118.0`, `4,211`."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value >= 1e6:
        return f"{value:.1e}"
    return fixed(value, 2 if value < 10 else 1 if value < 1000 else 0)


def percent(share: float | None, digits: int = 1) -> str:
    """Format a fraction as percent: `38.2 %`."""
    return _with_unit(fixed(None if share is None else 100 * share, digits), "%")


def signed_percent(share: float | None, digits: int = 1) -> str:
    """Format a relative change as percent: `−8.0 %`."""
    return _with_unit(signed(None if share is None else 100 * share, digits), "%")


def amount(value: float | None) -> str:
    """Format a count with three significant digits: `1.10 M`, `307 k`, `900`."""
    if value is None or not math.isfinite(value):
        return MISSING
    for size, unit in UNITS:
        # With three digits, 999.5 k already rounds to 1.00 M.
        if (abs(value) >= 0.9995 * size and size > 1e3) or abs(value) >= size:
            scaled = value / size
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f} {unit}"
    return f"{value:.0f}"


def whole(value: float | None) -> str:
    """Format a count in full: `12,800`."""
    return fixed(value, 0)


def ratio(value: float | None) -> str:
    """Format a factor: `9.30 ×`, `23.2 ×`."""
    return _with_unit(fixed(value, 1 if value is not None and value >= 10 else 2), "×")


def _with_unit(text: str, unit: str) -> str:
    return text if text == MISSING else f"{text} {unit}"


def duration(seconds: float | None) -> str:
    """Format seconds: `0.4 s`, `42 s`, `2 min 35 s`, `3 h 07 min`."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    # Rounded before it is split, so that 59.7 s is 1 min 00 s and not 60 s.
    whole_s = round(seconds)
    if whole_s < 60:
        return f"{whole_s} s"
    if whole_s < 3600:
        return f"{whole_s // 60} min {whole_s % 60:02d} s"
    return f"{whole_s // 3600} h {whole_s % 3600 // 60:02d} min"


def interval(edges: Sequence[float | None] | None, write: Callable[..., str] = fixed) -> str:
    """Format the edges of an interval: `4.500 … 4.660`."""
    if not edges or None in edges:
        return MISSING
    return " … ".join(map(write, edges))


def text(value: object) -> str:
    """Return a name or a note, or a dash if there is none."""
    return MISSING if value in (None, "") else str(value)
