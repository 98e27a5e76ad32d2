"""Console output: remaining times, and control characters that are shown, not obeyed."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from collegium import console
from collegium.cli import app
from collegium.console import Work, printable, progress, say
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


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def seconds_left(work: Work) -> float:
    left = work.seconds_left()
    assert left is not None
    return left


@pytest.mark.parametrize(
    ("burst", "is_announced"), [(1, True), (250, True), (4000, True), (4000, False)]
)
@pytest.mark.parametrize("resumed_at", [0, 8000])
def test_the_remaining_time_is_right_however_work_is_reported(
    burst: int, resumed_at: int, is_announced: bool
) -> None:
    """Loading takes 300 s, then batches of 4,000 items 90 s each, reported in bursts."""
    clock = Clock()
    work = Work("cache", {"cache": 1.0}, clock)
    clock.now += 300
    total = resumed_at + 20_000
    if is_announced:
        work(resumed_at, total)
    for batch in range(5):
        clock.now += 90
        for done in range(burst, 4001, burst):
            work(resumed_at + 4000 * batch + done, total)
        if batch == 0 and not is_announced:
            # Nothing is known about the speed at the first report.
            assert work.seconds_left() is None
        else:
            assert seconds_left(work) == pytest.approx(90 * (4 - batch), rel=0.3)
            clock.now += 45
            assert seconds_left(work) >= 90 * (4 - batch) - 46
            clock.now -= 45


def test_the_estimate_covers_all_parts_and_corrects_wrong_costs() -> None:
    """Parts that cost half or twice as much as expected, each after 20 s of loading."""
    truth = {"a": 300.0, "b": 300.0, "c": 600.0}  # seconds
    costs = {"a": 1.0, "b": 1.5, "c": 1.5}
    clock, ends = Clock(), sum(truth.values()) + 40.0
    work = Work("preflight", costs, clock)
    for number, (name, seconds) in enumerate(truth.items()):
        clock.now += 20.0 if number else 0.0
        report = work.part(name)
        report(0, 10)
        for batch in range(10):
            clock.now += seconds / 10
            report(batch + 1, 10)
            left = ends - clock.now
            if clock.now > 60 and left > 0:
                assert left / 2 < seconds_left(work) < left * 2
    assert work.share() == pytest.approx(1.0)
    assert work.line() == "preflight, c: 10 of 10, about 1 s left"


def test_parts_of_an_earlier_run_do_not_count_as_fast_ones() -> None:
    clock = Clock()
    work = Work("cache", {"a": 1.0, "b": 1.0, "c": 1.0}, clock)
    work.part("a")(10, 10)
    report = work.part("c")  # all of b exists
    report(5, 10)
    clock.now = 100.0
    report(6, 10)
    assert seconds_left(work) == pytest.approx(400.0)


def test_a_line_is_due_every_30_seconds_even_within_a_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "SECONDS_PER_LINE", 0.15)
    with progress("reading", {"one": 1.0, "two": 3.0}) as work:
        time.sleep(0.25)
        work.part("one")(0, 8)
        time.sleep(0.25)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading, one: starting"
    assert lines[-1] == "reading, one: 0 of 8"
    assert 2 <= len(lines) <= 4


def test_a_report_prints_a_line_that_is_due(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    work = Work("cache", {"cache": 1.0}, clock)
    with console._lines(work):
        for _ in range(10):
            clock.now += 10
            work(int(clock.now), 1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "cache: 30 of 1,000, about 16 min left",
        "cache: 60 of 1,000, about 16 min left",
        "cache: 90 of 1,000, about 15 min left",
    ]


def test_a_terminal_gets_a_bar_with_the_same_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=120)
    monkeypatch.setattr(console, "Console", lambda **_: terminal)
    with progress("cache") as work:
        work(0, 1000)
        time.sleep(0.2)
        work(400, 1000)
        time.sleep(0.3)
    assert "cache: 400 of 1,000, about 1 s left" in stream.getvalue()


def test_work_inside_of_a_part_shows_nothing_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("cache", {"base": 1.0, "law": 1.0}) as work:
        with progress("base") as inner:
            assert inner is work
            inner(5, 5)
        with progress("law") as inner:
            inner(0, 5)
            assert work.line() == "cache, law: 0 of 5"
            assert work.share() == 0.5
        with progress("other") as other:
            assert other is not work
    assert capsys.readouterr().err == ""
