"""All formats of an export by name. A new format is a class with `write`, and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from collegium.export.format import Bounds, Format, HuggingFace
from collegium.export.gguf_file import Gguf
from collegium.export.onnx_graph import Onnx, OnnxInt8
from collegium.export.torchao_weights import TorchAo

FLOAT32 = Bounds(bits_per_byte=1e-4, logits=1e-4)
FLOAT16 = Bounds(bits_per_byte=2e-3, logits=2e-2)
INT8 = Bounds(bits_per_byte=0.02)
INT4 = Bounds(bits_per_byte=0.10)

FORMATS: Mapping[str, Format] = {
    "hf": HuggingFace(bounds=FLOAT32),
    "onnx": Onnx(bounds=FLOAT32),
    "onnx-int8": OnnxInt8(bounds=INT8),
    "torchao-int8": TorchAo(bounds=INT8, bits=8),
    "torchao-int4": TorchAo(bounds=INT4, bits=4),
    "gguf-f16": Gguf(bounds=FLOAT16, weights="F16"),
    "gguf-q8_0": Gguf(bounds=INT8, weights="Q8_0"),
}
"""Formats by the names of `ExportOptions.to`."""
