"""LoRA adapters of PEFT on the head of a model.

Shapes: V vocabulary, D width, r rank of an adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collegium.errors import ModelError
from collegium.options import torch

if TYPE_CHECKING:
    from torch import Tensor


def base_layer(layer: Any) -> Any:
    """Return the layer that the adapters wrap. A layer without adapters is returned unchanged."""
    # Detected by attribute, not by type, so PEFT stays an optional dependency.
    return layer.get_base_layer() if hasattr(layer, "lora_A") else layer


def effective_weight(layer: Any) -> Tensor:
    """Return the merged weight (V, D): W + sum_a s_a B_a A_a over the active adapters.

    It is differentiable with respect to A_a (r, D) and B_a (V, r). Without adapters it is W itself.
    Raises ModelError if an adapter is not plain LoRA, or has dropout.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """
    weight_VD = base_layer(layer).weight
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return weight_VD
    for name in layer.active_adapters:
        if name in layer.lora_A:
            _require_plain(layer, name)
            # The loss engine returns a gradient for this sum and autograd propagates it to A and B.
            # Materializing the sum costs as much memory as the gradient of a fully trained head.
            # Autocast would round it to half precision.
            with torch.autocast(weight_VD.device.type, enabled=False):
                weight_VD = weight_VD + layer.get_delta_weight(name).to(weight_VD.dtype)
    return weight_VD


def _require_plain(layer: Any, name: str) -> None:
    if name in getattr(layer, "lora_variant", {}) or getattr(layer, "lora_bias", {}).get(name):
        raise ModelError(
            f"adapter `{name}` on the head: got a LoRA variant or a bias; must be plain LoRA; "
            "disable DoRA and lora_bias, or leave the head out of target_modules"
        )
    # The engine multiplies by the merged weight and never runs the adapter's forward, so it cannot
    # apply dropout to the adapter's inputs.
    # PEFT has an identity for a dropout of 0.
    dropout = getattr(layer.lora_dropout[name], "p", 0) if name in layer.lora_dropout else 0
    if layer.training and dropout > 0:
        raise ModelError(
            f"adapter `{name}` on the head: got lora_dropout {dropout:g}; must be 0, since "
            "the adapter's forward is not called; set it to 0, or leave the head out of "
            "target_modules"
        )
