"""Peak memory, opening time, speed and size of a corpus on disk, by its number of tokens.

    python benchmarks/corpus.py --millions 5 20 --save docs/results/corpus.md

The text is generated: documents of 100 to 900 words out of a vocabulary of 30,000 with Zipf's
frequencies, in JSON lines, and a byte-level BPE of 8,192 tokens is trained on it. Building and
opening run in processes of their own, so that each peak is of one of them. The speed of
`tokenizers` is that of `Tokenizer.encode_batch` on all cores, on the first documents of the same
text, measured before and after each build. On a busy machine, compare processor times: the second
ratio is that of processor seconds per token. Disk that is needed: 11 bytes per token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

COLUMNS = (
    "tokens",
    "peak above import, MB",
    "in a worker, MB",
    "opening, s",
    "tokens/s",
    "of `tokenizers`' batch speed",
    "the same by processor time",
    "bytes per token",
    "windows/s",
)
TABLE = f"| {' | '.join(COLUMNS)} |\n|{'---:|' * len(COLUMNS)}\n"
NUM_WORDS = 30_000
TOKENS_PER_WORD = 1.38
"""Of the trained tokenizer, measured."""
SAMPLE = 4_000
"""Documents that `tokenizers` encodes."""
MAX_LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--millions", type=float, nargs="+", default=[5.0])
    parser.add_argument("--processes", type=int, default=None)
    parser.add_argument("--save", type=Path, help="Markdown file in which to replace the table")
    parser.add_argument("--child", choices=["build", "open", "tokenizers"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(CHILDREN[options.child](options.folder, options.processes)))
        return
    started, lines = time.perf_counter(), []
    for millions in options.millions:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(Path(folder), millions, options.processes)
        print(json.dumps(row), flush=True)
        lines.append(line(row))
    table = TABLE + "".join(lines) + "\n" + footer(time.perf_counter() - started)
    print(table)
    if options.save is not None:
        replace_section(options.save, table)


def measure(folder: Path, millions: float, processes: int | None) -> dict[str, Any]:
    """Build and open one corpus."""
    write_text(folder / "text.jsonl", round(millions * 1e6 / TOKENS_PER_WORD))
    train_tokenizer(folder)
    before = child("tokenizers", folder, processes)
    built = child("build", folder, processes)
    after = child("tokenizers", folder, processes)
    size = sum(file.stat().st_size for file in (folder / "corpora").rglob("*") if file.is_file())
    opened = child("open", folder, processes)
    return {
        **built,
        **opened,
        "ratio": 2 * built["tokens_per_s"] / (before["tokens_per_s"] + after["tokens_per_s"]),
        "cpu_ratio": (before["cpu_s"] + after["cpu_s"]) / 2 / built["cpu_s"],
        "bytes_per_token": size / built["tokens"],
    }


def write_text(file: Path, num_words: int) -> None:
    """Write generated documents."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwygpbvkxqjz"
    weights = [1 / (rank + 1) for rank in range(len(letters))]
    words = ["".join(rng.choices(letters, weights, k=rng.randint(2, 10))) for _ in range(NUM_WORDS)]
    frequencies = [1 / (rank + 1) for rank in range(NUM_WORDS)]
    with file.open("w", encoding="utf-8") as out:
        written = 0
        while written < num_words:
            size = rng.randint(100, 900)
            text = " ".join(rng.choices(words, frequencies, k=size))
            out.write(json.dumps({"text": f"{text}\u2019s."}) + "\n")
            written += size


