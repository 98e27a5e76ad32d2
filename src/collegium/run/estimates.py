"""Compute, memory and time of a run, computed from the sizes of its models and of its data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import cache

import psutil
import torch

from collegium.models.loading import choose_device
from collegium.models.options import ModelOptions
from collegium.report.formats import amount, duration
from collegium.run.context import RunContext
from collegium.run.memory import MemoryPlan, StageMemory

EFFICIENCY = 0.4
"""Speed of a run relative to that of one large matrix product, roughly."""
PREFLIGHT_PASSES = 2.5
"""Time of a preflight relative to one forward pass of all teachers, roughly."""
SHOWN_PARTS = 4
MARGIN = 0.9
"""Share of the free memory that a stage may take: the plan is an estimate."""


def estimate_lines(plan: MemoryPlan) -> list[str]:
    """Return parameters, FLOP, memory and time by stage, or nothing without known sizes.

    A forward pass costs 2 FLOP per parameter and token, forward and backward together 6 (arXiv
    2001.08361, section 2.1), attention scores excluded.
    """
    context = plan.context
    if _is_unknown(context):
        return []
    student = context.student_facts.num_parameters
    sizes = ", ".join(f"{name} {amount(count)}" for name, count in _teachers(context).items())
    lines = [f"models: student {amount(student)} parameters; teachers {sizes or 'none'}"]
    train, cached = _flop(context)["train"], _flop(context).get("cache", 0.0)
    own = 6 * student * _trained_tokens(context)
    text = f"compute: {own:.1e} FLOP to train on {amount(_trained_tokens(context))} tokens"
    if scoring := (train - own) or cached:
        tokens = amount(_scored_tokens(context))
        text += f", {scoring:.1e} FLOP for the teachers on {tokens}"
    return [*lines, text, *_weight_lines(plan), *_memory_lines(plan), _time_line(context)]


def estimate_warnings(plan: MemoryPlan) -> list[str]:
    """Return a line per device whose free memory is too small, with what would make it fit."""
    if _is_unknown(plan.context):
        return []
    lines = []
    for device in dict.fromkeys(stage.device for stage in plan.stages):
        largest = max((s for s in plan.stages if s.device == device), key=lambda s: s.num_bytes)
        free = free_bytes(device)
        if free is not None and largest.num_bytes > MARGIN * free:
            keys = "; ".join(remedies(plan, largest)) or "use smaller models"
            lines.append(
                f"memory: {largest.stage} takes about {_gb(largest.num_bytes)} on {device}, which "
                f"has {_gb(free)} available; it does not fit; {keys}"
            )
    return lines


def remedies(plan: MemoryPlan, stage: StageMemory) -> list[str]:
    """Return the keys of a recipe that lower the memory of a stage most, with what each saves."""
    saved = dict(_savings(plan, stage))
    ranked = sorted(saved, key=lambda key: saved[key], reverse=True)
    return [f"{key} saves {_gb(saved[key])}" for key in ranked[:3]]


def _savings(plan: MemoryPlan, stage: StageMemory) -> Iterator[tuple[str, int]]:
    context, parts = plan.context, stage.parts
    recipe = context.recipe
    options, objective = recipe.train, recipe.objective
    if stage.stage == "train":
        batch, steps = options.per_device_train_batch_size, options.gradient_accumulation_steps
        if batch > 1:
            half = batch // 2
            yield (
                f"train.per_device_train_batch_size: {half} with gradient_accumulation_steps: "
                f"{math.ceil(batch * steps / half)}",
                int(parts.get("activations", 0) * (1 - half / batch)),
            )
        if not context.student.gradient_checkpointing and not options.gradient_checkpointing:
            yield "train.gradient_checkpointing: true", int(0.6 * parts.get("activations", 0))
        if options.optim.startswith("adamw"):
            moments = parts.get("optimizer", 0) + parts.get("checkpoint", 0)
            yield "train.optim: adafactor", int(0.9 * moments)
        if not recipe.cache.enabled and not objective.state_terms():
            # Blocks have no buffer for the teachers' logits then.
            saved = parts.get("teachers", 0) + parts.get("blocks", 0) // 2
            yield "cache.enabled: true", saved
        blocks = parts.get("blocks", 0)
        if blocks > 2**26:
            yield "objective.block_megabytes: 64", blocks - 2**26
    yield from _teacher_savings(plan, stage)


def _teacher_savings(plan: MemoryPlan, stage: StageMemory) -> Iterator[tuple[str, int]]:
    if not stage.parts.get("teachers"):
        return
    for name, one in plan.teachers.items():
        options = plan.context.recipe.teachers[name]
        if not isinstance(options, ModelOptions) or str(one.device) != stage.device:
            continue
        if one.dtype == torch.float32 and getattr(options, "quantize", None) is None:
            yield f"teachers.{name}.dtype: bfloat16", one.weights // 2
            body = one.weights - 2 * one.head
            yield f"teachers.{name}.quantize: int8", max(0, body * 3 // 4)


def free_bytes(device: str) -> int | None:
    """Return the available memory of a device, None where it is not known."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return psutil.virtual_memory().available if device == "cpu" else None


