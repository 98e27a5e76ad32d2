"""Recipe files that cannot be read, and every way to get a `KEY=VALUE` of the command line wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from collegium.cli import app
from recipes_for_tests import minimal


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_step=3", "train.max_step: unknown key; did you mean `max_steps`?"),
        ("trian.max_steps=3", "trian: unknown key; did you mean `train`?"),
        ("teachers.cod.dtype=float32", "teachers.cod.model: missing; must be given"),
        ("teachers.code.dtype=float33", None),
        ("seed=010", None),
        ("train.max_steps", "must be KEY=VALUE, for example train.max_steps=10"),
        ("data.train.5.path=x", None),
        ("seed.x=1", None),
        ("student.model=!!str x", None),
    ],
)
def test_bad_override(override: str, expected: str | None, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(minimal(seed="0"))
    result = CliRunner().invoke(app, ["run", str(path), override])
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    start = f"error: override `{override}`: "
    assert lines[0].startswith(start)
    if expected is not None:
        assert lines[0] == start + expected


def test_a_syntax_error_shows_the_place(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("student: a\nteachers\nseed: 3\n")
    lines = CliRunner().invoke(app, ["run", str(path)]).stderr.splitlines()
    assert lines[0] == "error: run.yaml:3: column 1: not valid YAML: could not find expected ':'"
    assert lines[1].strip() == "seed: 3"
    assert lines[2].strip().startswith("^")


def test_a_secret_is_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(minimal(student="{model: m, hf_token: canary-7f3a}"))
    result = CliRunner().invoke(app, ["--debug", "run", str(path)])
    assert result.exit_code == 2
    assert "canary-7f3a" not in result.output + result.stderr


def test_01_missing_file_names_its_neighbors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("")
    Path("b.yml").write_text("")
    result = CliRunner().invoke(app, ["check", "run.yml"])
    assert result.stderr == "error: run.yml: not found; recipes in ./: a.yaml, b.yml\n"
    assert result.exit_code == 2


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: caf\xe9\n")
    result = CliRunner().invoke(app, ["check", str(path)])
    expected = "error: run.yaml: byte 0xE9 at offset 9 is not UTF-8; save the file as UTF-8\n"
    assert (result.stderr, result.exit_code) == (expected, 2)
    folder = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert folder.stderr == f"error: {tmp_path}: is a folder; give the YAML file of a recipe\n"
    path.write_bytes(b"a: \x00\n")
    assert "not valid YAML" in CliRunner().invoke(app, ["check", str(path)]).stderr
    path.write_text("[" * 5000)
    assert CliRunner().invoke(app, ["check", str(path)]).exit_code == 2
    path.write_text("# " + "x" * 1_000_001)
    assert "must be at most 1000000" in CliRunner().invoke(app, ["check", str(path)]).stderr
