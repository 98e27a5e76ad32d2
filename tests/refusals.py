"""Errors in tests: kind and path are asserted, the wording is frozen in `tests/messages.txt`.

A message is a product surface, so its exact words exist once, where a reviewer reads them in a
diff. After a change of wording run `pytest --update-messages` and read that diff.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

SNAPSHOT = Path(__file__).parent / "messages.txt"
UPDATE = "COLLEGIUM_UPDATE_MESSAGES"
_TEMPORARY = re.compile(
    r"(?:/[\w.@+-]+)*/pytest-of-[\w.-]+/pytest-\d+/(?:popen-gw\d+/)?[\w.-]+?\d+(?=/|\b)"
)
_DIGEST = re.compile(r"\b[0-9a-f]{12,}\b")
_asked: Counter[str] = Counter()


@contextlib.contextmanager
def refused(kind: type[Exception], where: str = "", *, volatile: str = "") -> Iterator[None]:
    """Expect an error of exactly this kind whose first line starts with the path `where`.

    Args:
        kind: class of the error; a subclass does not pass.
        where: the path that the message starts with, such as `train.max_steps`. Empty for none.
        volatile: pattern of the parts that differ between machines, such as free bytes.
    """
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind, type(caught.value)
    check_message(str(caught.value), where, volatile=volatile)


def check_message(text: str, where: str = "", *, volatile: str = "") -> None:
    """Compare a message with the snapshot of the current test."""
    text = stable(text, volatile)
    assert text.startswith(where), text
    key = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    _asked[key] += 1
    key += f" #{_asked[key]}" if _asked[key] > 1 else ""
    if os.environ.get(UPDATE):
        _record(key, text)
        return
    assert text == read_snapshot().get(key), (
        f"{key}\n{text}\nnot in {SNAPSHOT.name}; see refusals.py"
    )


def stable(text: str, volatile: str = "") -> str:
    """The message without temporary folders, digests and what `volatile` matches."""
    text = _DIGEST.sub("DIGEST", _TEMPORARY.sub("TMP", text))
    return re.sub(volatile, "...", text) if volatile else text


def read_snapshot() -> dict[str, str]:
    """Message by test; a line of a test's name is followed by its message, indented."""
    messages: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in SNAPSHOT.read_text(encoding="utf-8").split("\n") if SNAPSHOT.exists() else ():
        if line.startswith("    "):
            lines.append(line[4:])
        elif line:
            lines = messages.setdefault(line, [])
    return {key: "\n".join(lines) for key, lines in messages.items()}


def write_snapshot(messages: dict[str, str]) -> None:
    """Sorted by test, so that a diff shows what changed and nothing else."""
    blocks = []
    for key in sorted(messages):
        body = "\n".join(f"    {line}" for line in messages[key].split("\n"))
        blocks.append(f"{key}\n{body}\n")
    SNAPSHOT.write_text("\n".join(blocks), encoding="utf-8")


def _record(key: str, text: str) -> None:
    with SNAPSHOT.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_snapshot({**read_snapshot(), key: text})