def _weight_lines(plan: MemoryPlan) -> list[str]:
    """Return a line per teacher whose weights are not loaded as floats from its files."""
    lines = []
    for name, one in plan.teachers.items():
        options, where = plan.context.recipe.teachers[name], f"teachers.{name}"
        form = options.weight_form(where) if isinstance(options, ModelOptions) else None
        if form is not None:
            lines.append(f"{where}: {form}; {_gb(one.weights)} of weights on {one.device}")
    return lines


def _memory_lines(plan: MemoryPlan) -> list[str]:
    lines = []
    for stage in plan.stages:
        ranked = sorted(stage.parts.items(), key=lambda item: item[1], reverse=True)
        parts = ", ".join(f"{part} {_gb(size)}" for part, size in ranked[:SHOWN_PARTS])
        free = free_bytes(stage.device)
        of = "" if free is None else f" of {_gb(free)} available"
        size = f"{_gb(stage.num_bytes)} on {stage.device}{of}"
        lines.append(f"memory: {stage.stage} {size} ({parts})")
    return lines


def _time_line(context: RunContext) -> str:
    device = choose_device(context.student.device)
    dtype = (
        "bfloat16" if context.recipe.train.bf16 else getattr(context.student, "dtype", "float32")
    )
    speed = EFFICIENCY * matrix_speed(device, dtype)
    stages = ", ".join(f"{name} {duration(x / speed)}" for name, x in _flop(context).items())
    return f"time: roughly {stages}, by a timed matrix product on {device}"


@cache
def matrix_speed(device: torch.device, dtype: str) -> float:
    """Return the FLOP per second of a matrix product, the best of a few runs."""
    size = 512 if device.type == "cpu" else 4096
    left = torch.ones(size, size, dtype=getattr(torch, dtype), device=device)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        float((left @ left)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _flop(context: RunContext) -> dict[str, float]:
    """FLOP by stage, in the order of a run."""
    recipe, data = context.recipe, context.datasets
    student, teachers = context.student_facts.num_parameters, sum(_teachers(context).values())
    stages: dict[str, float] = {}
    if teachers and (recipe.fusion == "auto" or recipe.evaluate.controls):
        tokens = min(recipe.preflight.max_tokens, data["calibration"].num_tokens)
        stages["preflight"] = PREFLIGHT_PASSES * 2 * teachers * tokens
    trained = _trained_tokens(context)
    is_read = recipe.objective.has_divergence or bool(recipe.objective.state_terms())
    stages["train"] = 6.0 * student * trained
    if recipe.cache.enabled:
        stages["cache"] = 2.0 * teachers * _scored_tokens(context)
    elif is_read:
        stages["train"] += 2.0 * teachers * trained
    controls = recipe.evaluate.controls if recipe.teachers else []
    if controls:
        stages["controls"] = len(controls) * stages["train"]
    size = min(recipe.evaluate.max_tokens or math.inf, data["validation"].num_tokens)
    stages["evaluate"] = 2.0 * (teachers + (2 + len(controls)) * student) * size
    order = ("preflight", "cache", "train", "controls", "evaluate")
    return {name: stages[name] for name in order if name in stages}


def _teachers(context: RunContext) -> dict[str, int]:
    return {name: n for name, n in context.teacher_parameters.items() if n is not None}


def _trained_tokens(context: RunContext) -> float:
    train, dataset = context.recipe.train, context.datasets["train"]
    windows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    return context.num_steps * windows * dataset.num_tokens / len(dataset)


def _scored_tokens(context: RunContext) -> float:
    # A cache holds every window once, however often the student sees it.
    is_cached = context.recipe.cache.enabled
    return context.datasets["train"].num_tokens if is_cached else _trained_tokens(context)


def _is_unknown(context: RunContext) -> bool:
    models = [*context.recipe.teachers.values(), context.student]
    return any(model.needs_loading for model in models)


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
