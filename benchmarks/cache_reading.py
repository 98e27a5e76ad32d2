"""Training speed and memory while reading a large cache in random order.

    python benchmarks/cache_reading.py --save docs/results/cache.md
    python benchmarks/cache_reading.py --millions 2 --length 1024 --group 4000

The cache holds synthetic fused targets of 50 draws, 20 million by default, so that the
row groups that stay in memory are a small part of it. The student is that of `collegium demo`. Both
modes train the same student on the same windows in the order of a global shuffle, with labels only
and with the cached targets. Speeds are medians over steps that alternate. Nothing
else should run at the same time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cache_size import replace_section
from cached_training import machine, prefetch_batches
from collegium.cache import store
from collegium.cache.build import build_cache
from collegium.cache.codecs.targets import TargetCodec
from collegium.cache.encode import CorpusEncoder
from collegium.cache.keys import PieceKey
from collegium.cache.shards import Columns
from collegium.cache.sources import LocalShards
from collegium.config.recipe import load_recipe
from collegium.data.encode import Encoded
from collegium.data.windows import PackedDataset
from collegium.fusion.fuse import Fusion
from collegium.teachers.cached import CachedTargets
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import DistillStep
from collegium.types import Batch, Rows

DRAWS = 50
VOCAB = 4096
IDENTITY = {"kind": "fused", "targets": {"name": "samples", "draws": DRAWS}, "vocab_size": VOCAB}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--millions", type=float, default=20, help="targets of the cache")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--group", type=int, help="targets per row group")
    parser.add_argument("--save", type=Path, help="file in which to replace `Random order`")
    options = parser.parse_args()
    if options.group:
        TargetCodec.group_targets = options.group
    started = time.perf_counter()
    dataset = make_dataset(round(options.millions * 1e6), options.length)
    with tempfile.TemporaryDirectory() as root:
        manifest = build_cache(
            Path(root), IDENTITY, LocalShards(Synthetic(dataset=dataset, batch_size=64, seed=0))
        )
        assert manifest is not None
        text = measure(Path(root), dataset, options)
    text += (
        f"\n\n{manifest.summary()}; at most {store.MAX_GROUPS} row groups stay in memory, "
        f"1 / {manifest.num_targets / store.MAX_GROUPS / mean_group(dataset):.0f} of it. "
        f"V = {VOCAB:,}, batches of {options.batch} windows of {options.length} tokens, "
        f"{DRAWS} draws, medians of {options.steps} steps.\n\n"
        f"{date.today()}, {machine('cpu')}, "
        + " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "pyarrow", "numpy"))
        + f", {time.perf_counter() - started:.0f} s:\n`python {' '.join(sys.argv)}`\n"
    )
    print(text)
    if options.save:
        replace_section(options.save, "Random order", text)


def mean_group(dataset: PackedDataset) -> float:
    """Return the mean number of targets per full row group."""
    per_window = float(np.mean(dataset.targets_per_window()))
    return per_window * -(-TargetCodec.group_targets // per_window)


class Synthetic(CorpusEncoder):
    """Random draws, about 22 different ones of 50."""

    def load(self) -> None:
        pass

    def _encode_rows(
        self, batch: Batch, rows: Rows, key_N: Sequence[PieceKey], codec: Any
    ) -> Columns:
        rng = np.random.default_rng(int(rows.index[0]) + int(batch.input_ids[0, :4].sum()))
        size = len(rows)
        # Frequencies by Zipf's law, as those of words.
        ids = np.sort(rng.zipf(1.3, (size, DRAWS)) % VOCAB, axis=1)
        is_first = np.ones(ids.shape, bool)
        is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = np.flatnonzero(is_first)
        counts = np.diff(np.append(starts, ids.size))
        scalars = {name: rng.normal(-3, 1, size).astype(np.float16) for name in codec.scalars}
        scalars["entropy"] = np.abs(scalars["entropy"])
        return {
            "sizes": is_first.sum(1).astype(np.uint8),
            "ids": ids[is_first].astype(np.uint16),
            "counts": counts.astype(np.uint8),
            **scalars,
        }


def make_dataset(num_tokens: int, length: int) -> PackedDataset:
    """Return windows of random tokens."""
    ids = np.random.default_rng(0).integers(VOCAB, size=num_tokens)
    document = Encoded(ids, np.arange(num_tokens) > 0, np.ones(num_tokens, np.int64), True)
    return PackedDataset([document], max_length=length)


def make_step(dataset: PackedDataset, folder: Path | None, options: argparse.Namespace) -> Any:
    """Return a function that trains one step and returns its number of rows."""
    targets = None
    if folder is not None:
        targets = CachedTargets(store.open_cache(folder), dataset.sample_names)
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "demo.yaml")
    config = {**recipe.student.config, "vocab_size": VOCAB}  # type: ignore[dict-item]
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    objective = Objective(ObjectiveOptions(), Fusion() if targets else None)
    module = DistillStep(student, objective, vocab_size=VOCAB, targets=targets)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    batches = prefetch_batches(dataset, targets, options)

    def step() -> int:
        total, loss = module(next(batches))
        (total / loss.num_rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.num_rows

    return step


def measure(folder: Path, dataset: PackedDataset, options: argparse.Namespace) -> str:
    """Train both students in alternation, and count the targets that are decoded."""
    decoded = 0
    read_group = store.read_group

    def counting(file: Any, group: int, names: Any) -> Any:
        nonlocal decoded
        content = read_group(file, group, names)
        decoded += len(content.lists["sizes"].values) if "sizes" in content.lists else 0
        return content

    store.read_group = counting
    steps = {
        "labels only": make_step(dataset, None, options),
        "cached": make_step(dataset, folder, options),
    }
    speeds: dict[str, list[float]] = {mode: [] for mode in steps}
    memory, used = list[float](), 0
    for number in range(options.steps):
        for mode in sorted(steps, reverse=number % 2 == 1):
            began = time.perf_counter()
            num_rows = steps[mode]()
            speeds[mode].append(num_rows / (time.perf_counter() - began))
            used += num_rows if mode == "cached" else 0
        if (number + 1) % (options.steps // 4) == 0:
            memory.append(psutil.Process().memory_info().rss / 1e6)
    store.read_group = read_group
    medians = {mode: statistics.median(values[10:]) for mode, values in speeds.items()}
    relative = medians["cached"] / medians["labels only"]
    return "\n".join(
        [
            "| targets | tokens/s | relative | decoded / used | memory at each quarter, MB |",
            "|---|---:|---:|---:|---|",
            f"| labels only | {medians['labels only']:,.0f} | 1.000 | | |",
            f"| cached, random order | {medians['cached']:,.0f} | {relative:.3f} "
            f"| {decoded / used:.2f} | {', '.join(f'{m:,.0f}' for m in memory)} |",
        ]
    )


if __name__ == "__main__":
    main()
