"""Students trained on the same data in the same order: the main one, and controls.

A control shows the worth of one part of the recipe: the teachers, their number, their weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from collegium.config.recipe import Recipe, plain
from collegium.fusion.fuse import Fusion
from collegium.fusion.rules import BestSingle, Entropy, Uniform
from collegium.fusion.weighting import Weighting
from collegium.train.options import ObjectiveOptions


@dataclass(frozen=True)
class Variant:
    """Training options of one student."""

    name: str
    """`student`, or the name of a control."""
    label: str
    """Its row in the table of results."""
    objective: ObjectiveOptions
    fusion: Fusion | None
    teachers: tuple[str, ...]
    """The teachers it is distilled from."""
    steps_factor: float = 1.0
    """Its optimizer steps, as a multiple of the student's."""

    @property
    def folder(self) -> str:
        """Its folder, relative to the run folder."""
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


@dataclass(frozen=True)
class Measured:
    """Measurements that a control is built from."""

    best_teacher: str
    """The teacher with the lowest NLL on the calibration split."""
    compute_ratio: float
    """Compute of a step with all teachers over that of a step without."""


def main_variant(recipe: Recipe, fusion: Fusion | None) -> Variant:
    """Return the student that the recipe describes."""
    teachers = tuple(recipe.teachers)
    label = "student (distilled)" if teachers else "student (trained)"
    return Variant("student", label, recipe.objective, fusion, teachers)


def ce_only(recipe: Recipe, measured: Measured) -> Variant:
    """Cross-entropy on the text for the same number of steps."""
    return Variant("ce_only", "control: CE only, equal steps", _without_kd(recipe), None, ())


def ce_only_equal_compute(recipe: Recipe, measured: Measured) -> Variant:
    """Cross-entropy on the text for the compute that distillation takes, teachers included."""
    ratio = measured.compute_ratio
    label = f"control: CE only, equal compute ({ratio:.2f} x steps)"
    return Variant(
        "ce_only_equal_compute", label, _without_kd(recipe), None, (), steps_factor=ratio
    )


def best_single(recipe: Recipe, measured: Measured) -> Variant:
    """Distillation from the best teacher only."""
    name = measured.best_teacher
    fusion = Fusion(weighting=BestSingle(teacher=name))
    label = f"control: best single teacher ({name})"
    return Variant("best_single", label, recipe.objective, fusion, (name,))


def uniform(recipe: Recipe, measured: Measured) -> Variant:
    """Distillation from all teachers with equal weights."""
    return _weighted("uniform", "control: uniform weights", recipe, Uniform())


def entropy(recipe: Recipe, measured: Measured) -> Variant:
    """Distillation with the entropy weights of arXiv 2507.15198."""
    return _weighted("entropy", "control: entropy weights (the paper's rule)", recipe, Entropy())


def _weighted(name: str, label: str, recipe: Recipe, weighting: Weighting) -> Variant:
    fusion = Fusion(weighting=weighting)
    return Variant(name, label, recipe.objective, fusion, tuple(recipe.teachers))


def _without_kd(recipe: Recipe) -> ObjectiveOptions:
    return dataclasses.replace(recipe.objective, kd_ratio=0.0, features=None)


CONTROLS: dict[str, Callable[[Recipe, Measured], Variant]] = {
    one.__name__: one for one in (ce_only, ce_only_equal_compute, best_single, uniform, entropy)
}
