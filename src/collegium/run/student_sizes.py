"""Sizes and speed of the students that can be cut out of the teachers of a recipe."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch

from collegium.errors import ModelError
from collegium.models import loading
from collegium.models.cut import WIDTH_TYPES
from collegium.models.cut_student import CutStudent, LayerCut, WidthCut
from collegium.models.options import ModelOptions
from collegium.report import formats as form
from collegium.report.tables import Column, Line, Table
from collegium.run.context import RunContext

DEPTHS = (1.0, 3 / 4, 1 / 2, 1 / 3, 1 / 4)
WIDTHS = (1.0, 3 / 4, 1 / 2)
"""Fractions of the layers, and of the channels, FFN units and heads, that a student keeps."""
ALIGNMENT = 8
"""Channels and FFN units are multiples of this, which matrix kernels prefer."""
RUNS = 3


@dataclass(frozen=True)
class StudentSize:
    """One student that can be cut out of a teacher."""

    teacher: str
    layers: int
    hidden_size: int
    ffn: int | None
    heads: int
    vocab_size: int
    """Rows of the embedding: those of the teacher, or as many as the corpus uses."""
    num_parameters: int
    tokens_per_second: float
    """Of a forward pass over one window on the device of the student."""


def student_sizes(context: RunContext, max_parameters: int | None) -> Table[StudentSize]:
    """List students of at most `max_parameters`, the largest of each teacher first.

    They have the tokens that the corpus uses if the recipe has `student.vocabulary: used`.

    Raises ModelError if no teacher can be cut, or none to such a size.
    """
    sizes = [
        size
        for name, teacher in context.recipe.teachers.items()
        if isinstance(teacher, ModelOptions)
        for size in _sizes(context, name, teacher, max_parameters)
    ]
    if not sizes:
        raise ModelError(
            f"teachers: got none that can be cut to {max_parameters or 'any'} parameters; must be "
            "a family whose layers can be cut out; allow more parameters, or use another teacher"
        )
    columns: list[Column[StudentSize]] = [
        *(Column(key, key, str) for key in ("layers", "hidden_size", "ffn", "heads")),
        Column("Tokens", "vocab_size", form.whole),
        Column("Parameters", "num_parameters", form.amount, short="params"),
        *(
            Column(f"{dtype} bytes", lambda size, b=width: size.num_parameters * b, form.amount)
            for dtype, width in (("float32", 4), ("bf16", 2), ("int8", 1))
        ),
        Column("Tokens/s", "tokens_per_second", form.amount),
    ]
    lines = [Line(size.teacher, size) for size in sizes]
    return Table("Students that can be cut out of the teachers", "Teacher", columns, lines)


def _sizes(
    context: RunContext, name: str, teacher: ModelOptions, max_parameters: int | None
) -> Iterator[StudentSize]:
    config = teacher.load_config(f"teachers.{name}").get_text_config()
    for options in candidates(name, config):
        student = options.bind(context.recipe.teachers, lambda: ())
        if context.used is not None:
            student = context.with_used(student)
        try:
            student.check("student")
        except ModelError:
            continue  # these layers cannot be cut out of this family
        parameters = student.facts("student").num_parameters
        if max_parameters is not None and parameters > max_parameters:
            continue
        smaller = student.load_config("student")
        length = min(context.recipe.data.max_length, student.max_length("student") or sys.maxsize)
        part: Any = smaller.get_text_config()
        yield StudentSize(
            teacher=name,
            layers=part.num_hidden_layers,
            hidden_size=part.hidden_size,
            ffn=getattr(part, "intermediate_size", None),
            heads=part.num_attention_heads,
            vocab_size=part.vocab_size,
            num_parameters=parameters,
            tokens_per_second=_speed(smaller, length, student.device),
        )


def candidates(name: str, config: Any) -> Iterator[CutStudent]:
    """Yield students of a teacher with this config, by falling depth, then width."""
    total = config.num_hidden_layers
    for layers in dict.fromkeys(max(1, round(total * depth)) for depth in DEPTHS):
        deep = LayerCut(teacher=name, keep=layers)
        yield CutStudent(from_layers=deep)
        if config.model_type not in WIDTH_TYPES:
            continue
        group = config.num_attention_heads // config.num_key_value_heads
        for width in WIDTHS[1:]:
            heads = int(config.num_attention_heads * width) // group * group
            unit = lcm(ALIGNMENT, max(1, heads))
            hidden, ffn = int(config.hidden_size * width), int(config.intermediate_size * width)
            hidden, ffn = hidden // unit * unit, ffn // ALIGNMENT * ALIGNMENT
            if heads and hidden and ffn:
                sizes = WidthCut(teacher=name, hidden_size=hidden, ffn=ffn, heads=heads)
                yield CutStudent(from_layers=deep, from_width=sizes)


def _speed(config: Any, length: int, device: str) -> float:
    """Return the tokens per second of a model with random weights, the median of a few runs."""
    model = loading.build_model(config, seed=0).eval()
    torch.nn.Module.to(model, loading.choose_device(device))
    ids_BT = torch.zeros(1, length, dtype=torch.long, device=model.device)
    seconds = []
    with torch.inference_mode():
        for _ in range(RUNS + 1):  # the first one warms up
            start = time.perf_counter()
            float(model(input_ids=ids_BT, use_cache=False).logits[0, -1, 0])  # waits for the device
            seconds.append(time.perf_counter() - start)
    return length / statistics.median(seconds[1:])
