"""The table of all kinds of students."""

from __future__ import annotations

from typing import Annotated

from collegium.models.cut_student import CutStudent
from collegium.models.student import FreshStudent, PretrainedStudent, StudentKind
from collegium.options import OneOf

STUDENTS: dict[str, type[StudentKind]] = {
    "model": PretrainedStudent,
    "config": FreshStudent,
    "from_layers": CutStudent,
    "from_width": CutStudent,
}
"""Key in a recipe -> the options of the kind of student that has it."""

AnyStudent = Annotated[StudentKind, OneOf(STUDENTS, key=None)]
"""A student of any kind, distinguished by its keys."""
