"""Everything that needs a GPU, in one command: `make gpu`.

    python benchmarks/gpu.py                # at most 20 minutes on one modern GPU
    python benchmarks/gpu.py --dry-run      # the same steps at toy sizes on the CPU

Runs the tests of the GPU kernels, the benchmarks of the loss, of bfloat16 heads, of cached and live
training and of FSDP2 on one device, one after another, each under a time limit. A step that fails
or runs out of time does not stop the others. Writes `summary.md` with the GPU, versions, and the
state and table of every step, and one log per step. Exit code 1 if a step failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "gpu"


@dataclass(frozen=True)
class Step:
    """A command and its time limit."""

    name: str
    title: str
    gpu: str
    """Arguments of Python on a GPU."""
    cpu: str
    """Arguments of Python for the dry run."""
    minutes: float
    saves: bool = True
    """Whether it writes a table with `--save`."""


STEPS = (
    Step(
        "tests",
        "Tests of the GPU kernels",
        "-m pytest -p no:cacheprovider tests/kernels tests/losses tests/teachers",
        "-m pytest -p no:cacheprovider tests/kernels/test_gpu.py",
        6,
        saves=False,
    ),
    Step(
        "loss",
        "Time and memory of the loss",
        "loss.py --device cuda --rounds 5",
        "loss.py --rows 32 --quick --rounds 1 --teachers 2 --cases ours",
        4,
    ),
    Step(
        "half_heads",
        "bfloat16 heads with float32 products",
        "half_heads.py --device cuda --rows 8192 --rounds 7",
        "half_heads.py --rows 8 --rounds 1 --teachers 1",
        2,
    ),
    Step(
        "training",
        "Labels only, cached and live teachers, bfloat16",
        "cached_training.py --device cuda --bf16 --vocab 49152 --width 1024 --length 1024 "
        "--teachers 3 --rounds 6",
        "cached_training.py --bf16 --vocab 256 --width 16 --length 16 --batch 2 --teachers 2 "
        "--rounds 1",
        5,
    ),
    Step(
        "sharded_step",
        "FSDP2 on one device",
        "sharded_step.py --device cuda --bf16 --vocab 49152 --width 1024 --length 1024 --rounds 7",
        "sharded_step.py --vocab 256 --width 16 --length 16 --batch 2 --teachers 2 --rounds 1",
        2,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS])
    parser.add_argument("--output-dir", type=Path)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit("gpu: PyTorch sees no CUDA device; use --dry-run to try the steps on the CPU")
    folder = options.output_dir or RUNS / (str(date.today()) + "-dry" * options.dry_run)
    folder.mkdir(parents=True, exist_ok=True)
    steps = [step for step in STEPS if step.name in (options.steps or [s.name for s in STEPS])]
    sections = [f"# {device(options.dry_run)}", "", f"{date.today()}, torch {torch.__version__}"]
    failed = 0
    for step in steps:
        for file in (folder / f"{step.name}.md", folder / f"{step.name}.log"):
            file.unlink(missing_ok=True)  # of an earlier call on this day
        started = time.perf_counter()
        state = run(step, folder, is_dry=options.dry_run)
        failed += state != "done"
        line = f"{state}, {time.perf_counter() - started:.0f} s"
        print(f"{step.name}: {line}", flush=True)
        sections += ["", f"## {step.title}", "", line, "", result(step, folder)]
        # After every step, so that an interrupted call leaves what it has measured.
        (folder / "summary.md").write_text("\n".join(sections) + "\n", encoding="utf-8")
    print(f"{folder / 'summary.md'}: {len(steps) - failed} of {len(steps)} steps done")
    sys.exit(failed > 0)


def device(is_dry: bool) -> str:
    """Name the GPU and its memory."""
    if is_dry:
        return "Dry run on the CPU: sizes are toys, figures mean nothing"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name()}, {memory:.0f} GiB"


def run(step: Step, folder: Path, *, is_dry: bool) -> str:
    """Run a step with its output in a log, and return `done`, or what went wrong."""
    arguments = (step.cpu if is_dry else step.gpu).split()
    if arguments[0].endswith(".py"):
        arguments[0] = str(HERE / arguments[0])
    if step.saves:
        arguments += ["--save", str(folder / f"{step.name}.md")]
    with (folder / f"{step.name}.log").open("w", encoding="utf-8") as log:
        try:
            ended = subprocess.run(
                [sys.executable, *arguments],
                cwd=HERE.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=60 * step.minutes,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"stopped at its limit of {step.minutes:g} minutes"
    return "done" if ended.returncode == 0 else f"failed with exit code {ended.returncode}"


def result(step: Step, folder: Path) -> str:
    """The table of a step, else the end of its log."""
    table = folder / f"{step.name}.md"
    if table.is_file():
        lines = table.read_text(encoding="utf-8").splitlines()
        return "\n".join(x for x in lines if not x.startswith("#")).strip()
    lines = (folder / f"{step.name}.log").read_text(encoding="utf-8").splitlines()
    return "\n".join(["```", *lines[-15:], "```"])


if __name__ == "__main__":
    main()
