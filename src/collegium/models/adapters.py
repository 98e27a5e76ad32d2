"""Adapters of PEFT: wrapped models, adapters on the head, merging, switching.

PEFT stays an optional dependency: its layers are detected by attribute, not by type.

Shapes: V vocabulary, D width, r rank of an adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from collegium.errors import ModelError
from collegium.options import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def unwrapped(model: Any, where: str) -> Any:
    """Return the transformers model inside of a `peft.PeftModel`, with its adapter layers.

    Any other object is returned unchanged. Raises ModelError for prompt tuning, which changes the
    input of the model instead of its layers.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ModelError(
            f"{where}: got a model with {type(model.active_peft_config).__name__}; must have "
            "adapters inside of its layers; use LoRA, or the model without it"
        )
    return model.get_base_model()


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that PEFT inserted, by their names, without those inside of another."""
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        is_inner = any(name.startswith(f"{outer}.") for outer in layers)
        if not is_inner and (hasattr(module, "base_layer") or _is_auxiliary(module)):
            layers[name] = module
    return layers


def _is_auxiliary(module: nn.Module) -> bool:
    """Whether it is a trained copy of a layer (`modules_to_save`) or of single tokens."""
    return hasattr(module, "unload_and_optionally_merge_module")


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a plain copy whose weights include the active adapters; `model` is not changed."""
    return merged(copy.deepcopy(model))


def merged(plain: PreTrainedModel) -> PreTrainedModel:
    """Merge the active adapters into the weights in place, and return the model."""
    _untie(plain)
    for name, layer in adapter_layers(plain).items():
        if _is_auxiliary(layer):
            replacement = layer.unload_and_optionally_merge_module(
                merge=True, safe_merge=False, adapter_names=None
            )
        else:
            if not layer.disable_adapters and not layer.merged:
                layer.merge()
            replacement = layer.get_base_layer()
        plain.set_submodule(name, replacement)
    # Otherwise `save_pretrained` would write adapters only.
    plain._hf_peft_config_loaded = False
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain


def _untie(model: PreTrainedModel) -> None:
    """Give head and embedding weights of their own where an adapter changes one of them only."""
    head: Any = model.get_output_embeddings()
    layers, config = (head, model.get_input_embeddings()), model.config.get_text_config()
    is_adapted = any(hasattr(x, "base_layer") or hasattr(x, "modules_to_save") for x in layers)
    if is_adapted and config.tie_word_embeddings:
        layer = head.base_layer if hasattr(head, "base_layer") else base_layer(head)
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        model.config.tie_word_embeddings = config.tie_word_embeddings = False


def trained_adapters(model: nn.Module) -> list[str]:
    """Return the active adapters if they hold all trained parameters of a model, else nothing."""
    layers = adapter_layers(model).values()
    names = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    trained = [name.split(".") for name, p in model.named_parameters() if p.requires_grad]
    return names if all(set(names) & set(parts) for parts in trained) else []


@contextmanager
def active_adapter(model: nn.Module, adapter: str) -> Iterator[None]:
    """Use one adapter of a model in evaluation mode, then restore the one that was active.

    Adapters, training modes and gradient flags are restored, so that a student on the same base
    goes on unchanged.
    """
    layers = adapter_layers(model).values()
    before = [(layer, list(layer.active_adapters)) for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for layer, _ in before:
            layer.set_adapter([adapter], inference_mode=True)
        model.eval()
        yield
    finally:
        for layer, names in before:
            layer.set_adapter(names)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def base_layer(layer: Any) -> Any:
    """Return the layer that LoRA adapters wrap, or the trained copy of it (`modules_to_save`).

    A layer without adapters is returned unchanged.
    """
    if hasattr(layer, "modules_to_save"):
        is_trained = layer.active_adapters and not layer.disable_adapters
        return layer.modules_to_save[layer.active_adapter] if is_trained else layer.original_module
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