def train_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE on the first documents, and save it for transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(first_texts(folder, 2_000), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(
        folder / "tokenizer"
    )


def first_texts(folder: Path, count: int) -> Iterator[str]:
    """Yield the first documents."""
    with (folder / "text.jsonl").open(encoding="utf-8") as file:
        for _, text in zip(range(count), file, strict=False):
            yield json.loads(text)["text"]


def child(name: str, folder: Path, processes: int | None) -> dict[str, Any]:
    """Run a part of the measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    command += [] if processes is None else ["--processes", str(processes)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def opened_folder(folder: Path) -> Any:
    """Return the corpus folder and its options."""
    from transformers import AutoTokenizer

    from collegium.data.corpus_folder import CorpusFolder
    from collegium.data.sources import DataOptions, SourceOptions

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    source = SourceOptions(path=str(folder / "text.jsonl"))
    options = DataOptions(train=[source], max_length=MAX_LENGTH)
    return CorpusFolder(options, tokenizer, folder / "corpora", where="data"), options, tokenizer


def peak_mb(who: int = resource.RUSAGE_SELF) -> float:
    """Return the largest resident size of this process, or of the largest child."""
    return resource.getrusage(who).ru_maxrss / 1e3


def cpu_seconds() -> float:
    """Return the processor time of this process and of its finished children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def build(folder: Path, processes: int | None) -> dict[str, Any]:
    """Encode the corpus and lay it out."""
    from collegium.data.pack import lay_out

    corpus, options, tokenizer = opened_folder(folder)
    (folder / "corpora").mkdir()
    imported = peak_mb()
    started, cpu = time.perf_counter(), cpu_seconds()
    corpus.build(processes=processes)
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    datasets = lay_out(corpus.open(), options, tokenizer, where="data")
    num_tokens = sum(one.num_tokens for one in datasets.values())
    return {
        "tokens": num_tokens,
        "tokens_per_s": num_tokens / seconds,
        "cpu_s": cpu / num_tokens,
        "layout_s": time.perf_counter() - started - seconds,
        "peak_mb": peak_mb() - imported,
        "worker_mb": peak_mb(resource.RUSAGE_CHILDREN),
    }


def open_again(folder: Path, processes: int | None) -> dict[str, Any]:
    """Open the finished corpus, and read windows in random order."""
    del processes
    from collegium.data.pack import lay_out

    corpus, options, tokenizer = opened_folder(folder)
    imported = peak_mb()
    started = time.perf_counter()
    train = lay_out(corpus.open(), options, tokenizer, where="data")["train"]
    seconds = time.perf_counter() - started
    numbers = random.Random(0).choices(range(len(train)), k=5_000)
    started = time.perf_counter()
    for number in numbers:
        train[number]
    return {
        "open_s": seconds,
        "windows_per_s": len(numbers) / (time.perf_counter() - started),
        "open_peak_mb": peak_mb() - imported,
    }


def encode_with_tokenizers(folder: Path, processes: int | None) -> dict[str, Any]:
    """Measure the batch speed of `tokenizers` on all cores."""
    del processes
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    texts = [*first_texts(folder, SAMPLE)]
    started, cpu = time.perf_counter(), cpu_seconds()
    num_tokens = sum(map(len, tokenizer.encode_batch(texts, add_special_tokens=False)))
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    return {"tokens_per_s": num_tokens / seconds, "cpu_s": cpu / num_tokens}


CHILDREN = {"build": build, "open": open_again, "tokenizers": encode_with_tokenizers}


def line(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    return (
        f"| {row['tokens']:,} | {max(row['peak_mb'], row['open_peak_mb']):.0f} "
        f"| {row['worker_mb']:.0f} | {row['open_s']:.2f} | {row['tokens_per_s']:,.0f} "
        f"| {row['ratio']:.2f} | {row['cpu_ratio']:.2f} | {row['bytes_per_token']:.2f} "
        f"| {row['windows_per_s']:,.0f} |\n"
    )


def footer(seconds: float) -> str:
    """Describe the machine and the command."""
    import numpy
    import tokenizers

    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    command = " ".join(["python benchmarks/corpus.py", *sys.argv[1:]])
    return (
        f"{date.today()}, {os.cpu_count()} cores, load averages {load}, tokenizers "
        f"{tokenizers.__version__}, numpy {numpy.__version__}, {seconds:.0f} s:\n`{command}`.\n"
    )


def replace_section(file: Path, table: str) -> None:
    """Replace the text between the markers of the file."""
    text = file.read_text(encoding="utf-8")
    begin, end = "<!-- table -->\n", "<!-- end -->\n"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    file.write_text(f"{head}{begin}{table}{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
