"""Fake quantization by torchao: float weights that each forward pass rounds as an export will."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from collegium.options import torch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class WeightGrid:
    """Integers that a format rounds the weights of linear layers to.

    W = s q with q in -2^(b-1) ... 2^(b-1) - 1 and s = max |W| / (2^(b-1) - 1/2), for each group of
    weights or each row.
    """

    bits: Literal[4, 8]
    group_size: int | None = None
    """Weights of a row that share a scale. None for all of them."""


def fake_quantize(model: PreTrainedModel, grid: WeightGrid) -> None:
    """Round the weights of all linear layers but the head to a grid, in each forward pass.

    Parameters keep their names, values and data type, and get the gradient of the rounded weights
    (straight-through): saved, they are an ordinary model. In eager mode, logits are those of the
    layers that torchao quantizes to this grid, up to rounding of the matrix product.

    Source: `torchao.quantization.qat`, torchao 0.18.

    Raises:
        ValueError: a layer is not divisible into groups.
    """
    from torchao.quantization import PerAxis, PerGroup, quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig, QATStep

    head = model.get_output_embeddings()

    def is_quantized(module: nn.Module, _: str) -> bool:
        return isinstance(module, torch.nn.Linear) and module is not head

    granularity: Any = PerAxis(0) if grid.group_size is None else PerGroup(grid.group_size)
    # By its weights and not by the config of the export: torchao derives a fake-quantizer from
    # `IntxWeightOnlyConfig`, and not from `Int8WeightOnlyConfig`.
    weights = IntxFakeQuantizeConfig(getattr(torch, f"int{grid.bits}"), granularity=granularity)
    preparation = QATConfig(weight_config=weights, step=QATStep.PREPARE)
    quantize_(model, preparation, filter_fn=is_quantized)
