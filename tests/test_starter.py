"""`collegium init` with models and text writes a recipe that passes `check`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny
from collegium.cli import app
from collegium.config.recipe import load_recipe
from collegium.config.starter import shipped_recipes, starter_recipe
from collegium.errors import RecipeError
from collegium.options import plain
from refusals import refused
from tiny_run import recipe_text, write_zoo


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


@pytest.fixture
def base(zoo: Path) -> Path:
    """A recipe with everything that may conflict with other models and text."""
    file = zoo / "base.yaml"
    text = recipe_text(zoo).replace("objective:", "# Kept.\nobjective:")
    file.write_text(text.replace("  max_length: 32", "  max_length: 4096\n  validation: []"))
    return file


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--data", "code.jsonl"],
        ["--teacher", "scripture"],
        ["--teacher", "code", "--teacher", "other", "--student-from", "other"],
        ["--teacher", "other", "--data", "*.jsonl", "--student", "code"],
    ],
)
def test_a_changed_recipe_passes_check(zoo: Path, base: Path, arguments: list[str]) -> None:
    tiny.save_tiny(zoo / "other", seed=9)
    base.write_text(base.read_text().replace("4096", "64" if len(arguments) < 3 else "4096"))
    source = "base" if arguments else "base.yaml"
    result = CliRunner().invoke(app, ["init", "mine.yaml", "--from", source, *arguments])
    assert result.exit_code == 0, result.output
    old, recipe = plain(load_recipe("base.yaml")), plain(load_recipe("mine.yaml"))
    assert (recipe["name"], recipe["output_dir"]) == ("mine", "runs/mine")
    for key in ("objective", "train", "preflight", "evaluate", "fusion"):
        assert recipe[key] == old[key]
    given = [value for flag, value in pairwise(arguments) if flag == "--teacher"]
    assert list(recipe["teachers"]) == (given or list(old["teachers"]))
    texts = [value for flag, value in pairwise(arguments) if flag == "--data"]
    paths = [source["path"] for source in recipe["data"]["train"]]
    assert paths == (texts or [source["path"] for source in old["data"]["train"]])
    assert "# Kept." in (zoo / "mine.yaml").read_text()
    result = CliRunner().invoke(app, ["check", "mine.yaml"])
    assert result.exit_code == 0, result.output


def test_every_shipped_recipe_is_a_base(zoo: Path) -> None:
    assert {"demo", "demo-quick"} <= shipped_recipes().keys()
    for name in shipped_recipes():
        (zoo / "a.yaml").write_text(starter_recipe(Path("a.yaml"), base=name))
        assert load_recipe("a.yaml").name == "a"
    # Models and text of one's own make a demo recipe pass.
    given = ["--teacher", "scripture", "--teacher", "code", "--data", "*.jsonl"]
    result = CliRunner().invoke(app, ["init", "mine.yaml", "--from", "recipes/demo", *given])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["check", "mine.yaml"])
    assert result.exit_code == 0, result.output


def test_a_base_that_names_other_teachers_is_refused(zoo: Path, base: Path) -> None:
    cut = base.read_text().split("student:")[0] + "student: {from_layers: {teacher: code, keep: 1}}"
    base.write_text(cut + "\nteachers:" + base.read_text().split("teachers:")[1])
    with refused(RecipeError, "init: --from base.yaml: "):
        starter_recipe(Path("a.yaml"), base="base.yaml", teachers=["scripture"])


@pytest.mark.parametrize("name", ["recipes/law", "code.jsonl", "text.yaml"])
def test_other_bases_are_refused(zoo: Path, name: str) -> None:
    (zoo / "text.yaml").write_text("just text")
    with refused(RecipeError, "init: --from: "):
        starter_recipe(Path("a.yaml"), base=name)


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
