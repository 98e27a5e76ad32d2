"""Selection of rows, and moving records between devices."""

from __future__ import annotations

import torch

from collegium.distributions import NamedRows
from collegium.types import IGNORE, Batch, Rows, is_row


def packed() -> Batch:
    """Make two windows, of documents with 3, 1, 2 and 4 tokens; some are masked, some padding."""
    position = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 0, 1]])
    samples = torch.tensor([[4, 4, 4, 5, 6, 6], [7, 7, 7, 7, -1, -1]])
    ids = torch.arange(12).view(2, 6) + 20
    labels = ids.clone()
    labels[0, 1] = labels[1, 3] = IGNORE
    labels[1, 4:] = IGNORE
    return Batch(ids, position, labels, samples, domain_ids=samples % 2, teacher_ids=samples % 3)


def test_named_rows_support_strided_blocks() -> None:
    starts = torch.tensor([0, 2, 3, 6, 7])
    ids = torch.tensor([0, 1, 4, 0, 2, 3, 1])
    logp = torch.linspace(-3, -1, 7)
    for tail in (None, torch.linspace(-4, -3, 4)):
        rows = NamedRows(starts, ids, logp, tail, 5)
        for block in (slice(0, 4, 2), slice(1, 4, 2), slice(0, 4, 3), slice(2, 3, 2)):
            assert torch.equal(rows.logits(block), rows.logits(slice(0, 4))[block])


def test_rows_are_targets_with_a_predecessor_in_their_document() -> None:
    batch = packed()
    rows = batch.rows()
    flat = batch.input_ids.flatten()
    # Token 20 + t is predicted from the position before it.
    # 20, 23, 24 and 26 start a document; 21 and 29 are masked.
    assert rows.labels.tolist() == [22, 25, 27, 28]
    assert flat[rows.index].tolist() == [21, 24, 26, 27]
    assert rows.samples.tolist() == [4, 6, 7, 7]
    assert rows.domains is not None
    assert rows.domains.tolist() == [0, 0, 1, 1]
    assert rows.teachers is not None
    assert rows.teachers.tolist() == [1, 0, 1, 1]
    first, second, *rest = rows.documents.tolist()
    assert first < second < rest[0] == rest[1]
    assert len(rows) == 4
    assert is_row(batch.labels, batch.position_ids).sum() == 4
    assert is_row(batch.labels[0], batch.position_ids[0]).tolist() == [0, 1, 0, 0, 1]


def test_a_part_of_a_batch_keeps_every_column() -> None:
    batch = packed()
    part = batch.part(torch.tensor([1]))
    for name in type(batch).__dataclass_fields__:
        assert torch.equal(getattr(part, name), getattr(batch, name)[1:])


def test_records_move_completely() -> None:
    batch = packed()
    rows = batch.rows()
    for record in (batch, rows):
        moved = record.to(torch.device("meta"))
        same = record.to(torch.device("cpu"))
        for name in type(record).__dataclass_fields__:
            assert getattr(moved, name).is_meta
            assert torch.equal(getattr(same, name), getattr(record, name))
    bare = Batch(batch.input_ids, batch.position_ids, batch.labels, batch.sample_ids)
    assert bare.to(torch.device("meta")).domain_ids is None
    assert bare.rows().to(torch.device("meta")).domains is None
    assert isinstance(rows.to(torch.device("cpu")), Rows)


def test_a_part_of_the_rows_keeps_every_column() -> None:
    rows = packed().rows()
    for which in (slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True, False])):
        part = rows.part(which)
        assert part.labels.tolist() == [25, 27]
        for name in type(rows).__dataclass_fields__:
            assert torch.equal(getattr(part, name), getattr(rows, name)[1:3])
