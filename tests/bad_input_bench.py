"""A tiny run that would work, to be broken in one place, and what every refusal has in common."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner, Result

from collegium.cli import app

MAX_SECONDS = 3
LOADERS = (
    "collegium.models.loading.load_model",
    "collegium.teachers.local.load_model",
    "collegium.student.load_model",
    "collegium.student.build_model",
    "collegium.workspace.build_student",
)


@dataclass(frozen=True)
class Bench:
    """A folder with `run.yaml` and the models and texts that it names, below `zoo/`."""

    root: Path

    def invoke(self, *arguments: str) -> Result:
        """One call of the command line."""
        return CliRunner().invoke(app, list(arguments))

    def refused(self, expected: str, *overrides: str, command: str = "run") -> None:
        """The whole message, exit code 2, no traceback, quick, and nothing written."""
        before, start = self.files(), time.process_time()
        result = self.invoke(command, "run.yaml", *overrides)
        seconds = time.process_time() - start
        assert result.stderr == f"error: {expected}\n", result.stderr or result.exception
        assert (result.exit_code, result.stdout) == (2, "")
        assert isinstance(result.exception, SystemExit)
        assert self.files() == before
        assert seconds < MAX_SECONDS

    def refused_at(self, expected: str, *overrides: str) -> None:
        """`refused` where the message begins with the place of a training row, whichever comes first."""
        result = self.invoke("run", "run.yaml", *overrides)
        place = re.match(r"error: (data\.train: zoo/\w+\.jsonl:\d+)", result.stderr)
        assert place, result.stderr or result.exception
        self.refused(place[1] + expected, *overrides)

    def accepted(self, *overrides: str) -> list[str]:
        """The lines that `check` prints for a run that would work; nothing is written."""
        before = self.files()
        result = self.invoke("check", "run.yaml", *overrides)
        assert (result.exit_code, result.stderr) == (0, ""), result.stderr or result.exception
        assert self.files() == before
        return result.stdout.splitlines()

    def files(self) -> dict[Path, tuple[int, int]]:
        """Size and time of every file and folder."""
        found = ((path, path.lstat()) for path in self.root.rglob("*"))
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in found}

    def edit(self, name: str, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
        """Change a JSON file in place."""
        path = self.root / name
        value = json.loads(path.read_text(encoding="utf-8"))
        change(value)
        path.write_text(json.dumps(value), encoding="utf-8")
