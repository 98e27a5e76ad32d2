"""What is trained on the same data in the same order: the student, and the controls that say what the teachers are worth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from collegium.fusion.fuse import Fusion
from collegium.fusion.rules import BestSingle, Entropy, Uniform
from collegium.recipe import Recipe, plain
from collegium.train.objective import ObjectiveOptions


@dataclass(frozen=True)
class Variant:
    """One student to train."""

    name: str
    """`student`, or the name of a control."""
    label: str
    """Its row in the table of results."""
    objective: ObjectiveOptions
    fusion: Fusion | None
    teachers: tuple[str, ...]
    """The teachers that it listens to."""
    steps_factor: float = 1.0
    """Its optimizer steps, as a multiple of the student's."""

    @property
    def folder(self) -> str:
        """Where it lives inside the run folder."""
        return "." if self.name == "student" else f"controls/{self.name}"

    @property
    def stage(self) -> str:
        """Its entry in stages.json."""
        return "train" if self.name == "student" else f"control {self.name}"

    def identity(self) -> dict[str, Any]:
        """Everything that shapes the result, as plain data."""
        return {
            "name": self.name,
            "objective": plain(self.objective),
            "fusion": None if self.fusion is None else plain(self.fusion),
            "teachers": list(self.teachers),
            "steps_factor": self.steps_factor,
        }


def main_variant(recipe: Recipe, fusion: Fusion | None) -> Variant:
    """The student that the recipe asks for."""
    teachers = tuple(recipe.teachers)
    label = "student (distilled)" if teachers else "student (trained)"
    return Variant("student", label, recipe.objective, fusion, teachers)


def control(name: str, recipe: Recipe, *, best_teacher: str, compute_ratio: float) -> Variant:
    """A control by its name in `evaluate.controls`.

    Args:
        name: one of `CONTROLS`.
        recipe: whose data, steps and objective the control shares.
        best_teacher: the teacher with the lowest NLL on the calibration split.
        compute_ratio: cost of a step with all teachers over that of a step without, in floating-point operations.
    """
    return CONTROLS[name](recipe, best_teacher, compute_ratio)


def _ce_only(recipe: Recipe, best_teacher: str, compute_ratio: float) -> Variant:
    return Variant("ce_only", "control: CE only, equal steps", _labels_alone(recipe), None, ())


def _ce_only_equal_compute(recipe: Recipe, best_teacher: str, compute_ratio: float) -> Variant:
    label = f"control: CE only, equal compute ({compute_ratio:.2f} x steps)"
    return Variant(
        "ce_only_equal_compute", label, _labels_alone(recipe), None, (), steps_factor=compute_ratio
    )


def _best_single(recipe: Recipe, best_teacher: str, compute_ratio: float) -> Variant:
    fusion = Fusion(weighting=BestSingle(teacher=best_teacher))
    label = f"control: best single teacher ({best_teacher})"
    return Variant("best_single", label, recipe.objective, fusion, (best_teacher,))


def _uniform(recipe: Recipe, best_teacher: str, compute_ratio: float) -> Variant:
    fusion = Fusion(weighting=Uniform())
    return Variant(
        "uniform", "control: uniform weights", recipe.objective, fusion, tuple(recipe.teachers)
    )


def _entropy(recipe: Recipe, best_teacher: str, compute_ratio: float) -> Variant:
    fusion = Fusion(weighting=Entropy())
    label = "control: entropy weights (the paper's rule)"
    return Variant("entropy", label, recipe.objective, fusion, tuple(recipe.teachers))


def _labels_alone(recipe: Recipe) -> ObjectiveOptions:
    return dataclasses.replace(recipe.objective, kd_ratio=0.0, features=None)


CONTROLS: dict[str, Callable[[Recipe, str, float], Variant]] = {
    "ce_only": _ce_only,
    "ce_only_equal_compute": _ce_only_equal_compute,
    "best_single": _best_single,
    "uniform": _uniform,
    "entropy": _entropy,
}
