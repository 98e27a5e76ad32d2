"""Weights rounded in training: on the grid of the formula, and with the logits of the export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from collegium.export import foreign
from collegium.export.fake_quantization import WeightGrid, fake_quantize
from collegium.export.formats import FORMATS
from collegium.export.torchao_weights import GROUP_SIZE
from collegium.train.checkpoint import replace

pytestmark = pytest.mark.filterwarnings("ignore")
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fake")
    replace(tiny.save_tiny(root / "new", intermediate_size=96), root / "student")
    return root / "student"


def prepared(student: Path, grid: WeightGrid):
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    fake_quantize(model, grid)
    return model


def on_scale(weight: torch.Tensor, by: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Values over the scale of their group of `by`, s = max |W| / (2^(b-1) - 1/2), in float64."""
    scale = by.detach().double().reshape(-1, group).abs().amax(1, keepdim=True)
    scale /= 2 ** (bits - 1) - 0.5
    return weight.detach().double().reshape(-1, group) / scale


@pytest.mark.parametrize("name", ["torchao-int8", "torchao-int4"])
def test_its_logits_are_those_of_the_export(name: str, student: Path, tmp_path: Path) -> None:
    form = FORMATS[name]
    form.write(student, tmp_path)
    ids = np.random.default_rng(0).integers(0, 400, (2, 20))
    exported = foreign.load(form.source(tmp_path), 1).logits(ids)[0]
    assert form.grid is not None
    model = prepared(student, form.grid).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.numpy()
    exact = foreign.TransformersModel(str(student)).logits(ids)[0]
    # Int8Tensor multiplies by the scale after the product: three roundings of float32.
    assert np.abs(logits - exported).max() < 2e-6
    assert np.abs(exact - exported).max() > 1e-3


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, 32), (4, None)], ids=str)
def test_weights_lie_on_the_grid_and_keep_their_names(
    bits: int, group: int | None, student: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    model = prepared(student, WeightGrid(bits=bits, group_size=group))  # type: ignore[arg-type]
    assert dict(model.state_dict()).keys() == dict(plain.state_dict()).keys()
    layer = model.get_submodule(LAYER)
    rounded = layer.weight_fake_quantizer(layer.weight)
    sizes = layer.weight, bits, group or layer.in_features
    levels, exact = on_scale(rounded, *sizes), on_scale(layer.weight, *sizes)
    assert (levels - levels.round()).abs().max() < 1e-4
    # To the nearest level. The largest weight of a group is half a level beyond the last one.
    assert (levels - exact).abs().max() < 0.5 + 1e-4
    assert (levels.round().min(), levels.round().max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    # The head is read by the losses, and no format of torchao rounds it.
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_gradients_pass_straight_through(student: Path) -> None:
    layer = prepared(student, WeightGrid(bits=4, group_size=32)).get_submodule(LAYER)
    inputs, slope = torch.randn(5, layer.in_features), torch.randn(5, layer.out_features)
    layer(inputs).mul(slope).sum().backward()
    # That of a plain linear layer, but for the largest weights, which may be cut to the last level.
    is_inside = on_scale(layer.weight, layer.weight, 4, 32).abs() < 7.49
    is_inside = is_inside.reshape(layer.weight.shape)
    expected = slope.T @ inputs
    torch.testing.assert_close(layer.weight.grad[is_inside], expected[is_inside])
    assert is_inside.float().mean() > 0.9


def test_each_quantized_format_has_a_grid() -> None:
    grids = {name: form.grid for name, form in FORMATS.items() if form.grid is not None}
    assert grids == {
        "onnx-int8": WeightGrid(bits=8),
        "torchao-int8": WeightGrid(bits=8),
        "torchao-int4": WeightGrid(bits=4, group_size=GROUP_SIZE),
        "gguf-q8_0": WeightGrid(bits=8, group_size=32),
    }


def test_layers_that_are_not_divisible_into_groups_are_refused(student: Path) -> None:
    with pytest.raises(ValueError, match="group"):
        prepared(student, WeightGrid(bits=4, group_size=64))
