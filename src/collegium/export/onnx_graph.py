"""ONNX graphs of a student: inputs and outputs with a key-value cache, in float32 or int8.

Inputs and outputs have the names that transformers.js and optimum use: `input_ids`,
`attention_mask`, `position_ids` and `past_key_values.N.key` lead to `logits` and `present.N.key`.

Shapes: B sequences, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from collegium.errors import ExportError, first_line
from collegium.export.fake_quantization import WeightGrid
from collegium.export.format import Format, copy_files, quiet
from collegium.models.forward import takes_positions
from collegium.models.loading import load_model
from collegium.models.options import ModelOptions
from collegium.options import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

GRAPH = "model.onnx"
WEIGHTS = f"{GRAPH}.data"
MAX_INLINE_BYTES = 1 << 30
"""Larger graphs keep their weights in a second file: protobuf ends at 2 GiB."""
BLOCK_SIZE = 64
"""Input channels that share a scale in the finer form of int8: 0.27 of the float32 bytes."""
INT8_ACTIVATIONS = 4
"""`accuracy_level` of the operator MatMulNBits that rounds activations by block to int8."""
CACHED_LAYERS = frozenset(["full_attention", "sliding_attention", "chunked_attention"])
"""Layer types of a config whose only state is their keys and values."""


@dataclass(frozen=True, kw_only=True)
class Onnx(Format):
    """A float32 graph for ONNX Runtime."""

    packages = ("onnx", "onnxruntime", "onnxscript")
    loader = "onnxruntime"
    file = GRAPH

    def check(
        self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, where: str
    ) -> None:
        super().check(config, tokenizer, where)
        text_config = config.get_text_config()
        layers = getattr(text_config, "layer_types", None) or ["full_attention"]
        others = sorted({*layers} - CACHED_LAYERS)
        if others or config.is_encoder_decoder or not getattr(text_config, "use_cache", True):
            kinds = f" with layers of type {others[0]}" if others else ""
            raise ExportError(
                f"{where}: got a student of type {config.model_type}{kinds}; must have a key-value "
                "cache in every layer; choose another format"
            )

    def write(self, student: Path, target: Path) -> None:
        copy_files(student, target, weights=False)
        where = str(student)
        model = load_model(ModelOptions(model=where, dtype="float32", device="cpu"), where=where)
        # Exporters and runtimes raise errors of any type for graphs that they do not support.
        try:
            with quiet():
                _save_graph(model, target / GRAPH)
                self.transform(target / GRAPH)
        except Exception as error:
            raise ExportError(
                f"{where}: {model.config.model_type} cannot be exported to ONNX "
                f"({first_line(error)}); choose another format"
            ) from error

    def transform(self, graph: Path) -> None:
        """Change the float32 graph in place. A no-op here."""


@dataclass(frozen=True, kw_only=True)
class OnnxInt8(Onnx):
    """A graph with int8 weights and activations.

    Weights have a scale by output channel and activations one by tensor and call, or both have one
    by block of input channels.
    """

    block_size: int | None = None
    """Input channels of a block."""

    @property
    def grid(self) -> WeightGrid:
        return WeightGrid(bits=8)

    @property
    def finer(self) -> OnnxInt8 | None:
        """The same in blocks, where a few large activations leave the others no levels."""
        return dataclasses.replace(self, block_size=BLOCK_SIZE) if self.block_size is None else None

    def transform(self, graph: Path) -> None:
        import onnx

        model = onnx.load(str(graph))
        quantize_tables(model.graph)
        is_large = (graph.parent / WEIGHTS).exists()
        for path in (graph, graph.parent / WEIGHTS):
            path.unlink(missing_ok=True)
        if self.block_size is None:
            _quantize_by_tensor(model, graph, is_large=is_large)
        else:
            _quantize_by_block(model, graph, self.block_size, is_large=is_large)
        if not is_large:
            model = onnx.load(str(graph))
            del model.graph.value_info[:]  # shapes, which every runtime infers again
            onnx.save(model, str(graph))


def _quantize_by_tensor(model: Any, path: Path, *, is_large: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        model,
        path,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=is_large,
    )


def _quantize_by_block(model: Any, path: Path, size: int, *, is_large: bool) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer: Any = MatMulNBitsQuantizer(
        model, bits=8, block_size=size, is_symmetric=True, accuracy_level=INT8_ACTIVATIONS
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), is_large)


def _save_graph(model: PreTrainedModel, path: Path) -> None:
    """Trace a model with a cache of dynamic length, and save its graph without debug data."""
    wrapper = _flat_cache_module(model)
    size, past_length, length = 2, 3, 4
    ids_BT = torch.zeros(size, past_length, dtype=torch.int64)
    with torch.no_grad():
        cache = model(input_ids=ids_BT, use_cache=True).past_key_values
    past = list(_flat(cache))
    names = [f"{i}.{part}" for i in range(len(past) // 2) for part in ("key", "value")]
    total = past_length + length
    arguments: dict[str, Any] = {
        "input_ids": torch.zeros(size, length, dtype=torch.int64),
        "attention_mask": torch.ones(size, total, dtype=torch.int64),
        "position_ids": torch.arange(past_length, total).repeat(size, 1),
    }
    dynamic = torch.export.Dim.DYNAMIC
    shapes = [{0: dynamic, 1: dynamic} for _ in arguments]
    program = torch.onnx.export(
        wrapper,
        (*arguments.values(), *past),
        dynamo=True,
        verbose=False,
        input_names=[*arguments, *(f"past_key_values.{name}" for name in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes=(*shapes, tuple({0: dynamic, 2: dynamic} for _ in past)),
    )
    assert program is not None  # with dynamo=True
    # Stack traces of every node: three times the size of the demo's weights.
    graph: Any = program.model.graph
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    num_bytes = sum(parameter.numel() * 4 for parameter in model.parameters())
    program.save(str(path), external_data=num_bytes > MAX_INLINE_BYTES)


def _flat(cache: Any) -> Iterator[Tensor]:
    """Yield keys and values of each layer, (B, heads, T, width)."""
    for layer in cache.layers:
        yield layer.keys
        yield layer.values


def _flat_cache_module(model: PreTrainedModel) -> nn.Module:
    """Wrap a model so that its cache is a flat list of tensors."""
    from transformers import DynamicCache

    has_positions = takes_positions(model)

    class FlatCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
        ) -> tuple[Tensor, ...]:
            # Without a config every layer keeps all positions, and the mask limits a sliding one.
            cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
            positions = {"position_ids": position_ids} if has_positions else {}
            output = cast(Any, self.model)(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
                **positions,
            )
            return output.logits, *_flat(output.past_key_values)

    return FlatCache().eval()


def quantize_tables(graph: Any) -> None:
    """Replace embedding tables by int8 rows with a scale each, shared with a tied head.

    W[v] = s[v] q[v] with s[v] = max |W[v]| / 127. The head multiplies the same q, transposed, so a
    tied table is stored once. `quantize_dynamic` has one scale for a whole table, and multiplies a
    tied head in float32.
    """
    from onnx import numpy_helper

    tables = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    gathers = [n for n in graph.node if n.op_type == "Gather" and n.input[0] in tables]
    for name in dict.fromkeys(node.input[0] for node in gathers):
        table_VD = numpy_helper.to_array(tables[name])
        if table_VD.dtype != np.float32:
            continue
        scale_V1 = np.abs(table_VD).max(1, keepdims=True) / np.float32(127)
        scale_V1[scale_V1 == 0] = 1
        rows_VD = np.rint(table_VD / scale_V1).astype(np.int8)
        stored = {f"{name}_rows": rows_VD, f"{name}_scale": scale_V1}
        transposes = [n for n in graph.node if n.op_type == "Transpose" and n.input[0] == name]
        heads = {node.output[0] for node in transposes}
        new: list[Any] = []
        for node in graph.node:
            new += _quantized_nodes(node, name, heads) or [node]
        del graph.node[:], graph.value_info[:]  # the transposed table has another type now
        graph.node.extend(new)
        used = {edge for node in graph.node for edge in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        new_tables = [numpy_helper.from_array(array, key) for key, array in stored.items()]
        graph.initializer.extend([*kept, *new_tables])


def _quantized_nodes(node: Any, table: str, heads: set[str]) -> list[Any]:
    """Return the nodes that replace a use of `table`, or of its transposes `heads`, if any."""
    from onnx import TensorProto, helper

    rows, out = f"{table}_rows", node.output[0]
    make, as_float = cast(Any, helper.make_node), {"to": TensorProto.FLOAT}
    if node.op_type == "Gather" and node.input[0] == table:
        ids = node.input[1]
        return [
            make("Gather", [rows, ids], [f"{out}_int8"]),
            make("Cast", [f"{out}_int8"], [f"{out}_float"], **as_float),
            make("Gather", [f"{table}_scale", ids], [f"{out}_scale"]),
            make("Mul", [f"{out}_float", f"{out}_scale"], [out]),
        ]
    if node.op_type == "Transpose" and node.input[0] == table:
        return [make("Transpose", [rows], [out], perm=[1, 0])]
    if node.op_type != "MatMul" or node.input[1] not in heads:
        return []
    x, w, q = node.input[0], node.input[1], f"{out}_quantized"
    # The order that ONNX Runtime fuses into one operator.
    return [
        make("DynamicQuantizeLinear", [x], [q, f"{q}_scale", f"{q}_zero"]),
        make("MatMulInteger", [q, w, f"{q}_zero"], [f"{out}_int32"]),
        make("Cast", [f"{out}_int32"], [f"{out}_float"], **as_float),
        make("Transpose", [f"{table}_scale"], [f"{out}_row_scales"], perm=[1, 0]),
        make("Mul", [f"{q}_scale", f"{out}_row_scales"], [f"{out}_scale"]),
        make("Mul", [f"{out}_float", f"{out}_scale"], [out]),
    ]
