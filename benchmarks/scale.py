"""Distillation at 1 B to 10 T tokens on 8 to 10,000 GPUs, on paper: the tables of docs/scale.md.

    python benchmarks/scale.py                # about a minute, of which the simulation takes most
    python benchmarks/scale.py --check        # exit code 1 if the page has other tables

Every figure follows from the constants below: data sheets, published failure rates, and sizes that
were measured here (docs/results/cache.md). Nothing of it ran at this size.
"""

from __future__ import annotations

import argparse
import heapq
import math
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from collegium.cache.encode import SHARD_TARGETS
from collegium.storage.records import MAX_BYTES

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"

# GPU and machine
PEAK = 989e12
"""FLOP/s in bfloat16, dense, of an H100 SXM by its data sheet."""
TRAINING_USE, SCORING_USE = 0.40, 0.50
"""Fractions of the peak, assumed."""
LINK, NVLINK = 50e9, 450e9
"""Bytes/s per GPU and direction: 400 Gbit/s between machines, and within one, by data sheets."""
GPUS_PER_MACHINE = 8
STORE = 2e9
"""Bytes/s per machine to shared storage, assumed."""
HASHING = 0.5e9
"""Bytes/s of SHA-256 on one core, assumed; with SHA instructions two to three times that."""
GPU_HOURS_PER_FAILURE = 54 * 24 * 16_384 / 419
"""419 unexpected interruptions in 54 days of 16,384 GPUs: arXiv 2407.21783, section 3.3.4."""
RESTART = 600.0
"""Seconds from a failure to the next step, assumed."""
BARRIER = 5.0
"""Seconds of a checkpoint besides its bytes, assumed: all ranks wait and the folder is renamed."""
REQUESTS = 5500
"""Reads per second and prefix that S3 documents."""

# Models
TEACHERS = (8e9, 8e9, 8e9)
STUDENT = 1e9
STATE_BYTES = 12
"""Bytes per parameter of a checkpoint: float32 weights and two moments of Adam."""
GRADIENT_BYTES = 2
MICRO_BATCH = 8192
"""Tokens per GPU and step: the least that keeps a GPU busy, assumed."""
MIN_STEPS = 1000
"""Steps that a training needs, assumed. Fewer, because of the global batch, is no training."""

# Sizes
CACHE_BYTES = 3 * 37.8
"""Bytes per token: three teachers, 24 draws, V = 151,936 (docs/results/cache.md)."""
CORPUS_BYTES = 6
"""Bytes per token on disk: an id of 4, a length and a flag."""
DOCUMENT = 1000
"""Tokens of a document, assumed. A piece is a document or a window's part of one."""
DICTIONARY_BYTES, INDEX_BYTES = 323, 24
"""Bytes per piece of the index of a cache in Python dictionaries, measured on a million, and in the
arrays that are mapped from disk."""
SORTING = 3
"""Times the bytes of an index that making it takes."""
ENTRY_BYTES = 180
"""Bytes of a shard's entry in a manifest: name, digest, sizes."""

TOKENS = (1e9, 100e9, 10e12)
GPUS = (8, 512, 10_000)
HOUR, DAY = 3600.0, 86_400.0


