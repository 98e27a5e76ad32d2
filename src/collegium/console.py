"""What a person sees while a run goes on: one line per stage, one bar for what takes long, nothing from libraries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_PER_LINE = 60


def say(text: str) -> None:
    """Print a line to standard error, where it does not mix with results."""
    Console(stderr=True, highlight=False, markup=False).print(text, soft_wrap=True)


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left for a loop that reports (done, total); without a terminal, a line a minute."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(title: str, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """Says how far a loop is and how long it will take, at most once in `SECONDS_PER_LINE`."""
    started = said = clock()
    begun: int | None = None

    def advance(done: int, total: int) -> None:
        nonlocal said, begun
        now = clock()
        if begun is None:
            begun = done  # what was done before costs no time
        if now - said < SECONDS_PER_LINE or done <= begun:
            return
        said = now
        left = (now - started) / (done - begun) * (total - done)
        say(f"{title}: {done:,} of {total:,}, about {max(1, round(left / 60)):,} min left")

    return advance


def quiet_libraries() -> None:
    """Keep loading bars and advice of the libraries off the screen; their warnings about errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
