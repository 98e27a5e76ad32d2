"""Distill several frozen language-model teachers into one small student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collegium.config.recipe import Recipe, load_recipe
    from collegium.fusion.fuse import Fusion
    from collegium.run.pipeline import distill
    from collegium.teachers.local import LocalTeacher
    from collegium.train.objective import Objective
    from collegium.train.options import ObjectiveOptions
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
    "Fusion": "collegium.fusion.fuse",
    "LocalTeacher": "collegium.teachers.local",
    "Objective": "collegium.train.objective",
    "ObjectiveOptions": "collegium.train.options",
    "Recipe": "collegium.config.recipe",
    "distill": "collegium.run.pipeline",
    "load_recipe": "collegium.config.recipe",
}
"""Where each public name lives; it is imported when it is first asked for."""


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module `collegium` has no attribute `{name}`")
    import importlib

    from collegium.errors import check_versions

    check_versions()
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
