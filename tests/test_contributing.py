"""The examples of CONTRIBUTING.md, applied to a copy of the package and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_run

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^### An? (.+?)\n(.*?)(?=^##)", TEXT, flags=re.DOTALL | re.MULTILINE))
STEP = re.compile(
    r"^(?:(?P<verb>Create|Insert above `(?P<above>\w+)` in|Add to `(?P<table>\w+)` in)"
    r" `(?P<path>.+?)`"
    r"|Run):\n```python\n(?P<code>.*?)```",
    flags=re.DOTALL | re.MULTILINE,
)


def apply(step: re.Match[str], root: Path) -> None:
    path = root / step["path"]
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if step["verb"] == "Create":
        assert not text, f"{path} exists already"
        text = step["code"]
    elif step["above"]:
        text, count = re.subn(
            rf"^{step['above']}\b", lambda found: step["code"] + "\n\n" + found[0], text, flags=re.M
        )
        assert count == 1, f"{step['above']} is defined {count} times in {path}"
    else:
        table = re.compile(rf"^({step['table']}: [^{{]+{{)(.*?)(\n?}})$", re.DOTALL | re.MULTILINE)
        text, count = table.subn(
            lambda found: f"{found[1]}{found[2].rstrip().rstrip(',')},\n{step['code']}}}", text
        )
        assert count == 1, f"{step['table']} is defined {count} times in {path}"
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_works_as_written(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src")
    (tmp_path / "collegium.yaml").write_text(
        tiny_run.recipe_text(tiny_run.write_zoo(tmp_path)), encoding="utf-8"
    )
    *edits, run = STEP.finditer(EXAMPLES[name])
    assert edits
    assert not run["verb"]
    for step in edits:
        apply(step, tmp_path)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", run["code"]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def test_there_is_an_example_of_each_extension() -> None:
    assert list(EXAMPLES) == ["divergence", "weighting with a fit", "kind of teacher", "artifact"]
