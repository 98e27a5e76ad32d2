"""A head with LoRA adapters on it, as PEFT puts them there; known by what they have, so that PEFT need not be installed.

Shapes: V vocabulary, D width, r rank of an adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from collegium.errors import ModelError


def base_layer(layer: Any) -> Any:
    """The layer that adapters were put on; any other one as it is."""
    return layer.get_base_layer() if hasattr(layer, "lora_A") else layer


def effective_weight(layer: Any) -> Tensor:
    """(V, D) W + sum_a s_a B_a A_a over the active adapters, with a graph to A_a (r, D) and B_a (V, r); W itself without any.

    The block driver gives a gradient for this sum, and autograd sends it on: the sum exists, as the gradient of a trained head would.

    Raises:
        ModelError: an adapter is no such product, or drops out some of its inputs.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """
    weight_VD = base_layer(layer).weight
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return weight_VD
    for name in layer.active_adapters:
        if name in layer.lora_A:
            _require_plain(layer, name)
            # Autocast would round the sum to half precision.
            with torch.autocast(weight_VD.device.type, enabled=False):
                weight_VD = weight_VD + layer.get_delta_weight(name).to(weight_VD.dtype)
    return weight_VD


def _require_plain(layer: Any, name: str) -> None:
    if name in getattr(layer, "lora_variant", {}) or getattr(layer, "lora_bias", {}).get(name):
        raise ModelError(
            f"adapter `{name}` on the head: got more than B A; must be plain LoRA without a bias; leave out DoRA and the like, "
            "or leave the head out of target_modules"
        )
    dropout = layer.lora_dropout[name] if name in layer.lora_dropout else nn.Identity()
    if layer.training and getattr(dropout, "p", 0.0) > 0:
        raise ModelError(
            f"adapter `{name}` on the head: got lora_dropout {dropout.p:g}; must be 0, since the head's product is not the "
            "adapter's own; set it to 0, or leave the head out of target_modules"
        )
