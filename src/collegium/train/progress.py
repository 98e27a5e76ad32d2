"""Progress display of a training run, and its graceful stop on a signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from collegium.console import SECONDS_PER_LINE, Work, error_console, heartbeat


class TrainingProgress(TrainerCallback):
    """A progress bar on a terminal, else a line per 10 % of the steps, and at least every 30 s.

    Silent if `quiet`.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quiet = quiet
        self._clock = clock
        self._printed = 0.0
        self._work = Work("training", {"training": 1.0}, clock)
        self._console = console or error_console()
        self._bar: RichProgress | None = None
        self._last_tenth = 0
        self._text = ""
        # Reentrant: `_beat` prints through `_show`, which the trainer also calls directly.
        self._lock = RLock()
        self._heartbeat = ExitStack()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # A resumed run does not repeat the line of the tenth it resumes in.
        self._last_tenth = _tenth(state)
        self._text = ""
        self._printed = self._clock()
        self._work = Work("training", {"training": 1.0}, self._clock)
        self._work(state.global_step, state.max_steps)
        # One log for all processes.
        self._quiet = self._quiet or not state.is_world_process_zero
        if self._quiet:
            return
        if not self._console.is_terminal:
            beat = heartbeat(lambda: self._beat(state), self._due_in)
            self._heartbeat.enter_context(beat)
            return
        columns = (BarColumn(), MofNCompleteColumn())
        text = TextColumn("{task.fields[text]}")
        self._bar = RichProgress(TextColumn("training"), *columns, text, console=self._console)
        self._bar.add_task("training", total=state.max_steps, completed=state.global_step, text="")
        self._bar.start()

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self._text = _summary(kwargs["logs"])
            self._show(state)
        elif "eval_nll" in kwargs["logs"]:
            self._text += f"  validation NLL {kwargs['logs']['eval_nll']:.4f}"
            self._show(state, is_due=True)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._work(state.global_step, state.max_steps)
        if self._bar is not None:
            self._show(state)
        else:
            self._beat(state)

    def _beat(self, state: TrainerState) -> None:
        with self._lock:  # of the thread of the heartbeat, and of the one that trains
            if self._due_in() <= 0:
                self._show(state, is_due=True)

    def _due_in(self) -> float:
        return self._printed + SECONDS_PER_LINE - self._clock()

    def close(self) -> None:
        """Stop the thread, and remove the bar, also after an error."""
        self._heartbeat.close()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, state: TrainerState, *, is_due: bool = False) -> None:
        text = "  ".join(filter(None, (self._work.text_left(), self._text)))
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step, text=text)
        elif not self._quiet and (is_due or _tenth(state) > self._last_tenth):
            with self._lock:
                self._last_tenth, self._printed = _tenth(state), self._clock()
                line = f"step {state.global_step}/{state.max_steps}  {text}"
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _tenth(state: TrainerState) -> int:
    return 10 * state.global_step // max(state.max_steps, 1)


def _summary(logs: Mapping[str, Any]) -> str:
    prefix = "teacher_weights/"
    weights = [f"{k.removeprefix(prefix)} {v:.2f}" for k, v in logs.items() if k.startswith(prefix)]
    text = f"loss {logs['loss']:.4f}  {logs['tokens_per_s']:,.0f} tokens/s"
    return f"{text}  {' '.join(weights)}" if weights else text


class StopCallback(TrainerCallback):
    """Logs the last step regardless of `logging_steps`. Saves and stops after SIGINT or SIGTERM."""

    received: str | None = None
    """Name of the signal."""
    votes: Tensor | None = None
    """Number of processes with a signal when the step began. None in a single process."""

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Only record the first signal. A second one kills the process."""
        self.received = self.votes = None
        # Python delivers signals to the main thread only, and only that thread may set handlers.
        is_main = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        previous = {number: signal.signal(number, self._record) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _record(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number).name
        # A step may hang: with the default handlers a second Ctrl-C still stops it.
        for caught in (signal.SIGINT, signal.SIGTERM):
            signal.signal(caught, signal.SIG_DFL)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True
        if self._is_stopping():
            control.should_save = control.should_training_stop = True

    def _is_stopping(self) -> bool:
        if self.votes is None:
            return self.received is not None
        # A signal after the vote counts in the next step: all processes stop after the same one.
        if self.votes > 0:
            self.received = self.received or signal.SIGTERM.name
        return bool(self.votes > 0)
