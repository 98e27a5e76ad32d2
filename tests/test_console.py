"""Console output: remaining times, and control characters that are shown, not obeyed."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from collegium import console
from collegium.cli import app
from collegium.console import printable, say
from collegium.report.tables import Column, Line, Table
from collegium.storage.records import ResultRow
from recipes_for_tests import minimal

TITLE = "\x1b]0;pwned\x07"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TITLE, r"\x1b]0;pwned\x07"),
        ("a\r\x9bb", r"a\x0d\x9bb"),
        ("\u202ecod", r"\u202ecod"),
        ("\ud800", r"\ud800"),
        ("é\t数\n😀", "é\t数\n😀"),
    ],
)
def test_control_characters_are_escaped(
    text: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printable(text) == expected
    say(text)
    assert capsys.readouterr().err == expected.expandtabs() + "\n"


@pytest.mark.parametrize(
    "recipe",
    [
        {TITLE: 1},
        {"seed": TITLE},
        {"teachers": {TITLE: {"model": "none"}}},
        {"student": {"model": "m", TITLE: "x"}},
        {"name": f"a{TITLE}"},
    ],
)
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_a_refusal_cannot_control_the_terminal(
    recipe: dict[str, object], debug: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(minimal(**{key: json.dumps(value) for key, value in recipe.items()}))
    if TITLE in recipe:
        file.write_text(minimal() + json.dumps(TITLE) + ": 1\n")
    result = CliRunner().invoke(app, [*debug, "check", str(file)])
    assert result.exit_code == 2, result.exception
    assert "pwned" in result.stderr
    assert not CONTROLS.search(result.stdout + result.stderr)


def test_tables_and_warnings_cannot_control_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = ResultRow(name=TITLE, kind="student")
    column = Column[ResultRow](TITLE, lambda row: 1.0, str)
    table = Table(TITLE, TITLE, [column], [Line(TITLE, row, group=TITLE)])
    Console(width=200).print(table.rich())
    CliRunner().invoke(app, ["init", "/"])
    record = logging.LogRecord("collegium", logging.WARNING, "", 0, "%s", (TITLE,), None)
    assert logging.lastResort is not None
    shown = capsys.readouterr().out + logging.lastResort.format(record)
    assert shown.count("pwned") == 6
    assert not CONTROLS.search(shown)


@pytest.mark.parametrize("burst", [1, 250, 4000])
@pytest.mark.parametrize("resumed_at", [0, 8000])
def test_the_remaining_time_is_right_however_work_is_reported(
    burst: int, resumed_at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loading takes 300 s, then batches of 4,000 items 90 s each, reported in bursts."""
    now = 0.0
    advance = console._line_printer("cache", lambda: now)
    now += 300
    for batch in range(5):
        now += 90
        for done in range(burst, 4001, burst):
            advance(resumed_at + 4000 * batch + done, resumed_at + 20_000)
        said = [int(minutes) for minutes in re.findall(r"(\d+) min", capsys.readouterr().err)]
        # Nothing is known at the first report; later there is a line a minute.
        assert len(said) == (batch > 0)
        truth = 90 * (4 - batch) / 60
        assert all(truth - 1 <= minutes <= truth + 2 for minutes in said)


def test_items_of_an_earlier_run_do_not_count_as_fast_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    advance = console._line_printer("cache", lambda: now)
    for seconds, done in ((300, 100), (400, 200), (600, 400), (700, 700)):
        now = seconds
        advance(done, 1000)
    said = re.findall(r"about (\d+) min", capsys.readouterr().err)
    # 100 items in 100 s and 800 left; 300 in 300 s, 600 left; 600 in 400 s, 300 left.
    assert said == ["13", "10", "3"]
