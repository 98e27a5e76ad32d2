"""Public names of the package, and the cost of importing it."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

import collegium

NAMES = [
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


def test_the_names_are_frozen() -> None:
    assert collegium.__all__ == NAMES
    assert set(NAMES) <= set(dir(collegium))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_can_be_imported(name: str) -> None:
    value = getattr(collegium, name)
    assert value is getattr(collegium, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute `Distiller`"):
        collegium.Distiller  # type: ignore[attr-defined]


def test_the_version_matches_the_package_metadata() -> None:
    assert collegium.__version__ == metadata.version("collegium")


def test_importing_the_package_is_light() -> None:
    program = (
        "import sys, collegium; dir(collegium); collegium.__version__;"
        "print(sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "[]\n"
