"""Version checks of installed packages, before anything is imported."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import pytest

import collegium
from collegium.errors import FLOORS, CollegiumError, check_versions
from refusals import refused

ROOT = Path(__file__).parents[1]


def test_the_installed_packages_are_safe() -> None:
    check_versions()


def test_the_floors_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package, (floor, flaw) in FLOORS.items():
        assert re.search(rf'"{package}>={re.escape(floor)}[",]', text), package
        assert re.fullmatch(r"CVE-\d{4}-\d+", flaw)


@pytest.mark.parametrize(
    ("version", "is_safe"),
    [
        ("2.5.1", False),
        ("2.9.1+cu128", False),
        ("2.10", True),
        ("2.10.0a0+git12", True),
        ("2.13.0+cpu", True),
        ("3.0", True),
        ("none", False),
    ],
)
def test_versions_are_compared_by_number(
    version: str, is_safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "torch" else "99")
    if is_safe:
        check_versions()
        return
    with refused(CollegiumError, f"torch: got version {version}; "):
        check_versions()


def test_lazy_names_of_the_package_check_versions_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    monkeypatch.delitem(vars(collegium), "Recipe", raising=False)
    with refused(CollegiumError, "torch: got version 1.0; "):
        collegium.Recipe
