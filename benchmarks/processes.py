"""Training throughput of several processes, next to as many times one process.

    python benchmarks/processes.py --processes 2 --save docs/results/processes.md

A cached, fused target and a student of the size of the demo. Each process trains with one thread,
or with one GPU (`--device cuda`, NCCL). The goal is 0.9 of as many times a single process.

The single process and the group alternate, because the speed of a shared machine changes. On a CPU
the reference is that many single processes side by side, which share its memory bandwidth and its
clock as the group does; the ratio to one process alone is printed as well.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

V, LENGTH, WINDOWS = 8192, 256, 96
BATCH = 8
"""Windows per process and step."""


def make_dataset(seed: int) -> Any:
    """Random windows: the speed does not depend on the content."""
    from collegium.data.encode import Encoded
    from collegium.data.windows import PackedDataset

    generator = np.random.default_rng(seed)
    ones = np.ones(LENGTH, np.int64)
    documents = [
        Encoded(generator.integers(2, V, LENGTH), np.arange(LENGTH) > 0, ones, False)
        for _ in range(WINDOWS)
    ]
    return PackedDataset(documents, max_length=LENGTH, packing=False)


def make_student() -> Any:
    """Two and a half million parameters besides the embedding, as in the demo."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def build_cache(folder: Path) -> None:
    """Top-16 targets of a small random teacher."""
    from collegium.cache import build
    from collegium.cache.encode import FusedEncoder
    from collegium.cache.sources import LocalShards
    from collegium.fusion.fuse import Fusion
    from collegium.teachers.local import LocalTeacher

    encoder = FusedEncoder(
        dataset=make_dataset(0),
        batch_size=BATCH,
        seed=0,
        teachers=lambda: [LocalTeacher(f"t{k}", make_student(), vocab_size=V) for k in range(2)],
        fusion=Fusion(),
    )
    identity = {"kind": "fused", "targets": {"name": "top_k", "k": 16}, "vocab_size": V}
    build.build_cache(folder, identity, LocalShards(encoder))


def train(folder: Path, cache: Path, steps: int, device: str) -> float:
    """Train on the cache, and return target tokens per second over all but the first steps."""
    from collegium.cache.store import open_cache
    from collegium.data.collate import Collator
    from collegium.fusion.fuse import Fusion
    from collegium.storage.records import read_log
    from collegium.teachers.cached import CachedTargets
    from collegium.train.objective import Objective
    from collegium.train.options import ObjectiveOptions, TrainOptions, training_arguments
    from collegium.train.progress import TrainingProgress
    from collegium.train.trainer import DistillTrainer

    dataset = make_dataset(0)
    options = TrainOptions(
        max_steps=steps, per_device_train_batch_size=BATCH, logging_steps=4, save_steps=10_000
    )
    arguments = training_arguments(options, output_dir=folder, seed=1, on_cpu=device == "cpu")
    trainer = DistillTrainer(
        model=make_student(),
        args=arguments,
        targets=CachedTargets(open_cache(cache), dataset.sample_names),
        objective=Objective(ObjectiveOptions(), Fusion()),
        train_dataset=dataset,
        data_collator=Collator(),
        callbacks=[TrainingProgress(quiet=True)],
    )
    trainer.train()
    rows = read_log(folder / "log.jsonl") or []
    # The first row has the start, and the last one the checkpoint.
    return statistics.median(float(row.tokens_per_s or 0) for row in rows[1:-1])


def child(options: argparse.Namespace) -> None:
    """Train in one process of a group, and print the speed of all in rank 0."""
    speed = train(options.folder / "run", options.cache, options.steps, options.device)
    if os.environ.get("RANK", "0") == "0":
        print(f"speed {speed}", flush=True)
    os._exit(0)  # the process group can deadlock with the shutdown of the interpreter


def measure(options: argparse.Namespace, cache: Path, sizes: list[int]) -> list[float]:
    """Start groups of these sizes side by side, and return the tokens per second of each."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for number, size in enumerate(sizes):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            for rank in range(size):
                place = Path(folder) / f"{number}"
                place.mkdir(exist_ok=True)
                group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                group |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                command = [sys.executable, __file__, "--child", "--cache", str(cache)]
                command += ["--folder", str(place), "--steps", str(options.steps)]
                command += ["--device", options.device]
                environment = {**os.environ, "OMP_NUM_THREADS": "1", **(group if size > 1 else {})}
                if options.device == "cuda" and size == 1:
                    environment["CUDA_VISIBLE_DEVICES"] = str(number)
                started.append(
                    subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
                )
        outputs = [process.communicate()[0] for process in started]
    for process in started:
        if process.returncode:
            raise SystemExit(f"a process ended with {process.returncode}")
    lines = [line for output in outputs for line in output.splitlines()]
    return [float(line.split()[1]) for line in lines if line.startswith("speed ")]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--save", type=Path, help="Markdown page to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    size = options.processes
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        build_cache(cache)
        alone, apart, together = [], [], []
        for number in range(options.rounds):
            alone += measure(options, cache, [1])
            apart.append(sum(measure(options, cache, [1] * size)))
            together += measure(options, cache, [size])
            print(f"round {number}: {alone[-1]:,.0f} {apart[-1]:,.0f} {together[-1]:,.0f}")
    print(text := page(options, alone, apart, together))
    if options.save:
        options.save.write_text(text, encoding="utf-8")


def page(
    options: argparse.Namespace, alone: list[float], apart: list[float], together: list[float]
) -> str:
    """Return the results as a page."""
    from collegium.run.folder import environment

    size = options.processes

    def row(title: str, speeds: list[float]) -> str:
        ratios = [t / s for t, s in zip(together, speeds, strict=True)]
        values = f"{statistics.median(speeds):,.0f} | {statistics.median(ratios):.2f}"
        return f"| {title} | {values} ({min(ratios):.2f} to {max(ratios):.2f}) |"

    wire = "NCCL" if options.device == "cuda" else "gloo"
    machine = environment()
    lines = [
        "# Training in several processes: throughput",
        "",
        f"{size} processes of one {'GPU' if options.device == 'cuda' else 'thread'} each, {wire}, "
        f"DDP, a cached fused target, V = {V:,}, {BATCH} windows of {LENGTH} tokens per process "
        f"and step. Medians of {options.rounds} rounds, in target tokens per second; the last "
        "column is the speed of the group over that of the row. Goal: 0.90.",
        "",
        "| | tokens/s | group / this |",
        "|---|---:|---:|",
        row(f"{size} times one process that runs by itself", [size * speed for speed in alone]),
        row(f"sum of {size} single processes side by side", apart),
        f"| {size} processes as one group | {statistics.median(together):,.0f} | |",
        "",
        f"{date.today()}, {machine.processor}, torch {metadata.version('torch')}, transformers "
        f"{metadata.version('transformers')}: `python benchmarks/processes.py --processes {size} "
        f"--steps {options.steps} --rounds {options.rounds} --device {options.device}`",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
