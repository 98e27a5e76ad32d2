"""Training speed and memory with labels only, a cached fused target, and live teachers.

    python benchmarks/cached_training.py --save docs/results/cache.md
    python benchmarks/cached_training.py --device cuda --bf16 --vocab 49152 --width 1024

All three modes train the same student on the same batches. Models are untrained and windows are
random, because speed does not depend on the content. Teacher logits are scaled until a target has
as many unique draws as on real text (printed). Batches come through the data loader and collator
of training, in another order than the cache was built in. Speeds are medians over rounds. Peak
memory is measured in a separate process per mode: that of the process, or of the GPU. Nothing else
should run at the same time.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from cache_size import replace_section
from collegium.cache.build import build_cache
from collegium.cache.encode import FusedEncoder
from collegium.cache.keys import BatchKeys
from collegium.cache.sources import LocalShards
from collegium.cache.store import open_cache
from collegium.data.collate import Collator
from collegium.data.encode import Encoded
from collegium.data.windows import PackedDataset
from collegium.distributions import Teacher
from collegium.fusion.fuse import Fusion
from collegium.run.folder import environment
from collegium.teachers.cached import CachedTargets
from collegium.teachers.local import LocalTeacher
from collegium.teachers.prefetch import PrefetchingCollator
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import DistillStep
from collegium.types import Batch

MODES = {"ce": "(a) labels only", "cached": "(b) cached teachers", "live": "(c) live teachers"}
SHARPNESS = 9.0
"""Factor on the weights of the teachers' heads."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--teachers", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=16_384)
    parser.add_argument(
        "--width",
        type=int,
        default=256,
        help="width of the student; the teachers have twice as much",
    )
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--bf16", action="store_true", help="teachers in bfloat16, the student under autocast"
    )
    parser.add_argument(
        "--save", type=Path, help="Markdown file in which to replace the section `Speed`"
    )
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        mode, folder = options.memory.split(":", 1)
        run_mode(mode, Path(folder), options)
        return
    started = time.perf_counter()
    dataset = make_dataset(options)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        teachers = make_teachers(options)
        entries = make_cache(folder, teachers, dataset, options)
        sources = {"ce": ([], None), "cached": ([], open_targets(folder, dataset))}
        sources["live"] = teachers, None
        steps = {
            mode: make_step(live, cached, dataset, options)
            for mode, (live, cached) in sources.items()
        }
        speeds = measure(steps, options.rounds)
        del sources, steps, teachers
        peaks = {mode: measure_peak(mode, folder) for mode in MODES}
    text = table(speeds, peaks) + "\n\n" + origin(entries, options, time.perf_counter() - started)
    print(text)
    if options.save:
        replace_section(options.save, "Speed", text)


