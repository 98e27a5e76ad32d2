"""The `export:` section of a recipe."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from collegium.options import option

FormatName = Literal[
    "hf", "onnx", "onnx-int8", "torchao-int8", "torchao-int4", "gguf-f16", "gguf-q8_0"
]
"""A key of `collegium.export.formats.FORMATS`."""


@option
class ExportOptions:
    """The student in the formats of other tools, verified in those tools."""

    to: list[FormatName] = field(default_factory=list)
    """Formats to write after the evaluation, each into `exports/NAME`."""
    max_tokens: Annotated[int, Field(ge=1)] = 20_000
    """Tokens of the validation split on which an export is compared with the student."""
    measure: bool = False
    """Measure size, memory and speed of the student, the exports and the teachers afterwards."""
