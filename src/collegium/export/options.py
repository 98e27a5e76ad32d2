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
class RecoverOptions:
    """Training of the student on the weights of a quantized format, where that costs too much."""

    steps: Annotated[int, Field(ge=1)]
    """Optimizer steps, from the cache and with the objective of the run."""
    bits_per_byte: Annotated[float, Field(ge=0)] | None = None
    """Train where an export costs more than this. By default more than the bound of its format."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate. A quarter of that of the training by default."""


@option
class ExportOptions:
    """The student in the formats of other tools, verified in those tools."""

    to: list[FormatName] = field(default_factory=list)
    """Formats to write after the evaluation, each into `exports/NAME`."""
    max_tokens: Annotated[int, Field(ge=1)] = 20_000
    """Tokens of the validation split on which an export is compared with the student."""
    recover: RecoverOptions | None = None
    """Train quantized exports beyond a bound; null for none."""
    measure: bool = False
    """Measure size, memory and speed of the student, the exports and the teachers afterwards."""
