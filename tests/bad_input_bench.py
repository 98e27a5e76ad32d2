"""A tiny valid run to break in one place, and the checks common to all refusals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner, Result

from collegium.cli import app
from refusals import check_message, stable

MAX_SECONDS = 10
"""Processor time of a refusal: far more than a check takes on a slow machine, less than a run."""
LOADERS = (
    "collegium.models.loading.load_model",
    "collegium.models.loading.build_model",
    "collegium.teachers.local.load_base",
    "collegium.models.student.StudentOptions.build",
)


@dataclass(frozen=True)
class Bench:
    """A folder with `run.yaml` and the models and texts it names, in `zoo/`."""

    root: Path

    def invoke(self, *arguments: str) -> Result:
        """Invoke the command line once."""
        return CliRunner().invoke(app, list(arguments))

    def refused(self, where: str, *overrides: str, command: str = "run", volatile: str = "") -> str:
        """Expect a refusal: exit code 2, no traceback, fast, nothing written. Return the message.

        The message must start with the path `where`. All of it is compared with the snapshot, where
        parts that match `volatile` are left out.
        """
        before, start = self.files(), time.process_time()
        result = self.invoke(command, "run.yaml", *overrides)
        seconds = time.process_time() - start
        assert result.stderr.startswith("error: "), result.stderr or result.exception
        assert result.stderr.endswith("\n")
        message = result.stderr.removeprefix("error: ").removesuffix("\n")
        check_message(message, stable(where, volatile), volatile=volatile)
        assert (result.exit_code, result.stdout) == (2, "")
        assert isinstance(result.exception, SystemExit)
        assert self.files() == before
        assert seconds < MAX_SECONDS
        return message

    def refused_at(self, rest: str, *overrides: str) -> None:
        """Run `refused` on a message about some training row. `rest` follows its path."""
        self.refused(f"data.train: ...{rest}", *overrides, volatile=r"zoo/\w+\.jsonl:\d+")

    def accepted(self, *overrides: str) -> list[str]:
        """Return the lines that `check` prints for a valid run; nothing is written."""
        before = self.files()
        result = self.invoke("check", "run.yaml", *overrides)
        assert (result.exit_code, result.stderr) == (0, ""), result.stderr or result.exception
        assert self.files() == before
        return result.stdout.splitlines()

    def files(self) -> dict[Path, tuple[int, int]]:
        """Return the size and mtime of every file and folder."""
        stats = ((path, path.lstat()) for path in self.root.rglob("*"))
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats}

    def edit(self, name: str, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
        """Edit a JSON file in place."""
        path = self.root / name
        value = json.loads(path.read_text(encoding="utf-8"))
        change(value)
        path.write_text(json.dumps(value), encoding="utf-8")
