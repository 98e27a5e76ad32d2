"""Colors of models, the same in every plot and table of a page."""

from __future__ import annotations

from collegium.report.canvas import CONTROLS, FUSED, STUDENT, UNTOUCHED, teacher_color
from collegium.report.files import ResultRow, RunFiles


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
