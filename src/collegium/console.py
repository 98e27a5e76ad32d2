"""Console output of a run: one line per stage, a bar for long loops, nothing from libraries."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, Lock, Thread

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.text import Text

OnProgress = Callable[[int, int], None]
"""Called with the number of finished items and their total, first before the first item."""

SECONDS_PER_LINE = 30
_work: ContextVar[Work | None] = ContextVar("work", default=None)
"""The work in progress."""
_bar_console: ContextVar[Console | None] = ContextVar("bar_console", default=None)
"""The console of its bar."""
_is_silent = False
CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")
"""Loggers that warn at import of what a user cannot change, or in each layer."""
# C0 and C1 except for tab and newline, marks that reorder or break lines, and lone surrogates.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Escape control characters as in `\x1b`: text from files must not control a terminal."""
    return _CONTROLS.sub(lambda match: _escape(ord(match[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class _PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def escape_warnings() -> None:
    """Escape control characters in log records that no handler of the user shows."""
    assert logging.lastResort is not None
    logging.lastResort.setFormatter(_PrintableFormatter())


def silence() -> None:
    """Print no more lines and no progress in this process, one of several that work together."""
    global _is_silent
    _is_silent = True


def is_silent() -> bool:
    """Whether `silence` was called."""
    return _is_silent


def error_console() -> Console:
    """Return the console on standard error, which prints nothing in a silent process."""
    return Console(stderr=True, quiet=_is_silent)


def say(text: str) -> None:
    """Print a line to standard error, apart from the results on standard output."""
    # Above a bar, if there is one.
    console = _bar_console.get() or error_console()
    console.print(printable(text), soft_wrap=True, highlight=False, markup=False)


class Work:
    """Progress of one piece of work, made of parts, with one estimate of the time that is left.

    A part reports the items that are done and their total, first before its first item. The clock
    starts with the first report, so loading does not count, nor do items of an earlier run. The
    current part goes on at its own speed, later ones at that of all work so far, by their costs.
    """

    def __init__(
        self, title: str, costs: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self._title = title
        self._costs = dict(costs)
        self._part = next(iter(costs))
        self._finished = self._skipped = 0.0  # cost of finished parts; that of other runs
        self._done = self._total = 0
        self._started: float | None = None
        self._part_started: tuple[float, int] | None = None
        self._reported, self._interval = clock(), 0.0
        self._left: float | None = None
        self.on_report: Callable[[], None] = lambda: None

    def has_part(self, name: str) -> bool:
        """Whether this is the current part, or a later one."""
        return name in self._costs

    def part(self, name: str) -> OnProgress:
        """Begin a part. Return its callback (items done, all items)."""
        name = printable(name)
        while self._part != name:
            cost = self._costs.pop(self._part)
            self._finished += cost
            self._skipped += 0.0 if self._part_started else cost
            self._part, self._part_started = next(iter(self._costs)), None
            self._done = self._total = 0
        return self

    def __call__(self, done: int, total: int) -> None:
        """Report the finished items of the current part, and all of its items."""
        now = self.clock()
        self._done, self._total = done, total
        if self._part_started is None:
            self._part_started = now, done
            self._skipped += self._cost() - self._finished
        self._started = now if self._started is None else self._started
        self._left = self._estimate(now)
        self._reported, self._interval = now, now - self._reported
        self.on_report()

    def _cost(self) -> float:
        share = self._done / self._total if self._total else 0.0
        return self._finished + share * self._costs[self._part]

    def _estimate(self, now: float) -> float | None:
        assert self._started is not None
        assert self._part_started is not None
        cost = self._cost() - self._skipped
        if cost <= 0.0 or now == self._started:
            return None
        pace = (now - self._started) / cost
        in_part = pace * (self._finished + self._costs[self._part] - self._cost())
        began, first = self._part_started
        if self._done > first and now > began:
            in_part = (now - began) / (self._done - first) * (self._total - self._done)
        return in_part + pace * (sum(self._costs.values()) - self._costs[self._part])

    def seconds_left(self) -> float | None:
        """Return the estimate. None before something was done."""
        if self._left is None:
            return None
        # Work goes on between two reports, at most for as long as between the last two.
        return max(0.0, self._left - min(self.clock() - self._reported, self._interval))

    def share(self) -> float:
        """Return the finished share of the cost."""
        return self._cost() / (self._finished + sum(self._costs.values()))

    def line(self) -> str:
        """Describe the state in one line."""
        name = self._title if self._part == self._title else f"{self._title}, {self._part}"
        state = f"{self._done:,} of {self._total:,}" if self._total else "starting"
        return ", ".join(filter(None, (f"{name}: {state}", self.text_left())))

    def text_left(self) -> str:
        """Describe the remaining time, as in `about 5 min left`. Empty if it is unknown."""
        left = self.seconds_left()
        return "" if left is None else f"about {_duration(left)} left"


def _duration(seconds: float) -> str:
    """Return `40 s`, `5 min` or `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


@contextmanager
def progress(title: str, costs: Mapping[str, float] | None = None) -> Iterator[Work]:
    """Show progress: a bar on a terminal, elsewhere a line at least every 30 s.

    Inside of work that has a part of this title, that part begins, and nothing else is shown.

    `costs` are the relative costs of the parts, in their order. None for a single part.
    """
    title = printable(title)
    outer = _work.get()
    if outer is not None and outer.has_part(title):
        outer.part(title)
        yield outer
        return
    work = Work(title, {printable(name): cost for name, cost in (costs or {title: 1.0}).items()})
    token = _work.set(work)
    try:
        with _shown(work):
            yield work
    finally:
        _work.reset(token)


@contextmanager
def _shown(work: Work) -> Iterator[None]:
    console = error_console()
    if _is_silent or not console.is_terminal:
        with _lines(work):
            yield
        return
    with Progress(BarColumn(), _StateColumn(work), console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        work.on_report = lambda: bar.update(task, completed=work.share())
        token = _bar_console.set(console)
        try:
            yield
        finally:
            _bar_console.reset(token)


class _StateColumn(ProgressColumn):
    """The line of a piece of work. Its own estimate: that of rich forgets batches of 30 s."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def render(self, task: Task) -> Text:
        return Text(self._work.line())


@contextmanager
def _lines(work: Work) -> Iterator[None]:
    """Print the state as soon as the last line is `SECONDS_PER_LINE` old."""
    printed = work.clock()

    def show() -> None:
        nonlocal printed
        with lock:
            if work.clock() - printed >= SECONDS_PER_LINE:
                printed = work.clock()
                say(work.line())

    lock, work.on_report = Lock(), show
    with heartbeat(show, lambda: printed + SECONDS_PER_LINE - work.clock()):
        yield


@contextmanager
def heartbeat(beat: Callable[[], None], due_in: Callable[[], float]) -> Iterator[None]:
    """Call `beat` whenever it is due, in `due_in()` seconds, on a thread of its own.

    A batch or a step may take minutes, in which the thread that runs it prints nothing.
    """
    stopped = Event()

    def watch() -> None:
        while not stopped.wait(max(0.1, due_in())):
            beat()

    thread = Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def quiet_libraries() -> None:
    """Hide loading bars and advice of transformers. Errors are still shown."""
    # Imported here: `collegium --help` must not wait for transformers.
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
