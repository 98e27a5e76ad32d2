"""`torch.compile` of the body: same loss and gradients, no recompilation per batch size."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import tiny
from collegium.models.forward import forward_rows
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def batch(num_windows: int) -> Batch:
    ids = torch.arange(num_windows * 12).reshape(num_windows, 12) % 40
    position = torch.arange(12).expand(num_windows, -1).contiguous()
    samples = torch.arange(num_windows)[:, None].expand(-1, 12).contiguous()
    return Batch(ids, position, ids, samples)


def gradients(model, num_windows: int) -> list[torch.Tensor]:
    objective = Objective(ObjectiveOptions(), None)
    inputs = batch(num_windows)
    rows = inputs.rows()
    states = forward_rows(model, inputs, rows, vocab_size=model.config.vocab_size)
    total = row_losses(objective, states, [], rows).total / len(rows)
    return [total, *torch.autograd.grad(total, list(model.parameters()))]


def test_no_batch_size_after_the_second_recompiles():
    torch._dynamo.reset()
    plain, model = tiny.tiny_model(seed=0), tiny.tiny_model(seed=0)
    counter = CompileCounter()
    model.base_model.compile(backend=counter)
    counts = []
    for size in (2, 3, 5, 7, 4):
        actual, expected = gradients(model, size), gradients(plain, size)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[2:] == [counts[1]] * 3
