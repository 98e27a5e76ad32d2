"""Time and memory of the loss on K teachers, compared with plain PyTorch and peers.

    python benchmarks/loss.py                       # CPU table, about 12 minutes on two cores
    python benchmarks/loss.py --quick               # small sizes, as a smoke test
    python benchmarks/loss.py --device cuda         # GPU table

Each case runs in a separate process. Times are medians over rounds. Memory is the peak of a process
above its inputs, gradients included. Peers support one teacher only and are measured if installed
(`pip install liger-kernel trl torchtune torchao`). Run nothing else on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# V and D of SmolLM2-135M on a CPU, of Llama 3 8B on a GPU.
CPU = {"rows": 2048, "vocab": 49_152, "width": 576, "teachers": [1, 2, 5, 8]}
GPU = {"rows": 8192, "vocab": 128_256, "width": 4096, "teachers": [1, 2, 5]}
QUICK = {"rows": 256, "vocab": 8192, "width": 128, "teachers": [1, 2]}
COLUMNS = ("ours", "naive", "bound", "liger", "trl", "torchtune")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0 for all cores")
    parser.add_argument("--teachers", type=int, nargs="+", help="numbers of teachers")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--cases", nargs="+", default=list(COLUMNS), help="also accepts compiled")
    parser.add_argument("--save", type=Path, default=Path("runs/benchmarks/loss.md"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return serve(json.loads(options.child))
    size: dict[str, Any] = dict(QUICK if options.quick else CPU if options.device == "cpu" else GPU)
    size["rows"] = options.rows or size["rows"]

    numbers = options.teachers or size.pop("teachers")
    size.pop("teachers", None)
    results = {}
    for number in numbers:
        cases = [c for c in options.cases if number == 1 or c not in ("liger", "trl", "torchtune")]
        results[number] = compare(cases, {**size, "teachers": number}, options)
    text = report(results, size, options)
    print(text)
    options.save.parent.mkdir(parents=True, exist_ok=True)
    options.save.write_text(text, encoding="utf-8")
    options.save.with_suffix(".json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def compare(cases: list[str], size: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Time the cases in turns. The result of a case that cannot run is its error."""
    children = {}
    results: dict[str, Any] = {}
    for case in cases:
        # VmHWM is the peak of a process, so cases must not share one.
        child = Child(case, {**size, "device": options.device, "threads": options.threads})
        answer = child.read()  # after an untimed warm-up step
        if "error" in answer:
            results[case] = answer
        else:
            children[case] = child
    seconds: dict[str, list[float]] = {case: [] for case in children}
    for number in range(options.rounds):
        # Interleaved and in alternating order, so drift of the machine's speed affects all cases.
        order = list(children) if number % 2 == 0 else list(children)[::-1]
        for case in order:
            seconds[case].append(children[case].request("step")["seconds"])
    for case, child in children.items():
        last = child.request("stop")
        median = statistics.median(seconds[case])
        results[case] = {**last, "seconds": median, "all_seconds": seconds[case]}
        print(
            f"K={size['teachers']} {case}: {median:.3f} s, {last['megabytes']:.0f} MB", flush=True
        )
    return results


class Child:
    """Subprocess that runs one case on request."""

    def __init__(self, case: str, size: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", json.dumps({"case": case, **size})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return {"error": f"exit code {self._process.wait()}"}

    def request(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self.read()


def serve(spec: dict[str, Any]) -> None:
    """Run one case in the subprocess of a `Child`."""
    # Imported here, so that the parent process stays small and does not touch the device.
    import torch

    from loss_cases import CASES, Inputs, Size

    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    is_cpu = spec["device"] == "cpu"
    dtype = torch.float32 if is_cpu else torch.bfloat16
    size = Size(spec["rows"], spec["vocab"], spec["width"], spec["teachers"], spec["device"], dtype)
    tiny = Size(32, 512, 32, spec["teachers"], spec["device"], dtype)
    try:
        CASES[spec["case"]](
            Inputs(tiny), tiny
        )()  # load libraries and compile before measuring memory
        inputs = Inputs(size)
        reset_peak(is_cpu)
        before = memory(is_cpu, peak=False)
        step = CASES[spec["case"]](inputs, size)
        loss = step()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(json.dumps({"error": reason[:120]}), flush=True)
        return
    print(json.dumps({"loss": loss}), flush=True)
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        started = time.perf_counter()
        step()  # returns a Python float, which waits for the device
        if not is_cpu:
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)
    print(json.dumps({"loss": loss, "megabytes": memory(is_cpu, peak=True) - before}), flush=True)


def reset_peak(is_cpu: bool) -> None:
    """Reset the peak memory counter (Linux or CUDA)."""
    if is_cpu:
        # Writing 5 resets VmHWM, see proc(5).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    else:
        import torch

        torch.cuda.reset_peak_memory_stats()


def memory(is_cpu: bool, *, peak: bool) -> float:
    """Return the megabytes of this process, or of its tensors on the device."""
    if not is_cpu:
        import torch

        num_bytes = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        return num_bytes / 1e6
    key = "VmHWM" if peak else "VmRSS"
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / 1e6


def report(results: dict[int, Any], size: dict[str, Any], options: argparse.Namespace) -> str:
    """Format the table in Markdown."""
    import torch

    threads = options.threads or torch.get_num_threads()
    lines = [
        f"N = {size['rows']:,}, V = {size['vocab']:,}, D = {size['width']}; {options.device}, "
        f"{threads} threads, {platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}; "
        f"{time.strftime('%Y-%m-%d')}, medians of {options.rounds}",
        "",
        "| K | case | seconds | / bound | naive / this | peak MB above inputs | loss per row |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for number, cases in results.items():
        seconds = {case: row["seconds"] for case, row in cases.items() if "seconds" in row}
        for case in options.cases:
            if case not in cases:
                continue
            if case not in seconds:
                lines.append(f"| {number} | {case} | {cases[case]['error']} | | | | |")
                continue
            by_bound = f"{seconds[case] / seconds['bound']:.2f}" if "bound" in seconds else ""
            by_naive = f"{seconds['naive'] / seconds[case]:.2f}" if "naive" in seconds else ""
            lines.append(
                f"| {number} | {case} | {seconds[case]:.3f} | {by_bound} | {by_naive} | "
                f"{cases[case]['megabytes']:,.0f} | {cases[case]['loss']:.6f} |"
            )
    return "\n".join([*lines, "", *legend(options.cases)]) + "\n"


def legend(cases: list[str]) -> list[str]:
    """Describe each case, with the version of the package for peers."""
    from loss_cases import CASES, PEERS

    lines = []
    for case in cases:
        doc = " ".join((CASES[case].__doc__ or "Same as ours, with the compiled backend.").split())
        version = f" {metadata.version(PEERS[case])}" if case in PEERS and _has(PEERS[case]) else ""
        lines.append(f"- {case}{version}: {doc}")
    return lines


def _has(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
