"""Every way to get a `KEY=VALUE` of the command line wrong."""

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
