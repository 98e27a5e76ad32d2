"""Memory of passes counted on fake tensors, against real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from collegium.models.footprint import count_pass
from collegium.models.forward import body_of
from collegium.models.loading import build_model

SHAPE = (4, 48)
CPU = torch.device("cpu")


def config_of(model_type: str, layers: int) -> Any:
    return AutoConfig.for_model(
        model_type,
        vocab_size=300,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


def saved_bytes(config: Any) -> int:
    """Bytes that autograd holds after a real forward pass, without parameters."""
    model = build_model(config, seed=0).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = torch.zeros(SHAPE, dtype=torch.long)
        body_of(model)(input_ids=ids, use_cache=False)
    return sum(sizes.values())


@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt_neox"])
def test_counted_bytes_are_those_of_real_tensors(model_type: str, layers: int) -> None:
    config = config_of(model_type, layers)
    counted = count_pass(config, SHAPE, dtype="float32", device=CPU)
    assert counted is not None
    assert counted.saved == pytest.approx(saved_bytes(config), rel=0.2)
    assert counted.saved <= counted.peak < 1.5 * counted.saved + 10 * SHAPE[0] * SHAPE[1] * 160 * 4


def test_options_that_change_a_pass() -> None:
    config = config_of("llama", 6)
    exact = count_pass(config, SHAPE, dtype="float32", device=CPU)
    doubled = count_pass(config, (2 * SHAPE[0], SHAPE[1]), dtype="float32", device=CPU)
    half = count_pass(config, SHAPE, dtype="bfloat16", device=CPU)
    again = count_pass(config, SHAPE, dtype="float32", device=CPU, is_checkpointed=True)
    frozen = count_pass(config, SHAPE, dtype="float32", device=CPU, is_trained=False)
    assert exact
    assert doubled
    assert half
    assert again
    assert frozen
    assert doubled.peak == pytest.approx(2 * exact.peak, rel=0.05)
    # The norms compute in float32.
    assert 0.4 * exact.peak < half.peak < 0.8 * exact.peak
    assert again.peak < 0.6 * exact.peak
    assert frozen.peak < 0.3 * exact.peak


def test_a_model_that_cannot_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("depends on values")

    monkeypatch.setattr("collegium.models.footprint._run", fail)
    assert count_pass(config_of("llama", 2), SHAPE, dtype="float32", device=CPU) is None
