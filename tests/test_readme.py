"""Claims of the README: a complete file map, working links, a valid recipe."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_map_names_every_package_on_few_lines() -> None:
    root = ROOT / "src" / "collegium"
    names = {f"`{path.name}/`" for path in root.iterdir() if (path / "__init__.py").exists()}
    names |= {f"`{path.name}`" for path in root.glob("[!_]*.py")}
    section = README.partition("## Source map")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert {cell for row in rows for cell in re.findall(r"`[^`]+`", row.split("|")[1])} == names
    assert len(section.splitlines()) <= 40


def test_every_link_points_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_recipe_in_it_decodes(tmp_path: Path) -> None:
    from collegium.config.recipe import load_recipe

    blocks = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "recipe.yaml").write_text(blocks[0], encoding="utf-8")
    assert list(load_recipe(tmp_path / "recipe.yaml").teachers) == ["code", "law"]


@pytest.mark.parametrize("command", re.findall(r"^collegium (\w+)", README, flags=re.MULTILINE))
def test_every_command_in_it_exists(command: str) -> None:
    from collegium import cli

    assert hasattr(cli, command)
