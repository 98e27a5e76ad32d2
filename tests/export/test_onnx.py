"""ONNX graphs under ONNX Runtime: any batch and length, with a cache, in float32 and int8."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoConfig

import tiny
from collegium.errors import ExportError
from collegium.export import foreign
from collegium.export.formats import FORMATS
from collegium.export.onnx_graph import GRAPH, OnnxInt8
from collegium.train.checkpoint import replace
from refusals import refused

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with tied embeddings and grouped heads, and its float32 graph beside it."""
    root = tmp_path_factory.mktemp("onnx")
    replace(tiny.save_tiny(root / "new", tie_word_embeddings=True), root / "student")
    (root / "onnx").mkdir()
    FORMATS["onnx"].write(root / "student", root / "onnx")
    return root


def loaded(folder: Path) -> foreign.Model:
    return foreign.OnnxModel(str(folder / GRAPH), threads=1)


def test_a_graph_gives_the_logits_of_the_student_step_by_step(exported: Path) -> None:
    student = foreign.TransformersModel(str(exported / "student"))
    for size, length in ((1, 1), (3, 20)):
        ids = np.random.default_rng(length).integers(0, 400, (size, length))
        expected = student.logits(ids)[0]
        graph = loaded(exported / "onnx")
        assert np.abs(graph.logits(ids)[0] - expected).max() < 1e-5
        parts, state = [], None
        for start in range(0, length, 7):
            logits, state = graph.logits(ids[:, start : start + 7], state)
            parts.append(logits)
        assert np.abs(np.concatenate(parts, 1) - expected).max() < 1e-5


def test_a_graph_holds_its_weights_once_and_no_debug_data(exported: Path) -> None:
    weights = (exported / "student" / "model.safetensors").stat().st_size
    assert (exported / "onnx" / GRAPH).stat().st_size < weights + 40_000
    graph = onnx.load(str(exported / "onnx" / GRAPH)).graph
    assert not any(node.metadata_props for node in graph.node)


def test_blocks_confine_an_activation_far_above_the_others(tmp_path: Path) -> None:
    """One channel is large into, and small out of, a product: float logits do not change."""
    model = tiny.tiny_model(400, seed=1, num_hidden_layers=1, intermediate_size=1024)
    layer = model.model.layers[0].mlp
    with torch.no_grad():
        for weight in (layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight):
            weight.mul_(20)  # so that this layer decides the logits
        layer.up_proj.weight[3] *= 3000
        layer.down_proj.weight[:, 3] /= 3000
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "new")
    model.save_pretrained(tmp_path / "new")
    replace(tmp_path / "new", tmp_path / "student")
    ids = np.random.default_rng(0).integers(0, 400, (2, 20))
    expected = foreign.TransformersModel(str(tmp_path / "student")).logits(ids)[0]
    form, errors = FORMATS["onnx-int8"], []
    for number, one in enumerate((form, form.finer)):
        assert one is not None
        (tmp_path / str(number)).mkdir()
        one.write(tmp_path / "student", tmp_path / str(number))
        errors.append(np.abs(loaded(tmp_path / str(number)).logits(ids)[0] - expected).max())
    assert errors[1] < 0.3 * errors[0]
    assert one.finer is None


def test_int8_is_close_and_shares_the_table_of_a_tied_head(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported / "onnx", tmp_path / "int8")
    form = FORMATS["onnx-int8"]
    assert isinstance(form, OnnxInt8)
    form.transform(tmp_path / "int8" / GRAPH)
    ids = np.random.default_rng(0).integers(0, 400, (2, 20))
    expected = loaded(exported / "onnx").logits(ids)[0]
    logits = loaded(tmp_path / "int8").logits(ids)[0]
    assert 0 < np.abs(logits - expected).max() < 0.1 * expected.std() * 4
    graph = onnx.load(str(tmp_path / "int8" / GRAPH)).graph
    tensors = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    tables = {name: one for name, one in tensors.items() if one.shape == (400, 32)}
    assert [one.dtype for one in tables.values()] == [np.int8]
    # W[v] = s[v] q[v], to half a step.
    (name,) = tables
    scale = tensors[f"{name.removesuffix('_rows')}_scale"]
    table = onnx.load(str(exported / "onnx" / GRAPH)).graph
    before = next(numpy_helper.to_array(t) for t in table.initializer if [*t.dims] == [400, 32])
    assert (np.abs(tables[name] * scale - before) <= scale / 2 * 1.001).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("qwen3", {"head_dim": 16}),
        ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
        ("gpt_neox", {}),
    ],
)
def test_other_families(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    new = tiny.save_tiny(tmp_path / "new", model_type=model_type, **config)
    replace(new, tmp_path / "student")
    (tmp_path / "onnx").mkdir()
    FORMATS["onnx"].write(tmp_path / "student", tmp_path / "onnx")
    ids = np.random.default_rng(0).integers(0, 400, (2, 30))
    expected = foreign.TransformersModel(str(tmp_path / "student")).logits(ids)[0]
    graph = loaded(tmp_path / "onnx")
    logits, state = graph.logits(ids[:, :20])
    rest, _ = graph.logits(ids[:, 20:], state)
    assert np.abs(np.concatenate([logits, rest], 1) - expected).max() < 1e-5


def test_a_student_without_a_cache_of_keys_is_refused() -> None:
    config = AutoConfig.for_model(
        "lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"]
    )
    with refused(ExportError, "export.to"):
        FORMATS["onnx"].check(config, tiny.tiny_tokenizer(), "export.to")
