"""Reading what a cache holds for the next batch while the student works on this one.

A data loader makes a batch before the one in hand is used up. So the collator announces each batch that it makes, and the cached
teachers read it on a thread of their own. What they answer is the same with and without.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from collegium.types import Batch

MAX_PENDING = 64
"""Batches that may wait, the oldest is forgotten: those of one optimizer step and one more."""
T = TypeVar("T")


class Prefetcher(Generic[T]):
    """A function of a batch that may be told in advance what it will be asked; it runs on one thread, in order."""

    def __init__(self, read: Callable[[Batch], T]) -> None:
        """Call `read` once per question, never twice at a time."""
        self._read = read
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._expected: OrderedDict[bytes, Future[T]] = OrderedDict()

    def expect(self, batch: Batch) -> None:
        """Begin to read; what goes wrong is raised where the answer is asked for."""
        key = _digest(batch)
        if key in self._expected:
            return
        self._expected[key] = self._pool.submit(self._read, batch)
        if len(self._expected) > MAX_PENDING:
            self._expected.popitem(last=False)[1].cancel()

    def __call__(self, batch: Batch) -> T:
        """The answer for a batch, expected or not."""
        future = self._expected.pop(_digest(batch), None)
        return (future or self._pool.submit(self._read, batch)).result()


class Prefetches(Protocol):
    """A teacher that can be told of a batch in advance."""

    def expect(self, batch: Batch) -> None:
        """Begin to read what will be asked for this batch."""
        ...


class PrefetchingCollator:
    """A collator that tells teachers of each batch that it makes; for data loaders without worker processes."""

    def __init__(
        self,
        collator: Callable[[Sequence[dict[str, object]]], dict[str, Tensor]],
        teachers: Sequence[Prefetches],
    ) -> None:
        """Make batches with `collator`."""
        self._collator = collator
        self._teachers = list(teachers)

    def __call__(self, items: Sequence[dict[str, Any]]) -> Mapping[str, Tensor]:
        """What the collator makes of the items."""
        inputs = self._collator(items)
        batch = Batch.from_inputs(inputs)
        for teacher in self._teachers:
            teacher.expect(batch)
        return inputs


def _digest(batch: Batch) -> bytes:
    """All that the keys of a batch's pieces depend on."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (batch.input_ids, batch.position_ids, batch.labels, batch.sample_ids):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.digest()
