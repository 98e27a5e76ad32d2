"""Processes without this package, in which exports are loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from collegium.errors import ExportError

SCRIPT = Path(__file__).with_name("foreign.py")


def run_foreign(request: Mapping[str, Any], *, where: str, threads: int) -> dict[str, Any]:
    """Run a request of `foreign.py` in a new process, and return its answer.

    Raises:
        ExportError: the process failed, for example since the tool cannot load the files, or it
            imported this package.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
    with TemporaryDirectory() as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        question.write_text(json.dumps({**request, "threads": threads}))
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(question), str(answer)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode or not answer.is_file():
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            reason = f"exit code {done.returncode}: {lines[-1][:300]}"
            raise ExportError(f"{where}: fails in a process of its own ({reason})")
        result = json.loads(answer.read_text())
    if result["imported"]:
        raise ExportError(f"{where}: needs {result['imported'][0]} to load; must load without it")
    return result
