"""Distill several frozen language-model teachers into one small student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    from collegium.fusion.pooling import Fusion
    from collegium.recipe import Recipe, load_recipe
    from collegium.teachers.local import LocalTeacher
    from collegium.train.objective import Objective, ObjectiveOptions
    from collegium.train.trainer import DistillTrainer

__version__ = "0.1.0"

__all__ = [
    "DistillTrainer",
    "Fusion",
    "LocalTeacher",
    "Objective",
    "ObjectiveOptions",
    "Recipe",
    "__version__",
    "distill",
    "load_recipe",
]

_HOMES = {
    "DistillTrainer": "collegium.train.trainer",
    "Fusion": "collegium.fusion.pooling",
    "LocalTeacher": "collegium.teachers.local",
    "Objective": "collegium.train.objective",
    "ObjectiveOptions": "collegium.train.objective",
    "Recipe": "collegium.recipe",
    "load_recipe": "collegium.recipe",
}
"""Where each public name lives; it is imported when it is first asked for."""


def distill(recipe: Recipe | str | os.PathLike[str]) -> Any:
    """Run every stage of a recipe (or of a recipe file) and return the path of its report.

    Raises:
        CollegiumError: what the user can mend: the recipe, the data, a model, a vocabulary.
    """
    from collegium.pipeline import run
    from collegium.recipe import Recipe, check_recipe, load_recipe

    if isinstance(recipe, Recipe):
        check_recipe(recipe)
        return run(recipe)
    return run(load_recipe(recipe))


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module `collegium` has no attribute `{name}`")
    import importlib

    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
