"""Progress of long loops without a terminal."""

from __future__ import annotations

import re

import pytest

from collegium import console


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
