"""Quantized weights of frozen models: by torchao after loading, or in the files of a folder.

Linear layers of the body are quantized. Embeddings, norms, routers that are no linear layers and
the head keep their float type: the losses read the head's weight block by block, and its rounding
would reach every logit.
"""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from collegium.errors import ModelError
from collegium.models.weights import QUANTIZED_PACKAGES
from collegium.options import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

Quantization = Literal["int8", "int4"]
GROUP = 32
"""Weights of a row that share a scale in int4, as in the formats of GGUF."""


def require_packages(method: str | None, *, where: str) -> None:
    """Raise ModelError if a package that loads weights of this method is not installed."""
    packages = QUANTIZED_PACKAGES[method] if method else ()
    missing = [name for name in packages if not _is_installed(name)]
    if missing:
        raise ModelError(
            f"{where}: its weights are quantized by {method}; must have the package "
            f"{' and '.join(missing)}; pip install {' '.join(missing)}, or use the original model"
        )


def require_torchao(where: str) -> None:
    """Raise ModelError if torchao is not installed."""
    if not _is_installed("torchao"):
        raise ModelError(
            f"{where}: quantization needs the package torchao; pip install 'collegium[quantize]'"
        )


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def quantized_layers(model: PreTrainedModel, kind: Quantization) -> dict[str, nn.Linear]:
    """Return the layers that `quantize_` rounds, by name: linear ones but the head.

    For int4 also without those whose inputs are no multiple of `GROUP`.
    """
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and layer is not head
        and (kind == "int8" or layer.in_features % GROUP == 0)
    }


def quantize_(model: PreTrainedModel, kind: Quantization, *, where: str) -> None:
    """Round the weights of a model on its device in place, symmetrically around 0.

    int8 has a scale per row. int4 has one per `GROUP` weights of a row. Activations keep their
    type. Raises ModelError without torchao or without such layers.
    """
    require_torchao(where)
    from torchao.quantization import quantize_ as torchao_quantize_

    layers = set(quantized_layers(model, kind).values())
    if not layers:
        raise no_layers_error(model, kind, where=where)
    torchao_quantize_(model, _config(kind, model), lambda layer, _: layer in layers)


def no_layers_error(model: PreTrainedModel, kind: Quantization, *, where: str) -> ModelError:
    """Return the error for a model without layers to round."""
    return ModelError(
        f"{where}: got {kind} for {model.config.model_type}, which has no linear layers that it "
        "can round; must be omitted; remove `quantize`"
    )


def _config(kind: Quantization, model: PreTrainedModel) -> Any:
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )

    if kind == "int8":
        return Int8WeightOnlyConfig()
    if is_packed(kind, model.device, model.dtype):
        packing: Any = "tile_packed_to_4d"
        return Int4WeightOnlyConfig(GROUP, int4_packing_format=packing)
    int4 = torch.int4  # pyright: ignore[reportAttributeAccessIssue]  (not in the stubs)
    return IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(GROUP))


def is_packed(kind: Quantization, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torchao stores two weights per byte: int4 on CUDA under bfloat16.

    Elsewhere each value of int4 takes a byte (torchao 0.18).
    """
    return kind == "int4" and device.type == "cuda" and dtype == torch.bfloat16


def quantized_bytes(model: PreTrainedModel, kind: Quantization, device: torch.device) -> int:
    """Return the bytes of a quantized model; `model` has its shapes and types, maybe no values."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    for layer in quantized_layers(model, kind).values():
        weight = layer.weight
        scales = weight.numel() // (layer.in_features if kind == "int8" else GROUP)
        # Zero points are stored as bytes, or with the scales of packed weights.
        zeros = 0 if kind == "int8" else scales
        size = weight.numel() + scales * weight.element_size() + zeros
        if is_packed(kind, device, weight.dtype):
            size = weight.numel() // 2 + 2 * scales * weight.element_size()
        total += size - weight.nbytes
    return total


def model_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of all parameters and buffers of a loaded model, tied ones once."""
    return sum(map(_num_bytes, {*model.parameters(), *model.buffers()}))


def _num_bytes(tensor: Tensor) -> int:
    # torchao's tensors report the size of their float weights.
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
    return sum(_num_bytes(getattr(tensor, name)) for name in names)
