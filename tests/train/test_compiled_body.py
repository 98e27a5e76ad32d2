"""A compiled body is shared by all batch sizes, and its graphs do not include the losses."""

from __future__ import annotations

from typing import Any

import torch

from collegium.fusion.fuse import Fusion
from collegium.teachers.local import LocalTeacher
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import DistillStep
from tiny import tiny_model

V = 60


def make_inputs(num_windows: int, length: int = 16) -> dict[str, torch.Tensor]:
    ids = torch.randint(V, (num_windows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def test_batch_sizes_share_graphs() -> None:
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    student, plain = tiny_model(V, seed=9), tiny_model(V, seed=9)
    student.base_model.compile(backend=count)
    teacher = LocalTeacher("t", tiny_model(V, seed=1), vocab_size=V)
    counts = []
    for num_windows in (2, 3, 4, 5, 7):
        inputs = make_inputs(num_windows)
        totals = []
        for model in (student, plain):
            objective = Objective(ObjectiveOptions(), Fusion())
            total, _ = DistillStep(model, objective, vocab_size=V, teachers=[teacher])(inputs)
            total.backward()
            totals.append(total.detach())
        torch.testing.assert_close(*totals, rtol=1e-5, atol=1e-5)
        counts.append(len(graphs))
    # Only the first size compiles, and the second, which makes the size symbolic.
    assert counts[1:] == [counts[1]] * 4
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
