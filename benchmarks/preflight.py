"""Time and memory of a preflight at a real vocabulary, next to scoring its tokens once.

    python benchmarks/preflight.py

Teachers have the shape of SmolLM2-135M (30 layers, V = 49,152) and random weights, and tokens are
random: time and memory do not depend on the content. Heads are scaled until the entropy is that of
real text. The reference scores the calibration tokens once with every teacher: body, head and the
measures of an evaluation. Half of it runs before the preflight and half after it, because the speed
of a shared machine changes. With fewer tokens than by default, whole distributions are read at
proportionally fewer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import collegium.preflight.search as search_module
from collegium.config.recipe import PreflightOptions
from collegium.data.encode import Encoded
from collegium.data.windows import PackedDataset
from collegium.evaluate.scoring import Windows, score_models
from collegium.preflight.measure import run_preflight
from collegium.run.choice import Recorder
from collegium.run.folder import environment
from collegium.storage.records import PreflightReport
from collegium.teachers.local import LocalTeacher

VOCAB = 49_152
SHARPNESS = 12.0
"""Factor on the weights of the heads."""
DOMAINS = ("code", "law", "news")
DOCUMENT = 64
"""Tokens of a document."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=PreflightOptions().max_tokens)
    parser.add_argument("--teachers", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=PreflightOptions().batch_size)
    options = parser.parse_args()
    share = options.tokens / PreflightOptions().max_tokens
    search_module.FULL_TOKENS = round(search_module.FULL_TOKENS * share)
    teachers = [make_teacher(f"t{number}", options) for number in range(options.teachers)]
    calibration, validation = (make_dataset(seed, options) for seed in (0, 1))
    windows = Windows.spread(calibration, options.batch)
    halves = [
        Windows(calibration, windows.indices[part], options.batch)
        for part in (slice(0, None, 2), slice(1, None, 2))
    ]
    score_models(teachers, [], None, Windows(calibration, [0], 1))  # warm-up
    seconds, base = dict[str, float](), resident_bytes("VmRSS")
    reset_peak()
    with timed(seconds, "score"):
        score_models(teachers, [], None, halves[0])
    peaks = {"score": resident_bytes("VmHWM") - base}
    reset_peak()
    report = preflight(teachers, calibration, validation, options, seconds)
    peaks["preflight"] = resident_bytes("VmHWM") - base
    with timed(seconds, "score"):
        score_models(teachers, [], None, halves[1])
    text = table(seconds, peaks, report, options)
    print(text)


def preflight(
    teachers: list[LocalTeacher],
    calibration: PackedDataset,
    validation: PackedDataset,
    options: argparse.Namespace,
    seconds: dict[str, float],
) -> PreflightReport:
    """Run the two steps of a preflight: the bodies, then everything that applies heads."""
    with tempfile.TemporaryDirectory() as folder:
        with timed(seconds, "bodies"):
            recorder = Recorder(
                Path(folder),
                [calibration, validation],
                PreflightOptions(batch_size=options.batch, max_tokens=2 * options.tokens),
            )
            recorded = [recorder(one.name, lambda one=one: one) for one in teachers]
        with timed(seconds, "heads"):
            return run_preflight(
                recorded, calibration, batch_size=options.batch, extended=True, held_out=validation
            )


def make_teacher(name: str, options: argparse.Namespace) -> LocalTeacher:
    """Return an untrained model of the shape of SmolLM2-135M."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=options.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    torch.manual_seed(int(name[1:]))
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(SHARPNESS)
    return LocalTeacher(name, model, vocab_size=VOCAB)


def make_dataset(seed: int, options: argparse.Namespace) -> PackedDataset:
    """Return documents of random tokens in several domains, without padding."""
    draw = np.random.default_rng(seed)
    documents = [
        Encoded(ids, np.arange(DOCUMENT) > 0, np.ones(DOCUMENT, np.int64), True)
        for ids in draw.integers(VOCAB, size=(-(-options.tokens // DOCUMENT), DOCUMENT))
    ]
    domains = [DOMAINS[number % len(DOMAINS)] for number in range(len(documents))]
    return PackedDataset(documents, max_length=options.length, domains=domains)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the CPU time of the block: others share the machine."""
    started = time.process_time()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.process_time() - started


def resident_bytes(field: str) -> int:
    """Return resident memory (`VmRSS`) or its peak (`VmHWM`). Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def reset_peak() -> None:
    """Set the peak to the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def table(
    seconds: dict[str, float],
    peaks: dict[str, int],
    report: PreflightReport,
    options: argparse.Namespace,
) -> str:
    """Return the measurements in Markdown."""
    total = seconds["bodies"] + seconds["heads"]
    both = 2 * seconds["score"]  # a preflight reads as many tokens of the validation split
    rows = {
        "scoring the calibration tokens once": (seconds["score"], peaks["score"]),
        "preflight, bodies of both splits": (seconds["bodies"], None),
        "preflight, all the rest": (seconds["heads"], None),
        "preflight, total": (total, peaks["preflight"]),
    }
    lines = ["| work | seconds | ratio | peak above the weights, MB |", "|---|---:|---:|---:|"]
    for name, (duration, peak) in rows.items():
        memory = "" if peak is None else f"{peak / 1e6:,.0f}"
        ratio = duration / seconds["score"]
        lines.append(f"| {name} | {duration:,.0f} | {ratio:.2f} | {memory} |")
    versions = " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    entropies = [float(one.entropy or 0.0) for one in report.teachers.values()]
    entropy = sum(entropies) / len(entropies)
    return "\n".join(lines) + (
        f"\n\nTotal / scoring the tokens of both splits once: {total / both:.2f}. "
        f"{report.num_tokens:,} calibration tokens and as many for validation, "
        f"{search_module.FULL_TOKENS:,} of them for whole distributions, {options.teachers} "
        f"teachers of {options.layers} layers, windows of {options.length} tokens, "
        f"{len(report.fusions)} fusions compared, mean entropy {entropy:.1f} nats.\n\n"
        f"{date.today()}, {environment().processor}, {torch.get_num_threads()} threads, {versions}:"
        f"\n`python benchmarks/preflight.py --tokens {options.tokens}`\n"
    )


if __name__ == "__main__":
    main()
