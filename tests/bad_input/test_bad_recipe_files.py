"""Unreadable recipe files and invalid `KEY=VALUE` overrides on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from collegium.cli import app
from recipes_for_tests import minimal
from refusals import check_message


def refusal(command: str, *arguments: str | Path) -> str:
    """Return the message of a refused command."""
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    assert result.exit_code == 2, result.exception
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("train.max_step=3", "train.max_step: "),
        ("trian.max_steps=3", "trian: "),
        ("teachers.cod.dtype=float32", "teachers.cod.model: "),
        ("teachers.code.dtype=float33", "teachers.code.dtype: "),
        ("seed=010", ""),
        ("train.max_steps", ""),
        ("data.train.5.path=x", ""),
        ("seed.x=1", ""),
        ("student.model=!!str x", ""),
    ],
)
def test_bad_override(override: str, path: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(minimal(seed="0"))
    message = refusal("run", file, override)
    assert "\n" not in message
    check_message(message, f"override `{override}`: {path}")


def test_a_syntax_error_shows_its_position(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("student: a\nteachers\nseed: 3\n")
    message = refusal("run", path)
    _, line, caret = message.splitlines()
    assert line.strip() == "seed: 3"
    assert caret.strip().startswith("^")
    check_message(message, "run.yaml:3: column 1: ")


def test_a_secret_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(minimal(student="{model: m, hf_token: canary-7f3a}"))
    result = CliRunner().invoke(app, ["--debug", "run", str(path)])
    assert result.exit_code == 2
    assert "canary-7f3a" not in result.output + result.stderr


def test_01_a_missing_file_lists_the_recipes_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("")
    Path("b.yml").write_text("")
    check_message(refusal("check", "run.yml"), "run.yml: ")


def test_a_recipe_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    check_message(refusal("check", path), "TMP/run.yaml: ")
    check_message(refusal("check", tmp_path), "TMP: ")
    path.write_bytes(b"a: \x00\n")
    check_message(refusal("check", path), "run.yaml:")
    path.write_text("[" * 5000)
    check_message(refusal("check", path), "run.yaml:1: ")
    path.write_text("# " + "x" * 1_000_001)
    check_message(refusal("check", path), "run.yaml: ")
