"""The table of all kinds of teachers."""

from __future__ import annotations

from typing import Annotated

from collegium.options import OneOf
from collegium.teachers.options import LocalOptions, TeacherOptions

TEACHERS: dict[str, type[TeacherOptions]] = {"local": LocalOptions}
"""Value of `kind` in a recipe -> the options of that kind."""

AnyTeacher = Annotated[TeacherOptions, OneOf(TEACHERS, key="kind", default="local")]
"""A teacher of any kind. `local` where a recipe names none."""
