"""One training step under FSDP2, compared with the same step without it.

    python benchmarks/sharded_step.py                                  # CPU, gloo, one process
    torchrun --nproc-per-node 2 benchmarks/sharded_step.py --device cuda --bf16

Prints the largest difference of loss and gradients, tokens per second per process, and the peak
memory of a GPU. Steps are interleaved; medians over rounds. Run nothing else on the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cached_training import machine, make_model, make_teachers
from collegium.fusion.fuse import Fusion
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import DistillStep


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--teachers", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    connect(options.device)
    text = report(options)
    if dist.get_rank() == 0:
        print(text)
        if options.save:
            options.save.parent.mkdir(parents=True, exist_ok=True)
            options.save.write_text(text, encoding="utf-8")
    dist.destroy_process_group()


def connect(device: str) -> None:
    """Join the processes of a launcher, or form a group of one."""
    backend = "gloo" if device == "cpu" else "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        file = Path(tempfile.mkdtemp()) / "met"
        dist.init_process_group(backend, init_method=f"file://{file}", rank=0, world_size=1)
    if device != "cpu":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def report(options: argparse.Namespace) -> str:
    """Compare both steps and format a table."""
    torch.manual_seed(dist.get_rank())
    shape = options.batch, options.length
    ids = torch.randint(options.vocab, shape, device=options.device)
    inputs = {"input_ids": ids, "labels": ids}
    teachers = make_teachers(options)
    plain, sharded = (build(teachers, options) for _ in range(2))
    mesh = init_device_mesh(torch.device(options.device).type, (dist.get_world_size(),))
    body: Any = sharded.student.base_model
    for block in body.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    losses = [float(step(module, inputs, options)) for module in (plain, sharded)]
    error = gradient_difference(plain, sharded)
    seconds: list[list[float]] = [[], []]
    peaks = [0.0, 0.0]
    for _ in range(options.rounds):
        for n, module in enumerate((plain, sharded)):
            seconds[n].append(timed(lambda m=module: step(m, inputs, options), options.device))
            peaks[n] = max(peaks[n], peak(options.device))
    tokens = options.batch * (options.length - 1)
    lines = ["| step | tokens/s per process | peak, MB |", "|---|---:|---:|"]
    for n, name in enumerate(("plain", "FSDP2")):
        memory = f"{peaks[n]:,.0f}" if peaks[n] else "–"
        lines.append(f"| {name} | {tokens / statistics.median(seconds[n]):,.0f} | {memory} |")
    lines += [
        "",
        f"Loss of this rank: {losses[0]:.6f} and {losses[1]:.6f}. Largest relative difference of a "
        f"gradient, averaged over the ranks: {error:.1e}.",
        "",
        f"Processes: {dist.get_world_size()}; {options.teachers} teachers of width "
        f"{2 * options.width}, a student of width {options.width}, V = {options.vocab:,}; "
        f"{date.today()}, {machine(options.device)}, torch {torch.__version__}: "
        f"`python {' '.join(sys.argv)}`",
        "",
    ]
    return "\n".join(lines)


def build(teachers: Any, options: argparse.Namespace) -> DistillStep:
    """The same step each time: the seed is that of the weights."""
    torch.manual_seed(0)
    student = make_model(options.vocab, options.width).to(options.device)
    objective = Objective(ObjectiveOptions(), Fusion())
    return DistillStep(student, objective, vocab_size=options.vocab, teachers=teachers)


def step(module: Any, inputs: dict[str, Any], options: argparse.Namespace) -> torch.Tensor:
    """Forward and backward pass; the mean loss per token."""
    module.zero_grad()
    with torch.autocast(torch.device(options.device).type, torch.bfloat16, options.bf16):
        total, loss = module(inputs)
    mean = total / loss.num_rows
    mean.backward()
    return mean.detach()


def gradient_difference(plain: DistillStep, sharded: Any) -> float:
    """Largest |a - b| / max |a| over parameters, with `a` averaged over the ranks."""
    worst = 0.0
    for ours, theirs in zip(plain.parameters(), sharded.parameters(), strict=True):
        if ours.grad is None:
            continue
        mean = ours.grad.clone()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        error = (theirs.grad.full_tensor() - mean).abs().max() / mean.abs().max()
        worst = max(worst, float(error))
    return worst


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds of a call, with all work of the device done."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        torch.accelerator.synchronize()
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def peak(device: str) -> float:
    """Megabytes of the GPU since the last `timed` began, 0 on a CPU."""
    return 0.0 if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20


if __name__ == "__main__":
    main()
