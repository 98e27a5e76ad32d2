"""Definitions of the numbers in a log row."""

from __future__ import annotations

import pytest
import torch

from collegium.train.meter import StepMeter
from collegium.types import LossSum, Rows

SAMPLE_DOMAINS = torch.tensor([1, 0, 1])
"""Documents 0 and 2 are law, document 1 is code, none is prose."""


def micro_batch(samples: list[int], weights_a: list[float], **norms: float) -> LossSum:
    """Make rows of these documents with weights of teacher `a`; losses are 3 and 5 per row."""
    size = len(samples)
    weights_N = torch.tensor(weights_a)
    index = torch.arange(size)
    return LossSum(
        total=torch.tensor(0.9 * 3.0 * size + 0.1 * 5.0 * size),
        terms={"kd": torch.tensor(3.0 * size), "ce": torch.tensor(5.0 * size)},
        weights={"kd": 0.9, "ce": 0.1},
        grad_norms={name: torch.tensor(norm) for name, norm in norms.items()},
        rows=Rows(index, index, index, torch.tensor(samples)),
        teacher_weights_KN=torch.stack([weights_N, 1 - weights_N]),
    )


def test_a_row_holds_means_per_token_of_all_micro_batches() -> None:
    meter = StepMeter(["a", "b"], domains=["code", "law", "prose"], sample_domains=SAMPLE_DOMAINS)
    meter.add(micro_batch([0, 0, 1], [0.25, 0.75, 0.1], kd=6.0, ce=2.0))
    meter.add(micro_batch([2], [0.5]))
    row = meter.row()
    assert row.loss == pytest.approx(0.9 * 3 + 0.1 * 5)
    assert row.terms == pytest.approx({"kd": 3.0, "ce": 5.0})
    assert row.term_weights == {"kd": 0.9, "ce": 0.1}
    assert row.grad_shares == pytest.approx({"kd": 0.75, "ce": 0.25})
    assert row.teacher_weights == pytest.approx({"a": 1.6 / 4, "b": 2.4 / 4})
    assert list(row.domain_weights) == ["code", "law"]
    assert row.domain_weights["code"] == pytest.approx({"a": 0.1, "b": 0.9})
    assert row.domain_weights["law"] == pytest.approx({"a": 0.5, "b": 0.5})
    assert row.num_tokens == 4


def test_the_next_row_resets_all_but_the_token_count() -> None:
    meter = StepMeter(["a", "b"], domains=["code", "law", "prose"], sample_domains=SAMPLE_DOMAINS)
    meter.add(micro_batch([0, 1], [1.0, 1.0], kd=1.0, ce=1.0))
    meter.row()
    meter.add(micro_batch([1], [0.25]))
    row = meter.row()
    assert row.num_tokens == 3
    assert row.teacher_weights == pytest.approx({"a": 0.25, "b": 0.75})
    assert list(row.domain_weights) == ["code"]
    assert row.grad_shares == {}


def test_a_meter_continues_from_its_state() -> None:
    whole, first = (
        StepMeter(["a", "b"], domains=["code", "law", "prose"], sample_domains=SAMPLE_DOMAINS)
        for _ in range(2)
    )
    parts = [micro_batch([0, 1], [1.0, 0.5], kd=1.0, ce=3.0), micro_batch([2], [0.25])]
    for part in parts:
        whole.add(part)
    first.add(parts[0])
    rest = StepMeter(["a", "b"], domains=["code", "law", "prose"], sample_domains=SAMPLE_DOMAINS)
    rest.load(first.state(), torch.device("cpu"))
    rest.add(parts[1])
    ours, theirs = rest.row(), whole.row()
    assert (ours.tokens_per_s or 0) > 0
    assert (theirs.tokens_per_s or 0) > 0
    assert ours.model_copy(update={"tokens_per_s": None}) == theirs.model_copy(
        update={"tokens_per_s": None}
    )
