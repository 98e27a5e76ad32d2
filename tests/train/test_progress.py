"""What a run shows."""

from __future__ import annotations

import io
import signal
import threading
from pathlib import Path

import pytest
from rich.console import Console

from collegium.errors import TrainingError
from collegium.train.progress import Progress, StopSignals
from training_runs import FakeTeacher, trainer


def shown(folder: Path, *, terminal: bool, quiet: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    progress = Progress(quiet=quiet, console=console)
    teachers = [FakeTeacher("big"), FakeTeacher("old")]
    options = {"max_steps": 20, "logging_steps": 1}
    trainer(folder, teachers=teachers, options=options, callbacks=[progress]).train()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_away_from_a_terminal_there_is_a_line_per_tenth(tmp_path: Path) -> None:
    lines = shown(tmp_path, terminal=False).splitlines()
    assert [line.split()[1] for line in lines] == [f"{2 * n}/20" for n in range(1, 11)]
    assert "loss " in lines[0]
    assert "tokens/s" in lines[0]
    assert "big 0.50 old 0.50" in lines[0]


def test_on_a_terminal_there_is_a_bar(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=True)
    assert "20/20" in text
    assert "big 0.50 old 0.50" in text


def test_quiet_shows_nothing(tmp_path: Path) -> None:
    for terminal in (True, False):
        assert shown(tmp_path / str(terminal), terminal=terminal, quiet=True) == ""


def test_the_bar_is_taken_away_after_an_error(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    progress = Progress(console=console)
    bad = FakeTeacher("bad", bad_call=1, bad_sample=2)
    made = trainer(
        tmp_path,
        teachers=[bad],
        options={"per_device_train_batch_size": 6},
        callbacks=[progress],
    )
    with pytest.raises(TrainingError, match="teacher `bad`"):
        made.train()
    assert progress._bar is None


def test_signals_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_leaves_signals_alone() -> None:
    seen = []

    def inside() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
