"""Every type of causal language model in transformers, tiny and random, is exact or refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from collegium.errors import ModelError
from collegium.models.families import MIXING_TYPES, UNSUPPORTED_TYPES
from collegium.models.folder import check_model_folder
from collegium.models.forward import forward_rows
from collegium.models.loading import check_weights, load_model
from collegium.models.options import ModelOptions
from collegium.models.probe import probe
from collegium.models.saving import check_saving
from collegium.types import Batch, Rows
from families import NOT_TINY, TYPES, V, tiny_family

HERE = "teachers.a"


def windows(*lengths: list[int]) -> Batch:
    """Random ids, one window per list of document lengths."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(V, (len(lengths), sum(lengths[0])), generator=generator)
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return Batch(ids, position, ids.clone(), torch.zeros_like(ids))


def ours(model: PreTrainedModel, batch: Batch) -> Tensor:
    index = torch.arange(batch.input_ids.numel())
    rows = Rows(index=index, labels=index, documents=index, samples=index)
    logits = forward_rows(model, batch, rows, vocab_size=V).logits(slice(None))
    return logits.view(*batch.input_ids.shape, V)


def theirs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = torch.arange(ids.shape[1]).expand_as(ids)
    return model(**inputs).logits[..., :V]


def assert_exact(model: PreTrainedModel, plain: PreTrainedModel, *, packed: bool) -> None:
    """Compare logits and gradients with those of transformers, one document per call."""
    unpacked, together = windows([24], [24]), windows([9, 15], [16, 8])
    with torch.no_grad():
        expected = theirs(plain, unpacked.input_ids)
        tolerance = 1e-4 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(ours(model, unpacked), expected, atol=tolerance, rtol=0)
        logits = ours(model, together) if packed else torch.empty(0)
        for window, start, stop in ((0, 0, 9), (0, 9, 24), (1, 0, 16), (1, 16, 24)) * packed:
            expected = theirs(plain, together.input_ids[window : window + 1, start:stop])[0]
            actual = logits[window, start:stop]
            torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)
    factor = torch.randn(2, 24, V, generator=torch.Generator().manual_seed(5))
    (ours(model.train(), unpacked) * factor).sum().backward()
    (theirs(plain.train(), unpacked.input_ids) * factor).sum().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    largest = max(float(g.abs().max()) for g in gradients.values() if g is not None)
    for name, parameter in model.named_parameters():
        actual, expected = parameter.grad, gradients[name]
        assert (actual is None) == (expected is None), name
        if actual is not None:
            # A gradient that is zero but for rounding is judged by the size of the others.
            size = max(1e-4 * largest, float(expected.abs().max()))
            torch.testing.assert_close(actual, expected, atol=1e-3 * size, rtol=0, msg=name)


def passes(model: PreTrainedModel, *, packed: bool) -> bool:
    try:
        probe(model, vocab_size=V, where=HERE, packed=packed, max_length=24)
    except ModelError:
        return False
    return True


@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_is_exact_or_refused_by_check(model_type: str, tmp_path: Path) -> None:
    plain = tiny_family(model_type, tmp_path).requires_grad_(True)
    options = ModelOptions(model=str(tmp_path), device="cpu")
    check_model_folder(options, where=HERE)
    empty = check_weights(options, where=HERE)
    assert empty is not None
    check_saving(empty, where=HERE)
    model = load_model(options, where=HERE)
    is_exact, packs = passes(model, packed=False), passes(model, packed=True)
    # The names that `check` refuses are those that the probe refuses.
    assert is_exact == (model_type not in UNSUPPORTED_TYPES)
    if is_exact:
        assert packs == (model_type not in MIXING_TYPES)
        assert_exact(model, plain, packed=packs)


def test_the_lists_name_types() -> None:
    listed = [*MIXING_TYPES, *UNSUPPORTED_TYPES]
    assert len(set(listed)) == len(listed)
    assert set(listed) | NOT_TINY <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
