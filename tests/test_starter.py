"""`collegium init` with models and text writes a recipe that passes `check`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from collegium.cli import app
from collegium.config.recipe import load_recipe
from collegium.config.starter import starter_recipe
from collegium.errors import RecipeError
from collegium.options import plain
from refusals import refused
from tiny_run import write_zoo


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(write_zoo(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "student"),
    [
        (
            ["--student-from", "code"],
            {"from_layers": {"teacher": "code", "keep": 1, "num_layers": None}},
        ),
        (["--student", "scripture"], {"model": "scripture"}),
    ],
)
def test_recipe_passes_check(zoo: Path, arguments: list[str], student: dict[str, object]) -> None:
    given = ["--teacher", "scripture", "--teacher", "code", "--data", "*.jsonl", *arguments]
    result = CliRunner().invoke(app, ["init", "mine.yaml", *given])
    assert result.exit_code == 0, result.output
    recipe = load_recipe("mine.yaml")
    assert list(recipe.teachers) == ["scripture", "code"]
    # The tiny models have no more positions.
    assert recipe.data.max_length == 128
    assert student.items() <= plain(recipe.student).items()
    result = CliRunner().invoke(app, ["check", "mine.yaml"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["init", "mine.yaml", *given])
    assert "already exists" in result.output


def test_names_are_distinct(zoo: Path) -> None:
    (zoo / "other").mkdir()
    (zoo / "scripture").rename(zoo / "other" / "code")
    text = starter_recipe(
        Path("a.yaml"), teachers=["code", "other/code"], data=["code.jsonl"], student="code"
    )
    (zoo / "a.yaml").write_text(text)
    assert list(load_recipe("a.yaml").teachers) == ["code", "code-2"]


@pytest.mark.parametrize(
    "options",
    [
        {"teachers": [], "data": ["a.txt"], "student": "code"},
        {"teachers": ["code"], "data": [], "student": "code"},
        {"teachers": ["code"], "data": ["a.txt"]},
        {"teachers": ["code"], "data": ["a.txt"], "student": "code", "student_from": "code"},
        {"teachers": ["code"], "data": ["a.txt"], "student_from": "law"},
    ],
)
def test_missing_parts_are_named(zoo: Path, options: dict[str, list[str]]) -> None:
    with refused(RecipeError, "init: "):
        starter_recipe(Path("a.yaml"), **options)  # type: ignore[arg-type]
