"""Students trained on the same data in the same order: the main one, and controls.

A control shows the worth of one part of the recipe: the teachers, their number, their weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from collegium.config.recipe import Recipe, plain
from collegium.fusion.fuse import Fusion
from collegium.fusion.rules import BestSingle, Entropy, Uniform
from collegium.train.options import ObjectiveOptions


@dataclass(frozen=True)
class Variant:
    """Training options of one student."""

    name: str
    """`student`, or the name of a control."""
    label: str
    """Its row in the table of results."""
    objective: ObjectiveOptions
    fusion: Fusion | None = None
    teachers: tuple[str, ...] = ()
    """The teachers it is distilled from."""
    steps_factor: float = 1.0
    """Its optimizer steps, as a multiple of the student's."""

    def identity(self) -> dict[str, Any]:
        """Everything that shapes the result, as plain data."""
        return {
            "name": self.name,
            "objective": plain(self.objective),
            "fusion": None if self.fusion is None else plain(self.fusion),
            "teachers": list(self.teachers),
            "steps_factor": self.steps_factor,
        }


CONTROLS = ("ce_only", "ce_only_equal_compute", "best_single", "uniform", "entropy")


def main_variant(recipe: Recipe, fusion: Fusion | None) -> Variant:
    """Return the student that the recipe describes."""
    teachers = tuple(recipe.teachers)
    label = "student (distilled)" if teachers else "student (trained)"
    return Variant("student", label, recipe.objective, fusion, teachers)


def control_variants(recipe: Recipe, best_teacher: str, compute_ratio: float) -> dict[str, Variant]:
    """Return the controls by name.

    `best_teacher` has the lowest NLL on the calibration split. `compute_ratio` is the compute of a
    step with all teachers over that of a step without.
    """
    distilled, teachers = recipe.objective, tuple(recipe.teachers)
    text_only = distilled.labels_only()
    best, equal, paper = BestSingle(teacher=best_teacher), Uniform(), Entropy()
    compute = f"CE only, equal compute ({compute_ratio:.2f} x steps)"
    single, rule = f"best single teacher ({best_teacher})", "entropy weights (the paper's rule)"
    variants = [
        Variant("ce_only", "CE only, equal steps", text_only),
        # The compute of distillation includes that of the teachers.
        Variant("ce_only_equal_compute", compute, text_only, steps_factor=compute_ratio),
        Variant("best_single", single, distilled, Fusion(weighting=best), (best_teacher,)),
        Variant("uniform", "uniform weights", distilled, Fusion(weighting=equal), teachers),
        # arXiv 2507.15198
        Variant("entropy", rule, distilled, Fusion(weighting=paper), teachers),
    ]
    return {one.name: dataclasses.replace(one, label=f"control: {one.label}") for one in variants}
