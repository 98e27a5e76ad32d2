"""Compute and memory of a run, computed from the sizes of its models and of its data."""

from __future__ import annotations

import torch

from collegium.report.formats import amount
from collegium.run.context import RunContext


def estimate_lines(context: RunContext) -> list[str]:
    """Return parameters, FLOP, and the memory of the student, or nothing without known sizes.

    A forward pass costs 2 FLOP per parameter and token, forward and backward together 6 (arXiv
    2001.08361, section 2.1), attention scores excluded. In training the student has weights,
    gradients and the two moments of AdamW, all of its data type.
    """
    recipe, train = context.recipe, context.recipe.train
    models = [*recipe.teachers.values(), context.student]
    if any(model.needs_loading for model in models):
        return []
    student = context.student_facts.num_parameters
    teachers = {name: n for name, n in context.teacher_parameters.items() if n is not None}
    sizes = ", ".join(f"{name} {amount(count)}" for name, count in teachers.items())
    lines = [f"models: student {amount(student)} parameters; teachers {sizes or 'none'}"]
    dataset = context.datasets["train"]
    windows = train.per_device_train_batch_size * train.gradient_accumulation_steps
    trained = context.num_steps * windows * dataset.num_tokens / len(dataset)
    text = f"compute: {6 * student * trained:.1e} FLOP to train on {amount(trained)} tokens"
    if recipe.objective.has_divergence or recipe.objective.state_terms():
        # A cache holds every window once, however often the student sees it.
        scored = dataset.num_tokens if recipe.cache.enabled else trained
        forward = f"{2 * sum(teachers.values()) * scored:.1e} FLOP"
        text += f", {forward} for the teachers on {amount(scored)}"
    lines.append(text)
    copies = 4 if train.optim.startswith("adamw") else 2
    itemsize = getattr(torch, getattr(context.student, "dtype", "float32")).itemsize
    size = copies * itemsize * student / 1e9
    lines.append(f"memory: {size:.1f} GB of the student's weights, gradients and optimizer states")
    return lines
