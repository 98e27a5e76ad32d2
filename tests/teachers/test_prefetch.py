"""Reading ahead: the same answers, asked for once, and errors where the answer is used."""

from __future__ import annotations

import threading

import pytest
import torch

from collegium.data.pack import Collator
from collegium.errors import CacheError
from collegium.teachers.prefetch import MAX_PENDING, Prefetcher, PrefetchingCollator
from collegium.types import Batch


def _items(seed: int) -> list[dict[str, object]]:
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def _batch(seed: int) -> Batch:
    return Batch.from_inputs(Collator()(_items(seed)))


def test_an_expected_batch_is_read_once_and_before_it_is_asked_for() -> None:
    read: list[int] = []
    done = threading.Event()

    def answer(batch: Batch) -> int:
        read.append(threading.get_ident())
        done.set()
        return int(batch.input_ids.sum())

    ahead = Prefetcher(answer)
    ahead.expect(_batch(0))
    assert done.wait(10)
    assert ahead(_batch(0)) == int(_batch(0).input_ids.sum()), "an equal batch is the same batch"
    assert len(read) == 1
    assert read[0] != threading.get_ident()
    assert ahead(_batch(0)) == int(_batch(0).input_ids.sum())
    assert len(read) == 2, "an answer is given once"


def test_batches_may_be_asked_for_in_any_order() -> None:
    ahead = Prefetcher(lambda batch: int(batch.input_ids.sum()))
    for seed in range(5):
        ahead.expect(_batch(seed))
    for seed in (3, 0, 7, 4, 1, 2):
        assert ahead(_batch(seed)) == int(_batch(seed).input_ids.sum())


def test_labels_belong_to_what_is_expected() -> None:
    ahead = Prefetcher(lambda batch: batch.labels.clone())
    ahead.expect(_batch(0))
    items = _items(0)
    items[0]["labels"] = torch.full((9,), -100)
    other = Batch.from_inputs(Collator()(items))
    assert torch.equal(ahead(other), other.labels)


def test_an_error_is_raised_where_the_answer_is_asked_for() -> None:
    def answer(batch: Batch) -> int:
        raise CacheError("shard-1: damaged")

    ahead = Prefetcher(answer)
    ahead.expect(_batch(0))
    with pytest.raises(CacheError, match="shard-1: damaged"):
        ahead(_batch(0))


def test_batches_that_nobody_asks_for_are_forgotten() -> None:
    ahead = Prefetcher(lambda batch: 0)
    for seed in range(MAX_PENDING + 9):
        ahead.expect(_batch(seed))
    assert len(ahead._expected) == MAX_PENDING


def test_the_collator_announces_what_it_makes() -> None:
    class Teacher:
        def __init__(self) -> None:
            self.told: list[Batch] = []

        def expect(self, batch: Batch) -> None:
            self.told.append(batch)

    teachers = [Teacher(), Teacher()]
    made = PrefetchingCollator(Collator(), teachers)(_items(1))
    assert made.keys() == Collator()(_items(1)).keys()
    for teacher in teachers:
        assert [torch.equal(b.input_ids, made["input_ids"]) for b in teacher.told] == [True]