@dataclass(frozen=True)
class Plan:
    """Cost of one distillation."""

    tokens: float
    gpus: int

    @property
    def scoring(self) -> float:
        """Seconds of the pass of all teachers: 2 FLOPs per parameter and token."""
        return 2 * sum(TEACHERS) * self.tokens / (self.gpus * PEAK * SCORING_USE)

    @property
    def speed(self) -> float:
        """Tokens/s of one GPU that trains the student: 6 FLOPs per parameter and token."""
        return PEAK * TRAINING_USE / (6 * STUDENT)

    @property
    def steps(self) -> float:
        return self.tokens / (self.gpus * MICRO_BATCH)

    @property
    def training(self) -> float:
        """Seconds of training, gradients averaged after every step without overlap."""
        return self.steps * (MICRO_BATCH / self.speed + self.reduction)

    @property
    def reduction(self) -> float:
        """Seconds of a ring all-reduce: every gradient is sent and received twice."""
        link = NVLINK if self.gpus <= GPUS_PER_MACHINE else LINK
        return 2 * GRADIENT_BYTES * STUDENT * (1 - 1 / self.gpus) / link

    @property
    def reading(self) -> float:
        """Bytes/s of cache and corpus that one machine reads while its GPUs train."""
        return GPUS_PER_MACHINE * self.speed * (CACHE_BYTES + CORPUS_BYTES)

    @property
    def failures_per_day(self) -> float:
        return self.gpus * 24 / GPU_HOURS_PER_FAILURE

    @property
    def checkpoint(self) -> float:
        """Seconds of a sharded checkpoint: every machine writes its part."""
        machines = max(1, self.gpus // GPUS_PER_MACHINE)
        return STATE_BYTES * STUDENT / (machines * STORE) + BARRIER

    @property
    def interval(self) -> float:
        """Seconds between checkpoints that lose the least: sqrt(2 C MTBF).

        Source: Young 1974, doi:10.1145/361147.361115.
        """
        return math.sqrt(2 * self.checkpoint * DAY / self.failures_per_day)

    @property
    def lost(self) -> float:
        """Fraction of time lost to checkpoints, repeated steps and restarts."""
        rate = self.failures_per_day / DAY
        return self.checkpoint / self.interval + rate * (self.interval / 2 + RESTART)


def tables(*, workers: int = 10_000, seeds: int = 3) -> Iterator[str]:
    """The tables of the page, in order."""
    plans = [Plan(tokens, gpus) for tokens in TOKENS for gpus in GPUS]
    yield _table(
        "tokens | GPUs | teachers | training | steps | all-reduce | failures per day "
        "| checkpoint every | time lost",
        [
            f"{_count(p.tokens)} | {p.gpus:,} | {_time(p.scoring)} | "
            + (f"{_time(p.training)} | {p.steps:,.0f} | " if p.steps >= MIN_STEPS else "– | – | ")
            + f"{p.reduction * p.steps / p.training:.0%} | {p.failures_per_day:.2g} | "
            f"{_time(p.interval)} | {p.lost:.2%}"
            for p in plans
        ],
    )
    yield _table(
        "tokens | corpus | cache | shards | pieces | index | in dictionaries | manifest "
        "| SHA-256 of everything, one core",
        [
            f"{_count(t)} | {_bytes(t * CORPUS_BYTES)} | {_bytes(t * CACHE_BYTES)} | "
            f"{_count(t / SHARD_TARGETS)} | {_count(t / DOCUMENT)} | "
            f"{_bytes(t / DOCUMENT * INDEX_BYTES)} | {_bytes(t / DOCUMENT * DICTIONARY_BYTES)} | "
            f"{_bytes(t / SHARD_TARGETS * ENTRY_BYTES)} | {_time(t * CACHE_BYTES / HASHING)}"
            for t in TOKENS
        ],
    )
    yield _table("limit | holds up to, tokens | because", [" | ".join(limit) for limit in limits()])
    yield _table(
        "a worker fails every | assignment | time, ideal = 1 | work repeated",
        list(simulations(workers, seeds)),
    )


def limits() -> Iterator[tuple[str, str, str]]:
    """The first number of tokens at which each choice of today fails."""
    shards = MAX_BYTES / ENTRY_BYTES
    yield (
        "one JSON manifest per cache",
        _count(shards * SHARD_TARGETS),
        f"{_count(shards)} entries reach the {_bytes(MAX_BYTES)} that a record may have",
    )
    yield (
        "index sorted in memory by the first process that opens a cache",
        _count(64e9 / (SORTING * INDEX_BYTES) * DOCUMENT),
        f"64 GB for {_count(64e9 / (SORTING * INDEX_BYTES))} pieces; the others map the file",
    )
    machine = Plan(1e12, 512).reading
    yield (
        "cache read from shared storage",
        "any",
        f"a machine reads {_bytes(machine)}/s of the {_bytes(STORE)}/s that it has: "
        f"{machine / STORE:.0%}; teachers of 24 draws, {len(TEACHERS)} of them",
    )
    reads = Plan(1e12, 1).speed / DOCUMENT
    yield (
        "one read per piece from an object store",
        f"any, up to {REQUESTS / reads:.0f} GPUs per prefix",
        f"a GPU reads {reads:.0f} pieces/s of the {REQUESTS:,} requests/s of a prefix",
    )
    yield (
        "data parallelism only",
        _count(MIN_STEPS * 10_000 * MICRO_BATCH) + " on 10,000 GPUs",
        f"the global batch is {_count(10_000 * MICRO_BATCH)} tokens, so that fewer are less than "
        f"{MIN_STEPS:,} steps",
    )


# The shards of a teacher pass, on workers that fail

POLICIES = ("shard modulo rank", "queue of leases", "queue, last shards twice")
LEASE = 5.0
"""Times the seconds of a shard until a queue gives the shard of a silent worker to another."""
SHARDS_PER_WORKER = 40


@dataclass(frozen=True)
class Outcome:
    """Result of a simulated pass."""

    makespan: float
    """Seconds until the last shard is done."""
    started: int
    """Shards that were begun, also those that were lost or done twice."""
    finished: np.ndarray
    """(shards,) times that each was finished."""


def simulations(workers: int, seeds: int) -> Iterator[str]:
    """Rows of the last table: means over seeds."""
    shards, seconds = SHARDS_PER_WORKER * workers, Plan(SHARD_TARGETS, 1).scoring
    for mtbf, name in ((math.inf, "never"), (5 * DAY, "5 days"), (HOUR, "hour")):
        for policy in POLICIES:
            ratios, repeated = [], []
            for seed in range(seeds):
                pace = paces(workers, seed)
                outcome = simulate(policy, shards, seconds * pace, mtbf, seed)
                ratios.append(outcome.makespan * (1 / (seconds * pace)).sum() / shards)
                repeated.append(outcome.started / shards - 1)
            yield f"{name} | {policy} | {np.mean(ratios):.2f} | {np.mean(repeated):.1%}"


def paces(workers: int, seed: int) -> np.ndarray:
    """(workers,) time of a shard relative to the median: 5 % of spread, every hundredth at 3."""
    rng = np.random.default_rng(seed)
    return np.exp(0.05 * rng.standard_normal(workers)) * np.where(rng.random(workers) < 0.01, 3, 1)


def simulate(policy: str, shards: int, seconds: np.ndarray, mtbf: float, seed: int = 0) -> Outcome:
    """Run the shards on workers that take (workers,) seconds each and fail at random.

    A failure loses the shard at hand and the worker for `RESTART` seconds.
    """
    rng = np.random.default_rng(seed)
    simulation = _Fixed if policy == POLICIES[0] else _Queue
    return simulation(shards, seconds, mtbf, rng, copies=policy == POLICIES[2]).run()


class _Queue:
    """Workers take the next shard, and that of a failed worker once its lease has expired."""

    def __init__(
        self, shards: int, seconds: np.ndarray, mtbf: float, rng: np.random.Generator, copies: bool
    ) -> None:
        self.seconds, self.mtbf, self.rng, self.copies = seconds, mtbf, rng, copies
        self.finished = np.zeros(shards, int)
        self.lease = LEASE * float(np.median(seconds))
        self.started = 0
        self.waiting = deque(range(shards))
        self.running: deque[int] = deque()
        self.idle: list[int] = []
        # (time, order, worker or none, shard or none): a free worker, a finished or expired shard.
        self.events: list[tuple[float, int, int, int]] = []

    def run(self) -> Outcome:
        for worker in range(len(self.seconds)):
            self._at(0.0, worker)
        left, now = len(self.finished), 0.0
        while left:
            now, _, worker, shard = heapq.heappop(self.events)
            if worker < 0:
                self._expire(now, shard)
                continue
            if shard >= 0:
                left -= not self.finished[shard]
                self.finished[shard] += 1
            self._assign(now, worker)
        return Outcome(now, self.started, self.finished)

    def _at(self, time: float, worker: int, shard: int = -1) -> None:
        heapq.heappush(self.events, (time, len(self.events), worker, shard))

    def _expire(self, now: float, shard: int) -> None:
        if not self.finished[shard]:
            self.waiting.append(shard)
            if self.idle:
                self._at(now, self.idle.pop())

    def _assign(self, now: float, worker: int) -> None:
        shard = self._next(worker)
        if shard is None:
            self.idle.append(worker)
            return
        self.started += 1
        failure = self.rng.exponential(self.mtbf) if math.isfinite(self.mtbf) else math.inf
        if failure > self.seconds[worker]:
            self._at(now + self.seconds[worker], worker, shard)
        else:
            self._lose(now, worker, shard)
            self._at(now + failure + RESTART, worker)

    def _lose(self, now: float, worker: int, shard: int) -> None:
        self._at(now + self.lease, -1, shard)

    def _next(self, worker: int) -> int | None:
        while self.waiting:
            shard = self.waiting.popleft()
            if not self.finished[shard]:
                self.running.append(shard)
                return shard
        while self.copies and self.running:
            # The one that runs longest.
            shard = self.running.popleft()
            if not self.finished[shard]:
                return shard
        return None


class _Fixed(_Queue):
    """Worker r of W takes the shards r, r + W, r + 2 W and so on, also after a failure."""

    def run(self) -> Outcome:
        workers = len(self.seconds)
        self.own = [deque(range(worker, len(self.finished), workers)) for worker in range(workers)]
        return super().run()

    def _lose(self, now: float, worker: int, shard: int) -> None:
        self.own[worker].appendleft(shard)

    def _next(self, worker: int) -> int | None:
        return self.own[worker].popleft() if self.own[worker] else None


# Text


def _table(header: str, rows: list[str]) -> str:
    columns = header.count("|") + 1
    return "\n".join(f"| {row} |" for row in (header, " | ".join(["---"] * columns), *rows))


def _count(value: float) -> str:
    for unit, name in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} B"


def _time(seconds: float) -> str:
    for unit, name in ((365 * DAY, "years"), (DAY, "days"), (HOUR, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.2g} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with docs/scale.md")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8") if options.check else ""
    missing = 0
    for table in tables():
        if not options.check:
            print(table, end="\n\n", flush=True)
        elif table not in page:
            missing += 1
            print(f"not in {PAGE.name}:\n{table}\n")
    sys.exit(missing > 0)


if __name__ == "__main__":
    main()
