"""Training speed and memory: labels alone, the fused target from a cache, and live teachers; same student, same batches.

    python benchmarks/cached_training.py --teachers 5 --rounds 7

Untrained models of the given sizes on made-up windows: speed does not depend on what they know. The three ways take turns step by
step, so that a change of the machine's speed meets all of them; medians over rounds. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from collegium.cache.build import build_cache
from collegium.cache.options import CacheOptions
from collegium.cache.store import open_cache
from collegium.data.encode import Encoded
from collegium.data.pack import Collator, PackedDataset
from collegium.fusion.pooling import Fusion
from collegium.models import forward_rows
from collegium.teachers.cached import CachedTeacher, FusedEncoder
from collegium.teachers.local import LocalTeacher
from collegium.train.objective import Objective, ObjectiveOptions
from collegium.types import Batch, Teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=256, help="of the student; teachers: twice")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    dataset = make_dataset(options)
    students = {name: make_model(options.vocab, options.width) for name in ("ce", "cached", "live")}
    teachers: list[Teacher] = [
        LocalTeacher(
            f"t{i}", make_model(options.vocab, 2 * options.width), vocab_size=options.vocab
        )
        for i in range(options.teachers)
    ]
    with tempfile.TemporaryDirectory() as folder:
        cached = make_cache(Path(folder), teachers, dataset, options.vocab)
        sources: dict[str, list[Teacher]] = {"ce": [], "cached": [cached], "live": teachers}
        steps = {
            name: make_step(students[name], found, dataset, options)
            for name, found in sources.items()
        }
        measure(steps, options)


def make_model(vocab_size: int, width: int) -> Any:
    """An untrained model of four layers."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def make_dataset(options: argparse.Namespace) -> PackedDataset:
    """Enough windows of random tokens for every round."""
    size = options.length * options.batch * (options.rounds + 1)
    ids = np.random.default_rng(0).integers(options.vocab, size=size)
    document = Encoded(ids, np.arange(size) > 0, np.ones(size, np.int64), True)
    return PackedDataset.from_encoded([document], max_length=options.length)


def make_cache(
    folder: Path, teachers: list[Teacher], dataset: PackedDataset, vocab_size: int
) -> CachedTeacher:
    """Let the teachers read all windows once."""
    options = CacheOptions(batch_size=4)
    encoder = FusedEncoder(
        lambda: teachers, Fusion(), dataset, options=options, seed=0, vocab_size=vocab_size
    )
    identity = {"targets": {"name": "samples", "draws": 50}, "vocab_size": vocab_size}
    started = time.perf_counter()
    manifest = build_cache(folder, identity, encoder.encode, shard_targets=encoder.shard_targets)
    seconds = time.perf_counter() - started
    per_target = manifest["num_bytes"] / manifest["num_targets"]
    print(f"cache: {manifest['num_targets'] / seconds:,.0f} targets/s, {per_target:.1f} bytes each")
    return CachedTeacher(open_cache(folder), dataset.sample_names)


def make_step(
    student: Any, teachers: list[Teacher], dataset: PackedDataset, options: argparse.Namespace
) -> Callable[[int], int]:
    """A training step on the windows of one round; returns its number of rows."""
    objective = Objective(ObjectiveOptions(), Fusion() if teachers else None)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

    def step(number: int) -> int:
        windows = range(number * options.batch, (number + 1) * options.batch)
        batch = Batch.from_inputs(Collator()([{**dataset[window]} for window in windows]))
        rows = batch.rows()
        answer = forward_rows(student, batch, rows, vocab_size=options.vocab)
        scored = [teacher.score(batch, rows) for teacher in teachers]
        (objective(answer, scored, rows).total / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(rows)

    return step


def measure(steps: dict[str, Callable[[int], int]], options: argparse.Namespace) -> None:
    """Take turns, and print medians and ratios; the first round warms up."""
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            num_rows = step(number)
            if number:
                speeds[name].append(num_rows / (time.perf_counter() - started))
    median = {name: statistics.median(values) for name, values in speeds.items()}
    for name, speed in median.items():
        print(f"{name}: {speed:,.0f} tokens/s")
    print(f"cached / ce: {median['cached'] / median['ce']:.3f}")
    print(f"cached / live: {median['cached'] / median['live']:.2f}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory of the process, all three together: {peak / 1024:,.0f} MB")


if __name__ == "__main__":
    main()
