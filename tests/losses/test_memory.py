"""Peak memory of a block matches the bytes per logit that its size is chosen from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from collegium.distributions import Answer, HiddenRows
from collegium.fusion.conflict import TruthFallback
from collegium.fusion.fuse import Fusion
from collegium.fusion.rules import BestSingle, Consensus, Uniform
from collegium.kernels.plain import TorchKernels
from collegium.losses.divergences import JensenShannon, ReverseKL, SkewedReverseKL
from collegium.losses.row_terms import DivergenceTerm
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Head, Rows

N, V, D = 32, 64, 4
F32, BF16 = torch.float32, torch.bfloat16


class LargeStorages(TorchDispatchMode):
    """Records the peak bytes of new storages of at least `min_size` bytes."""

    def __init__(self, min_size: int) -> None:
        super().__init__()
        self._min_size = min_size
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() >= self._min_size:
                storage = leaf.untyped_storage()
                self._live[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: ref for key, ref in self._live.items() if not ref[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


@pytest.mark.parametrize(
    ("student", "teachers", "fusion", "temperature", "expected"),
    [
        # Buffers `logits` and `pool`: 4 + 4 bytes per logit, for bfloat16 heads too, whose products
        # are in float32.
        (F32, [], None, 1.0, 4),
        (BF16, [], None, 1.0, 4),
        (F32, [F32], Fusion(), 1.0, 8),
        (BF16, [BF16], Fusion(), 1.0, 8),
        (BF16, [BF16], Fusion(), 2.0, 8),
        (F32, [F32], Fusion(), 2.0, 8),
        (BF16, [BF16] * 2, Fusion(), 1.0, 8),
        (BF16, [BF16] * 5, Fusion(), 1.0, 8),
        (BF16, [BF16] * 5, Fusion(), 2.0, 8),
        (F32, [F32] * 5, Fusion(weighting=Uniform()), 1.0, 8),
        (BF16, [F32] * 2, Fusion(), 1.0, 8),
        (F32, [BF16] * 2, Fusion(pool="log_linear"), 1.0, 8),
        (BF16, [BF16] * 3, Fusion(weighting=BestSingle(teacher="t1")), 1.0, 8),
    ],
)
def test_peak_of_a_block_equals_its_budget(
    monkeypatch, student, teachers, fusion, temperature, expected
):
    bytes_per_logit, peak = measure(monkeypatch, student, teachers, fusion, temperature)
    assert bytes_per_logit == expected
    assert peak == expected * N * V


@pytest.mark.parametrize(
    "fusion",
    [
        Fusion(pool="power_mean"),
        Fusion(weighting=Consensus()),
        Fusion(pooled_temperature=1.5),
        Fusion(pool="log_linear", conflict=TruthFallback()),
    ],
    ids=str,
)
def test_fusions_that_compare_teachers_stay_within_the_budget(monkeypatch, fusion):
    bytes_per_logit, peak = measure(monkeypatch, F32, [F32] * 3, fusion, 1.0)
    assert peak <= bytes_per_logit * N * V


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_further_divergences_take_one_more_buffer(monkeypatch, temperature):
    """The gradient of those before; with several temperatures also the softened target."""
    kinds = [JensenShannon(), JensenShannon(), SkewedReverseKL(), ReverseKL()]
    terms = [DivergenceTerm(divergence=kind) for kind in kinds]
    terms[1] = DivergenceTerm(divergence=kinds[1], temperature=temperature)
    peaks = [
        measure(monkeypatch, F32, [F32] * 2, Fusion(), 1.0, terms[:count])[1] / (N * V)
        for count in (1, 2, 4)
    ]
    assert peaks[1] <= peaks[0] + (4 if temperature == 1.0 else 12)
    assert peaks[2] == peaks[1]


def measure(
    monkeypatch: Any,
    student: torch.dtype,
    teachers: list[torch.dtype],
    fusion: Fusion | None,
    temperature: float,
    terms: list[Any] | None = None,
) -> tuple[int, int]:
    """Return the declared bytes per logit of a block of all rows, and its peak in bytes."""
    declared = []

    def fitted(*args: Any, **options: Any) -> int:
        declared.append(options["bytes_per_logit"])
        return N

    monkeypatch.setattr("collegium.train.objective.default_block_size", fitted)
    # Strips of one row, which are smaller than the storages that count.
    monkeypatch.setattr("collegium.kernels.plain.CPU_STRIP_BYTES", 1)
    monkeypatch.setattr("collegium.train.step.kernels_for", lambda *_: TorchKernels())

    def hidden_rows(dtype: torch.dtype) -> HiddenRows:
        return HiddenRows(torch.randn(N, D).to(dtype), Head(torch.randn(V, D).to(dtype)))

    ours = hidden_rows(student)
    ours.head.weight.requires_grad_()
    theirs = [Answer(f"t{k}", hidden_rows(dtype)) for k, dtype in enumerate(teachers)]
    number = torch.arange(N)
    rows = Rows(number, number % V, number // 8, number // 8)
    options = ObjectiveOptions(temperature=temperature, backend="torch")
    if terms is not None:
        options = ObjectiveOptions(terms=terms, backend="torch")
    objective = Objective(options, fusion)
    with LargeStorages(N * V) as watch:
        row_losses(objective, ours, theirs, rows)
    return declared[0], watch.peak
