"""Colors of models, the same in every plot and table of a page."""

from __future__ import annotations

from collections.abc import Sequence

from collegium.report.run_files import RunFiles
from collegium.storage.records import ResultRow

INK = "#1f2733"
MUTED = "#6b7585"
STUDENT = "#1d4fa3"
FUSED = "#111111"
UNTOUCHED = "#c3c9d2"
CONTROLS = ("#7d8794", "#b08d57", "#8a6f9e", "#5f8f8b", "#b0726c", "#4d5563")
# https://jfly.uni-koeln.de/color/ and https://personal.sron.nl/~pault/
TEACHERS = (
    "#e69f00", "#009e73", "#56b4e9", "#d55e00", "#cc79a7",
    "#a6a800", "#5e3c99", "#8c5a2b", "#882255", "#44aa99",
)  # fmt: skip
"""After Okabe and Ito, then Tol: distinct for color-blind readers. Repeats differ by dashes."""
DASHES = ("-", "--", ":", "-.")


def teacher_color(name: str, teachers: Sequence[str]) -> str:
    """Return the color of a teacher, set by its position in the run."""
    return TEACHERS[teachers.index(name) % len(TEACHERS)] if name in teachers else MUTED


def teacher_dash(name: str, teachers: Sequence[str]) -> str:
    """Return a solid line for the first ten teachers and other dashes after them."""
    return DASHES[teachers.index(name) // len(TEACHERS) % len(DASHES)] if name in teachers else "-"


def row_color(row: ResultRow, run: RunFiles) -> str:
    """Return the color of an evaluation row."""
    if row.kind == "teacher":
        return teacher_color(row.name, run.teachers())
    if row.kind == "control":
        # By position: a log calls a control `ce_only`, its row "CE only, equal steps".
        return control_color([control.name for control in run.rows("control")].index(row.name))
    return {"student": STUDENT, "fused": FUSED}.get(row.kind, UNTOUCHED)


def control_color(index: int) -> str:
    """Return the color of a control by its position, in the evaluation and the run folder alike."""
    return CONTROLS[index % len(CONTROLS)]
