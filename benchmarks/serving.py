"""Run the blocks of docs/serving.md on the exports of a run, and write their outputs into the page.

    pip install xllamacpp    # llama.cpp, for one block of the page
    python benchmarks/serving.py runs/demo

A block of Python or shell code is run if a block of text follows, which its output replaces. Every
block runs in a process of its own, in a folder where `runs/demo` is the run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
NAME = "runs/demo"
BLOCK = re.compile(r"```(python|sh)\n((?:(?!```).)*?)```\n\n```text\n.*?```", re.DOTALL)
SECONDS = 300


def run_page(text: str, run_folder: Path) -> str:
    """Return the page with the outputs of all of its blocks.

    Raises:
        CalledProcessError: a block fails.
    """
    with TemporaryDirectory() as folder:
        place = Path(folder) / NAME
        place.parent.mkdir(parents=True)
        place.symlink_to(run_folder.resolve(), target_is_directory=True)

        def run(match: re.Match[str]) -> str:
            language, code = match.groups()
            interpreter = {"python": [sys.executable, "-c"], "sh": ["sh", "-ec"]}[language]
            done = subprocess.run(
                [*interpreter, code],
                cwd=folder,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                timeout=SECONDS,
            )
            return f"```{language}\n{code}```\n\n```text\n{done.stdout.strip()}\n```"

        return BLOCK.sub(run, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    text = run_page(options.page.read_text(encoding="utf-8"), options.run)
    options.page.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
