"""Prefetching: the same answers, each read once, and errors raised where the answer is used."""

from __future__ import annotations

import threading

import pytest
import torch

from collegium.data.collate import Collator
from collegium.errors import CacheError
from collegium.teachers.prefetch import MAX_PENDING, Prefetcher, PrefetchingCollator
from collegium.types import Batch


def _items(seed: int) -> list[dict[str, object]]:
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def _batch(seed: int) -> Batch:
    return Batch.from_inputs(Collator()(_items(seed)))


def test_a_prefetched_batch_is_read_once_on_another_thread() -> None:
    read: list[int] = []
    done = threading.Event()

    def answer(batch: Batch) -> int:
        read.append(threading.get_ident())
        done.set()
        return int(batch.input_ids.sum())

    reader = Prefetcher(answer)
    reader.prefetch(_batch(0))
    assert done.wait(10)
    assert reader(_batch(0)) == int(_batch(0).input_ids.sum()), "an equal batch is the same batch"
    assert len(read) == 1
    assert read[0] != threading.get_ident()
    assert reader(_batch(0)) == int(_batch(0).input_ids.sum())
    assert len(read) == 2, "an answer is given once"


def test_batches_may_be_used_in_any_order() -> None:
    reader = Prefetcher(lambda batch: int(batch.input_ids.sum()))
    for seed in range(5):
        reader.prefetch(_batch(seed))
    for seed in (3, 0, 7, 4, 1, 2):
        assert reader(_batch(seed)) == int(_batch(seed).input_ids.sum())


def test_batches_with_other_labels_are_read_again() -> None:
    reader = Prefetcher(lambda batch: batch.labels.clone())
    reader.prefetch(_batch(0))
    items = _items(0)
    items[0]["labels"] = torch.full((9,), -100)
    other = Batch.from_inputs(Collator()(items))
    assert torch.equal(reader(other), other.labels)


def test_an_error_is_raised_where_the_answer_is_used() -> None:
    def answer(batch: Batch) -> int:
        raise CacheError("shard-1: damaged")

    reader = Prefetcher(answer)
    reader.prefetch(_batch(0))
    with pytest.raises(CacheError, match="shard-1: damaged"):
        reader(_batch(0))


def test_the_oldest_unused_batches_are_dropped() -> None:
    reader = Prefetcher(lambda batch: 0)
    for seed in range(MAX_PENDING + 9):
        reader.prefetch(_batch(seed))
    assert len(reader._pending) == MAX_PENDING


def test_the_collator_prefetches_its_batches() -> None:
    first: list[Batch] = []
    second: list[Batch] = []
    made = PrefetchingCollator(Collator(), [first.append, second.append])(_items(1))
    assert made.keys() == Collator()(_items(1)).keys()
    for batches in (first, second):
        assert [torch.equal(b.input_ids, made["input_ids"]) for b in batches] == [True]
