"""Progress display and signals of a run."""

from __future__ import annotations

import io
import signal
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerState

from collegium.errors import TrainingError
from collegium.train.progress import StopCallback, TrainingProgress
from refusals import refused
from training_runs import FakeTeacher, trainer


def shown(folder: Path, *, terminal: bool, quiet: bool = False) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
    progress = TrainingProgress(quiet=quiet, console=console)
    teachers = [FakeTeacher("big"), FakeTeacher("old")]
    options = {"max_steps": 20, "logging_steps": 1}
    trainer(folder, teachers=teachers, options=options, callbacks=[progress]).train()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_a_line_per_tenth_is_printed(tmp_path: Path) -> None:
    lines = shown(tmp_path, terminal=False).splitlines()
    assert [line.split()[1] for line in lines] == [f"{2 * n}/20" for n in range(1, 11)]
    assert "loss " in lines[0]
    assert "tokens/s" in lines[0]
    assert "big 0.50 old 0.50" in lines[0]


def test_a_slow_run_prints_a_line_at_least_every_30_seconds_with_the_time_left() -> None:
    now = 0.0
    console = Console(file=io.StringIO(), width=200)
    progress = TrainingProgress(console=console, clock=lambda: now)
    state = TrainerState(max_steps=1000, global_step=400)  # resumed
    now = 500.0
    progress.on_train_begin(None, state, None)
    for _ in range(8):
        now += 12.0
        state.global_step += 1
        progress.on_step_end(None, state, None)
    progress.close()
    assert isinstance(console.file, io.StringIO)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert lines == ["step 403/1000  about 2.0 h left", "step 406/1000  about 2.0 h left"]


def test_a_line_is_printed_in_the_middle_of_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collegium.train.progress.SECONDS_PER_LINE", 0.15)
    console = Console(file=io.StringIO(), width=200)
    progress = TrainingProgress(console=console)
    progress.on_train_begin(None, TrainerState(max_steps=1000, global_step=3), None)
    time.sleep(0.5)
    progress.close()
    assert isinstance(console.file, io.StringIO)
    lines = [line.strip() for line in console.file.getvalue().splitlines()]
    assert 1 <= len(lines) <= 3
    assert set(lines) == {"step 3/1000"}
    time.sleep(0.2)
    assert len(console.file.getvalue().splitlines()) == len(lines)  # the thread has ended


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    text = shown(tmp_path, terminal=True)
    assert "20/20" in text
    assert "big 0.50 old 0.50" in text


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    for terminal in (True, False):
        assert shown(tmp_path / str(terminal), terminal=terminal, quiet=True) == ""


def test_the_bar_is_removed_after_an_error(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    progress = TrainingProgress(console=console)
    bad = FakeTeacher("bad", bad_call=1, bad_sample=2)
    made = trainer(
        tmp_path, teachers=[bad], options={"per_device_train_batch_size": 6}, callbacks=[progress]
    )
    with refused(TrainingError, "step 1: "):
        made.train()
    assert progress._bar is None


def test_signal_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT)
    stop = StopCallback()
    with stop.catching():
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_set_no_signal_handlers() -> None:
    seen = []

    def inside() -> None:
        with StopCallback().catching():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
