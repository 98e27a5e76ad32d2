"""Progress display of a training run, and its graceful stop on a signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingProgress(TrainerCallback):
    """A progress bar on a terminal, else a line per 10 % of the steps. Silent if `quiet`."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._quiet = quiet
        self._console = console or Console(stderr=True)
        self._bar: RichProgress | None = None
        self._last_tenth = 0
        self._text = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run does not repeat the line of the tenth it resumes in.
        self._last_tenth = 10 * state.global_step // max(state.max_steps, 1)
        self._text = ""
        if self._quiet or not self._console.is_terminal:
            return
        self._bar = RichProgress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._console,
        )
        self._bar.add_task("training", total=state.max_steps, completed=state.global_step, text="")
        self._bar.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs:
            self._text = _summary(logs)
            self._show(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._show(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, state: TrainerState) -> None:
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=state.global_step, text=self._text)
            return
        tenth = 10 * state.global_step // max(state.max_steps, 1)
        if not self._quiet and tenth > self._last_tenth:
            self._last_tenth = tenth
            self._console.print(
                f"step {state.global_step}/{state.max_steps}  {self._text}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


def _summary(logs: Mapping[str, Any]) -> str:
    prefix = "teacher_weights/"
    weights = " ".join(
        f"{name.removeprefix(prefix)} {value:.2f}"
        for name, value in logs.items()
        if name.startswith(prefix)
    )
    text = f"loss {logs['loss']:.4f}  {logs['tokens_per_s']:,.0f} tokens/s"
    return f"{text}  {weights}" if weights else text


class StopSignals:
    """Context that only records the first SIGINT or SIGTERM. A second one kills the process."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python delivers signals to the main thread only, and only that thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        # A step may hang: with the default handlers a second Ctrl-C still stops it.
        for caught in self._previous:
            signal.signal(caught, signal.SIG_DFL)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


class StopCallback(TrainerCallback):
    """Logs the last step regardless of `logging_steps`. Saves and stops after a signal."""

    def __init__(self) -> None:
        self.signals = StopSignals()

    def fresh_signals(self) -> StopSignals:
        """Discard the signals of an earlier run."""
        self.signals = StopSignals()
        return self.signals

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self.signals.received is not None:
            control.should_save = True
            control.should_training_stop = True
