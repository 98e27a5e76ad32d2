"""Chat templates, rendered in a process of their own: under a deadline, with a fixed date.

A template is a program of somebody else, in the sandbox of jinja2. That sandbox limits neither its
time nor its memory, and the template reads the clock. One worker process serves all templates, and
is killed if a row does not end.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from time import monotonic
from typing import IO, Any, BinaryIO

from collegium.errors import DataError

SECONDS = 10.0
"""Deadline of a row. An ordinary row takes 0.1 ms."""
SECONDS_PER_ROW = 0.05
"""Mean time that each further row of a call may take."""
START_SECONDS = 120.0
MAX_CHARACTERS = 1 << 26
"""Longest text of a row."""
MAX_MEMORY = 1 << 32
"""Address space of the worker, in bytes."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of a row."""

    text: str = ""
    spans: Sequence[tuple[int, int]] = ()
    """Characters [start, end) inside the `{% generation %}` blocks of the template."""
    error: str | None = None
    """The reason why there is no text, such as `fails (UndefinedError: ...)`."""


class TemplateRenderer:
    """Renders rows with one chat template, in order."""

    def __init__(
        self,
        template: str,
        *,
        now: datetime,
        special_tokens: Mapping[str, Any] | None = None,
        seconds: float = SECONDS,
    ) -> None:
        """Keep the template. The worker starts with the first row of all renderers.

        Args:
            now: the date that `strftime_now` of the template formats.
            special_tokens: names such as `bos_token` that the template reads.
            seconds: deadline of a row.
        """
        self._job = {
            "template": template,
            "special_tokens": dict(special_tokens or {}),
            "now": now.isoformat(),
            "seconds": seconds,
        }
        self._seconds = seconds
        self._failure: str | None = None

    def render(self, rows: Sequence[Mapping[str, Any]]) -> list[Rendered]:
        """Render rows of `messages`, and optionally `tools` and other variables of the template.

        All values are plain JSON. A row that fails has an `error`. After a row that does not end
        or exhausts the memory, all later ones have its error too.

        Raises DataError if the worker process cannot start.
        """
        rendered: list[Rendered] = []
        if self._failure is not None:
            return [Rendered(error=self._failure) for _ in rows]
        worker, started = _shared_worker(), monotonic()
        worker.send({**self._job, "rows": list(rows)})
        for number in range(len(rows)):
            if self._failure is None:
                budget = self._seconds + number * SECONDS_PER_ROW - (monotonic() - started)
                reply = worker.receive(max(budget, 0.0))
                if isinstance(reply, dict):
                    spans = [(int(start), int(end)) for start, end in reply.pop("spans", ())]
                    rendered.append(Rendered(spans=spans, **reply))
                    continue
                self._fail(reply)
            rendered.append(Rendered(error=self._failure))
        return rendered

    def _fail(self, reason: str | None) -> None:
        limit = f"does not end within {self._seconds:g} s"
        self._failure = limit if reason is None else reason
        close()


_workers: list[_Worker] = []


def _shared_worker() -> _Worker:
    # Starting one takes a second, for the import of transformers.
    if not _workers:
        _workers.append(_Worker())
    return _workers[0]


def close() -> None:
    """End the worker. A later row starts another one."""
    while _workers:
        _workers.pop().kill()


def _forget_workers() -> None:
    # A forked process has no thread that reads the replies, and must not kill its parent's worker.
    for worker in _workers:
        worker.kill.detach()
    _workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


class _Worker:
    """The process, and a thread that reads its replies: a pipe cannot be read with a deadline."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # Threads of BLAS would reserve address space.
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "collegium.data.render"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise DataError(
                f"chat template: its process cannot start ({error.strerror}); must be allowed to; "
                "raise the limit on processes"
            ) from error
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin = process.stdin
        self._replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        reading = partial(_read_replies, process.stdout, self._replies.put)
        threading.Thread(target=reading, daemon=True).start()
        self.kill = weakref.finalize(self, _end, process)
        if self.receive(START_SECONDS) != {}:
            self.kill()
            raise DataError(
                "chat template: its process did not start; must be able to import transformers; "
                "set PYTHONPATH"
            )

    def send(self, value: Any) -> None:
        with suppress(OSError):  # it has died, which `receive` reports
            self._stdin.write(json.dumps(value).encode("ascii") + b"\n")
            self._stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any] | str | None:
        """Return a reply, a reason for its absence, or None after the deadline."""
        try:
            reply = self._replies.get(timeout=seconds)
        except queue.Empty:
            return None
        return "exhausts its memory, or ends its process" if reply is None else reply


def _read_replies(stream: IO[bytes], put: Callable[[dict[str, Any] | None], None]) -> None:
    with stream:
        for line in stream:
            put(json.loads(line))
    put(None)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stdin is not None
    with suppress(OSError):  # of text that the worker did not read
        process.stdin.close()


def _serve(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """Answer requests until the standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from transformers.utils import chat_template_utils

    _limit_memory()
    _reply(stdout, {})
    for line in stdin:
        job = json.loads(line)
        now = datetime.fromisoformat(job["now"])
        render = partial(
            chat_template_utils.render_jinja_template,
            chat_template=job["template"],
            return_assistant_tokens_mask="endgeneration" in job["template"],
        )
        for row in job["rows"]:
            # Ends the process if its parent was killed while a row is rendered.
            _alarm(3 + int(3 * job["seconds"]))
            try:
                # Compiled here: a constant expression of a template is evaluated by the compiler.
                template = chat_template_utils._compile_jinja_template(job["template"])
                template.environment.globals["strftime_now"] = now.strftime
                variables = {**job["special_tokens"], **row}
                (text,), indices = render([variables.pop("messages")], **variables)
                reply = {"text": text, "spans": indices[0] if indices else []}
                if len(text) > MAX_CHARACTERS:
                    problem = f"writes {len(text):,} characters; must write at most "
                    reply = {"error": f"{problem}{MAX_CHARACTERS:,}"}
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                reply = {"error": f"fails ({reason:.500})"}
            _reply(stdout, reply)
            _alarm(0)


def _reply(stdout: BinaryIO, reply: Mapping[str, Any]) -> None:
    stdout.write(json.dumps(reply).encode("ascii") + b"\n")
    stdout.flush()


def _alarm(seconds: int) -> None:
    if sys.platform != "win32":
        signal.alarm(seconds)


def _limit_memory() -> None:
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = MAX_MEMORY if hard == resource.RLIM_INFINITY else min(MAX_MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
