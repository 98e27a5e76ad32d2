"""Console output of a run: one line per stage, a bar for long loops, nothing from libraries."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_PER_LINE = 60
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


def say(text: str) -> None:
    """Print a line to standard error, apart from the results on standard output."""
    Console(stderr=True, highlight=False, markup=False).print(printable(text), soft_wrap=True)


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) that draws a bar. Without a terminal, one line a minute."""
    console, title = Console(stderr=True), printable(title)
    if not console.is_terminal:
        yield _line_printer(title)
        return
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _line_printer(
    title: str, clock: Callable[[], float] = time.monotonic
) -> Callable[[int, int], None]:
    """Print progress and remaining time, at most once per `SECONDS_PER_LINE`."""
    printed = clock()
    first: tuple[float, int] | None = None

    def advance(done: int, total: int) -> None:
        nonlocal printed, first
        now = clock()
        # The rate is that since the first report: earlier time went into loading, and earlier items
        # were finished by a run that this one resumes.
        if first is None:
            first = now, done
        started, finished = first
        if now - printed < SECONDS_PER_LINE or done <= finished or now == started:
            return
        printed = now
        left = (now - started) / (done - finished) * (total - done)
        say(f"{title}: {done:,} of {total:,}, about {max(1, round(left / 60)):,} min left")

    return advance


def quiet_libraries() -> None:
    """Hide loading bars and advice of transformers. Errors are still shown."""
    # Imported here: `collegium --help` must not wait for transformers.
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
