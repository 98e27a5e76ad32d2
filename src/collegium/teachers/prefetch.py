"""Prefetch the cached answers of the next batch while the student trains on the current one.

A data loader makes a batch before it is used. So the collator passes each batch to the cached
teachers, which read it on a background thread. Answers are the same with and without.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from collegium.types import Batch

MAX_PENDING = 64
"""Maximum of pending batches, which covers the micro-batches of one optimizer step."""
T = TypeVar("T")


class Prefetcher(Generic[T]):
    """A function of a batch that can run ahead of its call, on one thread and in order."""

    def __init__(self, read: Callable[[Batch], T]) -> None:
        """Call `read` once per batch, never concurrently."""
        self._read = read
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._pending: OrderedDict[bytes, Future[T]] = OrderedDict()

    def prefetch(self, batch: Batch) -> None:
        """Start to read. Errors are raised by the call for this batch."""
        key = batch_digest(batch)
        if key in self._pending:
            return
        self._pending[key] = self._pool.submit(self._read, batch)
        if len(self._pending) > MAX_PENDING:
            self._pending.popitem(last=False)[1].cancel()

    def __call__(self, batch: Batch) -> T:
        """The result for a batch, prefetched or not."""
        future = self._pending.pop(batch_digest(batch), None)
        return (future or self._pool.submit(self._read, batch)).result()


@dataclass(frozen=True)
class PrefetchingCollator:
    """A collator that prefetches each batch it makes, for data loaders without worker processes."""

    collator: Callable[[Sequence[dict[str, object]]], dict[str, Tensor]]
    prefetches: Sequence[Callable[[Batch], None]]
    """Functions that start to read the answer for a batch."""

    def __call__(self, items: Sequence[dict[str, Any]]) -> Mapping[str, Tensor]:
        inputs = self.collator(items)
        batch = Batch.from_inputs(inputs)
        for prefetch in self.prefetches:
            prefetch(batch)
        return inputs


def batch_digest(batch: Batch) -> bytes:
    """A digest of everything that the keys of a batch depend on."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (batch.input_ids, batch.position_ids, batch.labels, batch.sample_ids):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.digest()
