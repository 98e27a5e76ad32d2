"""Which color a model has, in every plot and table of a page."""

from __future__ import annotations

from collegium.report.canvas import CONTROLS, FUSED, STUDENT, UNTOUCHED, teacher_color
from collegium.report.files import ResultRow, RunFiles


def row_color(row: ResultRow, run: RunFiles) -> str:
    """The color of a row of the evaluation."""
    if row.kind == "teacher":
        return teacher_color(row.name, run.teachers())
    if row.kind == "control":
        return control_color([control.name for control in run.rows("control")].index(row.name))
    return {"student": STUDENT, "fused": FUSED}.get(row.kind, UNTOUCHED)


def control_color(place: int) -> str:
    """The color of a control: its place among the controls, in the evaluation as in the folder of the run."""
    return CONTROLS[place % len(CONTROLS)]