def make_model(vocab_size: int, width: int, *, sharpness: float | None = None) -> Any:
    """Return an untrained model of four layers. `sharpness` scales its head and unties it."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=sharpness is None,
    )
    model = AutoModelForCausalLM.from_config(config)
    if sharpness is not None:
        # Untied, or the embeddings would be scaled as well.
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(sharpness)
    return model


def make_teachers(options: argparse.Namespace) -> list[Teacher]:
    """Return teachers twice as wide as the student."""
    torch.manual_seed(1)
    width, vocab_size = 2 * options.width, options.vocab
    models = [make_model(vocab_size, width, sharpness=SHARPNESS) for _ in range(options.teachers)]
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    return [
        LocalTeacher(f"t{i}", m.to(options.device, dtype), vocab_size=vocab_size)
        for i, m in enumerate(models)
    ]


def make_dataset(options: argparse.Namespace) -> PackedDataset:
    """Return enough windows of random tokens for all rounds."""
    size = options.length * options.batch * (options.rounds + 1)
    ids = np.random.default_rng(0).integers(options.vocab, size=size)
    document = Encoded(ids, np.arange(size) > 0, np.ones(size, np.int64), True)
    return PackedDataset([document], max_length=options.length)


def make_cache(
    folder: Path, teachers: Sequence[Teacher], dataset: PackedDataset, options: argparse.Namespace
) -> float:
    """Build the cache and return its number of entries per target."""
    encoder = FusedEncoder(
        dataset=dataset, batch_size=4, seed=0, teachers=lambda: teachers, fusion=Fusion()
    )
    identity = {
        "kind": "fused",
        "targets": {"name": "samples", "draws": 50},
        "vocab_size": options.vocab,
    }
    started = time.perf_counter()
    manifest = build_cache(folder, identity, LocalShards(encoder))
    assert manifest is not None
    speed = manifest.num_targets / (time.perf_counter() - started)
    cache = open_cache(folder)
    keys = BatchKeys(dataset.sample_names)
    batches = (Batch.from_inputs(Collator()([dict(window)])) for window in dataset)
    entries = sum(len(cache.read(keys(batch)).ids) for batch in batches) / manifest.num_targets
    print(f"cache: {speed:,.0f} targets/s, {entries:.1f} entries")
    return entries


def open_targets(folder: Path, dataset: PackedDataset) -> CachedTargets:
    """Open the cache as a source of targets."""
    return CachedTargets(open_cache(folder), dataset.sample_names)


def make_step(
    teachers: Sequence[Teacher],
    targets: CachedTargets | None,
    dataset: PackedDataset,
    options: argparse.Namespace,
) -> Callable[[], int]:
    """Return a function that runs one training step and returns its number of rows."""
    torch.manual_seed(0)
    student = make_model(options.vocab, options.width).to(options.device)
    objective = Objective(ObjectiveOptions(), Fusion() if teachers or targets else None)
    module = DistillStep(
        student, objective, vocab_size=options.vocab, teachers=teachers, targets=targets
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    batches = prefetch_batches(dataset, targets, options)

    def step() -> int:
        inputs = {name: x.to(options.device) for name, x in next(batches).items()}
        with torch.autocast(torch.device(options.device).type, torch.bfloat16, options.bf16):
            total, loss = module(inputs)
        (total / loss.num_rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.device != "cpu":
            torch.accelerator.synchronize()
        return loss.num_rows

    return step


def prefetch_batches(
    dataset: PackedDataset, targets: CachedTargets | None, options: argparse.Namespace
) -> Iterator[Mapping[str, torch.Tensor]]:
    """Yield shuffled batches, prefetching one like the data loader of training."""
    loader = DataLoader(
        dataset,
        batch_size=options.batch,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=PrefetchingCollator(Collator(), [targets.prefetch] if targets else []),
    )
    batches = iter(loader)
    current = next(batches)
    for following in batches:
        yield current
        current = following
    yield current


def measure(steps: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Return the median tokens per second of each mode. The first round is a warm-up."""
    # Modes alternate, so that a change of the machine's speed affects all of them. Rounds cycle
    # through every order, because a step is slower after one that filled memory and caches.
    speeds: dict[str, list[float]] = {mode: [] for mode in steps}
    orders = list(itertools.permutations(steps))
    for number in range(rounds + 1):
        for mode in orders[number % len(orders)]:
            started = time.perf_counter()
            num_rows = steps[mode]()
            if number:
                speeds[mode].append(num_rows / (time.perf_counter() - started))
    return {mode: statistics.median(values) for mode, values in speeds.items()}


def run_mode(mode: str, folder: Path, options: argparse.Namespace) -> None:
    """Run three steps of one mode, and print the peak memory of this process in MB."""
    dataset = make_dataset(options)
    teachers = make_teachers(options) if mode == "live" else []
    targets = open_targets(folder, dataset) if mode == "cached" else None
    step = make_step(teachers, targets, dataset, options)
    for _ in range(3):
        step()
    is_cpu = options.device == "cpu"
    print(peak_megabytes() if is_cpu else torch.cuda.max_memory_allocated() / 2**20)


def peak_megabytes() -> float:
    """Return the peak resident memory of this process, in MB."""
    # On Linux `ru_maxrss` includes the peak of the parent process.
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_peak(mode: str, folder: Path) -> float:
    """Return the peak memory in MB of a subprocess that trains in one mode."""
    # A process per mode, because the peak of a process never decreases.
    command = [sys.executable, *sys.argv, "--memory", f"{mode}:{folder}"]
    process = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return float(process.stdout.split()[-1])


def table(speeds: Mapping[str, float], peaks: Mapping[str, float]) -> str:
    """Format the three modes as a Markdown table."""
    lines = ["| targets | tokens/s | relative to (a) | peak memory, MB |", "|---|---:|---:|---:|"]
    for mode, title in MODES.items():
        relative = speeds[mode] / speeds["ce"]
        lines.append(f"| {title} | {speeds[mode]:,.0f} | {relative:.3f} | {peaks[mode]:,.0f} |")
    ratio = speeds["cached"] / speeds["live"]
    return "\n".join([*lines, "", f"(b) / (c): {ratio:.2f}. Goal: (b) at least 0.92 of (a)."])


def origin(entries: float, options: argparse.Namespace, seconds: float) -> str:
    """Describe the sizes, date, machine, versions and command."""
    versions = " ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "pyarrow", "numpy")
    )
    return (
        f"{options.teachers} teachers of width {2 * options.width}, a student of width "
        f"{options.width}, 4 layers each, V = {options.vocab:,}, batches of {options.batch} "
        f"windows of {options.length} tokens, 50 draws ({entries:.1f} unique), medians of "
        f"{options.rounds} rounds.\n\n"
        f"{date.today()}, {machine(options.device)}, {versions}, {seconds:.0f} s:\n"
        f"`python {' '.join(sys.argv)}`\n"
    )


def machine(device: str) -> str:
    """Name the processor or the GPU."""
    if device == "cpu":
        return f"{environment().processor}, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
