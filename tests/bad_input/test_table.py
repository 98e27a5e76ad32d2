"""The table in README.md lists every row of the catalog, with tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = re.findall(r"^\| (\d+) \|.*\|.*\|(.*)\|$", (HERE / "README.md").read_text("utf-8"), re.M)


def test_every_row_is_listed_once() -> None:
    assert [int(number) for number, _ in ROWS] == list(range(1, 83))


@pytest.mark.parametrize(("number", "places"), ROWS, ids=[number for number, _ in ROWS])
def test_the_tests_of_a_row_exist(number: str, places: str) -> None:
    names = re.findall(r"`([^`]+)`", places)
    files = [name for name in names if name.endswith((".py", "/"))]
    roots = (HERE, HERE.parents[1])
    paths = [root / file for file in files for root in roots if (root / file).exists()]
    assert len(paths) == len(files)
    text = "".join(path.read_text("utf-8") for path in paths if path.is_file())
    for name in set(names) - set(files):
        start = name.removesuffix("...")
        assert f'"{start}' in text or f"def {start}" in text, name
