"""Logits of a few rows held in memory, so that all readers of a row share one product with a head.

    head ─▶ buffer of a few hundred rows ─▶ strips of a few rows ─▶ every statistic, rule and pool

The product with a head is fast for many rows, and everything after it for few: a strip of the
vocabulary's width fits into the cache of a processor.

Shapes: N rows, n rows of one block, m rows of a selection, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from collegium.distributions import Answer, Distribution, WrappedRows
from collegium.kernels.rows import RawRows, Workspace
from collegium.options import Tensor, torch

BUFFER_BYTES = 2**25
"""Size of one (n, V) buffer by default: 170 float32 rows of V = 49,152."""
MIN_ROWS = 16
"""Fewest rows of a buffer: each product reads the whole head from memory."""

# Per row of V = 49,152, softmax and entropy take 0.1 ms in strips of 1 MiB, 0.7 ms in 32 MiB.
CPU_STRIP_BYTES = 2**20
"""Size of one (n, V) strip per thread."""


@dataclass(eq=False)
class _Held:
    """The raw values of consecutive rows."""

    first: int = 0
    raw: RawRows | None = None
    workspace: Workspace = field(default_factory=Workspace)


@dataclass(frozen=True, eq=False)
class BufferedRows(WrappedRows):
    """A distribution whose raw values are kept for the rows that were read last.

    Reading rows outside of the buffer fills it from the first of them on.
    """

    num_rows: int
    """Rows of the buffer. A longer block is read as a whole."""
    _held: _Held = field(default_factory=_Held, init=False)

    def logits(self, block: slice) -> Tensor:
        """(n, V) logits. They belong to the buffer, and are valid until other rows are read."""
        return self.rows(block).logits()

    def raw(self, block: slice, workspace: Workspace, buffer: str) -> tuple[RawRows, bool]:
        return self.rows(block), False

    def scalars(self, block: slice, temperature: float) -> tuple[Tensor, Tensor, Tensor] | None:
        return self.inner.scalars(block, temperature)

    def take(self, rows_m: Tensor) -> Distribution:
        return _Selection(self, rows_m.cpu())

    def rows(self, block: slice) -> RawRows:
        """The raw values of a block, without a copy."""
        start, stop, step = block.indices(len(self))
        held, raw = self._held, self._held.raw
        if raw is None or start < held.first or stop > held.first + len(raw.values_nV):
            end = min(max(stop, start + self.num_rows), len(self))
            raw, _ = self.inner.raw(slice(start, end), held.workspace, "logits")
            held.raw, held.first = raw, start
        inside = slice(start - held.first, stop - held.first, step)
        return replace(raw, values_nV=raw.values_nV[inside])


@dataclass(frozen=True)
class _Selection(WrappedRows):
    """Ascending rows of a buffer, read through it."""

    rows_m: Tensor

    def __len__(self) -> int:
        return len(self.rows_m)

    def logits(self, block: slice) -> Tensor:
        rows_n = self.rows_m[block]
        first, last = int(rows_n[0]), int(rows_n[-1])
        logits_nV = self.inner.logits(slice(first, last + 1))
        return logits_nV[(rows_n - first).to(logits_nV.device)]

    def take(self, rows_m: Tensor) -> Distribution:
        return replace(self, rows_m=self.rows_m[rows_m.cpu()])


def buffered(answers: Sequence[Answer], num_rows: int) -> list[Answer]:
    """Put the distributions that heads compute into buffers of `num_rows` rows."""
    return [_buffered(answer, num_rows) for answer in answers]


def _buffered(answer: Answer, num_rows: int) -> Answer:
    distribution = answer.distribution
    # Named rows are small, and keep their kind. Rows made from a buffer have no head of their own.
    if not distribution.is_full or isinstance(distribution, BufferedRows):
        return answer
    if isinstance(distribution, WrappedRows) and isinstance(distribution.inner, BufferedRows):
        return answer
    return replace(answer, distribution=BufferedRows(distribution, num_rows))


def vocab_size_of(distribution: Distribution) -> int:
    """V. Only logits reveal it: reads the first row."""
    return distribution.logits(slice(0, 1)).shape[1]


def buffer_rows(vocab_size: int, num_bytes: int | None = None) -> int:
    """Return the rows whose float32 logits take `num_bytes`, by default 32 MiB."""
    return max(MIN_ROWS, (num_bytes or BUFFER_BYTES) // (4 * vocab_size))


def split_rows(rows: slice, size: int) -> list[slice]:
    """Split a range of rows into consecutive blocks."""
    starts = range(rows.start, rows.stop, size)
    return [slice(start, min(start + size, rows.stop)) for start in starts]


def strips_of(rows: slice, vocab_size: int, device: torch.device) -> list[slice]:
    """Split a range of rows into blocks that fit into a processor's cache, or 32 MiB on a GPU."""
    is_cpu = device.type == "cpu"
    num_bytes = CPU_STRIP_BYTES * torch.get_num_threads() if is_cpu else BUFFER_BYTES
    return split_rows(rows, max(1, num_bytes // (4 * vocab_size)))
