"""Recorded teachers give the answers of the live ones, bit for bit."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from collegium.data.collate import Collator
from collegium.errors import DataError, ModelError
from collegium.teachers.local import LocalTeacher
from collegium.teachers.options import LocalOptions
from collegium.teachers.recorded import record
from collegium.types import IGNORE, Batch
from refusals import refused
from tiny import save_tiny, tiny_model

V = 90


def make_batch(seed: int) -> Batch:
    ids = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(seed))
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], list(range(9))])
    samples = torch.tensor([[7] * 4 + [8] * 5, [9] * 9])
    return Batch(ids, position, ids.clone(), samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_recording_equals_the_live_teacher(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model(96, model_type="phi").to(dtype)
    live = LocalTeacher("t", model, vocab_size=V, logit_scale=1.5)
    batches = [make_batch(1), make_batch(2)]
    recorded = record(live, [(batch, batch.rows()) for batch in batches], tmp_path)
    assert recorded.name == "t"
    for batch in reversed(batches):
        rows = batch.rows()
        expected = live.score(batch, rows).distribution.logits(slice(None))
        assert torch.equal(recorded.score(batch, rows).distribution.logits(slice(None)), expected)


def test_windows_come_back_in_other_batches(tmp_path: Path) -> None:
    # As in the second sweep of preflight: fewer windows, in other batches, with other padding.
    live = LocalTeacher("t", tiny_model(96), vocab_size=V)
    ids = [torch.randint(V, (n,), generator=torch.Generator().manual_seed(n)) for n in range(5, 12)]
    items = [
        {"input_ids": row, "labels": row, "sample_ids": torch.full((len(row),), number)}
        for number, row in enumerate(ids)
    ]
    # A window without targets has no rows.
    items[3]["labels"] = torch.full((len(ids[3]),), IGNORE)

    def batches(*groups: list[int]) -> list[Batch]:
        collate = Collator()
        return [Batch.from_inputs(collate([items[i] for i in group])) for group in groups]

    recorded = record(
        live, [(one, one.rows()) for one in batches([0, 1, 2], [3, 4, 5], [6])], tmp_path
    )
    for batch in batches([6, 0], [5, 3, 1], [2], [3, 4]):
        rows = batch.rows()
        expected = live.score(batch, rows).distribution.logits(slice(None))
        replayed = recorded.score(batch, rows).distribution.logits(slice(None))
        torch.testing.assert_close(replayed, expected, atol=1e-5, rtol=1e-5)


def test_other_batches_and_inner_layers_are_refused(tmp_path: Path) -> None:
    live = LocalTeacher("t", tiny_model(96), vocab_size=V)
    batch, other = make_batch(1), make_batch(2)
    recorded = record(live, [(batch, batch.rows())], tmp_path)
    with refused(ModelError, "teacher t: "):
        recorded.score(other, other.rows())
    with refused(ModelError, "teacher t: "):
        recorded.score(batch, batch.rows(), taps=["layer_0"])
    changed = replace(batch, labels=batch.labels.roll(1, 1))
    with refused(ModelError, "teacher t: "):
        recorded.score(changed, changed.rows())


def test_no_batch_is_refused(tmp_path: Path) -> None:
    with refused(DataError, "teacher t: "):
        record(LocalTeacher("t", tiny_model(96), vocab_size=V), [], tmp_path)


def test_every_option_is_part_of_the_identity_or_listed_as_without_effect(tmp_path: Path) -> None:
    first, second = (str(save_tiny(tmp_path / name, seed=1)) for name in ("a", "b"))
    options = LocalOptions(model=first)
    # An option without a value is left out, so that caches of earlier versions remain valid.
    every = LocalOptions(model=first, quantize="int8")
    names = {one.name for one in fields(LocalOptions)}
    content = {"weights", "config", "commit"}
    assert set(every.identity()) - content == names - LocalOptions.WITHOUT_EFFECT
    assert LocalOptions(model=first, logit_scale=2.0).identity() != options.identity()
    assert LocalOptions(model=second, device="cpu").identity() == options.identity()
    assert (
        LocalOptions(model=str(save_tiny(tmp_path / "c", seed=2))).identity() != options.identity()
    )
