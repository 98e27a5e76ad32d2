"""Forward pass of Hugging Face models: token ids in, hidden states of selected rows and a head out.

Shapes: B batch, T time, N rows (the trained positions of a batch), D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from collegium.distributions import HiddenRows
from collegium.errors import ModelError, nearest
from collegium.models.adapters import base_layer, effective_weight
from collegium.models.attention import ATTENTION, recorded_attention, to_states
from collegium.models.families import mixes_documents
from collegium.options import torch
from collegium.types import Batch, Head, Rows

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

# Config keys by which model families scale or cap their logits; `probe` catches a missing one.
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Names of the factor of the load-balancing loss, and its arguments, in transformers.
ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")
ROUTER_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def model_head(model: PreTrainedModel, vocab_size: int) -> Head:
    """Return the head of a model, truncated to V rows.

    Weight and bias are views of the parameters, so gradients reach them. With LoRA adapters the
    weight is the merged one. Raises ModelError if the head is no plain linear layer, or has fewer
    than V rows.
    """
    layer, config = head_layer(model), model.config.get_text_config()
    weight_VD = effective_weight(model.get_output_embeddings())
    rows = layer.weight.shape[0]
    if rows < vocab_size:
        raise ModelError(
            f"{config.model_type}: the head has {rows} rows; must be at least {vocab_size}, the "
            f"largest token id + 1; use the model's own tokenizer"
        )
    bias: Tensor | None = layer.bias
    return Head(
        weight=weight_VD[:vocab_size],
        bias=None if bias is None else bias[:vocab_size],
        scale=_head_scale(config),
        softcap=next((float(c) for n in SOFTCAPS if (c := getattr(config, n, None))), None),
    )


def head_layer(model: PreTrainedModel) -> nn.Linear:
    """Return the linear layer that computes the logits, with pad rows and without adapters."""
    layer = base_layer(model.get_output_embeddings())
    if not isinstance(layer, torch.nn.Linear):
        raise ModelError(
            f"{model.config.model_type}: the head is {type(layer).__name__}; must be a linear "
            f"layer; use a causal language model whose head has no adapter or a LoRA adapter"
        )
    return layer


def input_layer(model: PreTrainedModel) -> nn.Embedding:
    """Return the embedding of the token ids, with pad rows. Raises ModelError without one."""
    layer = model.get_input_embeddings()
    if not isinstance(layer, torch.nn.Embedding):
        raise ModelError(
            f"{model.config.model_type}: the input is {type(layer).__name__}; must be an "
            f"embedding; use a causal language model"
        )
    return layer


def forward_rows(
    model: PreTrainedModel,
    batch: Batch,
    rows: Rows,
    *,
    vocab_size: int,
    taps: Sequence[str] = (),
    is_student: bool = False,
) -> HiddenRows:
    """Run the body of a model without its head and gather the selected rows: (B, T) -> (N, D).

    The head is truncated to `vocab_size` rows, and the hidden states named by `taps` (`tap_names`)
    are returned as `features`, those of `attention_0`, ... as `attention`. A student also returns
    its router loss, see `router_weight`. Raises ModelError if the model lacks a tap.
    """
    input_ids, position_ids = batch.input_ids, batch.position_ids
    is_flash = "flash" in str(model.config._attn_implementation)
    if is_flash and not mixes_documents(model.config):
        # Flash attention separates documents by position only in a single flat window.
        input_ids, position_ids = input_ids.view(1, -1), position_ids.view(1, -1)
    outputs: dict[str, Tensor] = {}
    layers = {tap: tap.replace(ATTENTION, "layer_") for tap in taps if tap.startswith(ATTENTION)}
    taps = [tap for tap in taps if tap not in layers]

    def keep(tap: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        # Only a reference: an operation here would run inside gradient checkpointing.
        outputs[tap] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for tap, module in _select_modules(model, taps).items():
            hooks.enter_context(module.register_forward_hook(partial(keep, tap)))
        blocks = _select_modules(model, [*layers.values()])
        attention = hooks.enter_context(recorded_attention(model, blocks))
        # No attention mask: documents are separated by `position_ids`, which `probe` checks.
        body = body_of(model)
        inputs = inputs_of(body, input_ids=input_ids, position_ids=position_ids)
        output = body(**inputs, use_cache=False)
    hidden_ND = _gather(output.last_hidden_state, rows)
    router_loss = None
    if is_student and router_weight(model) > 0:
        router_loss = _router_loss(model, output.router_logits, batch)
    features = {
        tap: hidden_ND if tap == "final_postnorm" else _gather(outputs[tap], rows) for tap in taps
    }
    return HiddenRows(
        hidden=hidden_ND,
        head=model_head(model, vocab_size),
        features=features,
        router_loss=router_loss,
        attention={tap: to_states(attention[layer], batch) for tap, layer in layers.items()},
    )


def router_weight(model: PreTrainedModel) -> float:
    """Return the factor of the load-balancing loss that a mixture of experts asks for, else 0.

    As in transformers, it asks by `output_router_logits`. Raises ModelError for a family whose
    loss cannot be computed from its router logits.
    """
    config = model.config.get_text_config()
    sources = (model, config, model.config)
    weights = [getattr(x, name, None) for name in ROUTER_WEIGHTS for x in sources]
    weight = next((float(w) for w in weights if isinstance(w, int | float)), 0.0)
    if weight == 0 or not getattr(config, "output_router_logits", False):
        return 0.0
    _router_function(model)
    return weight


def _router_function(model: PreTrainedModel) -> tuple[Any, int, int]:
    """Return the loss function of the model's module, its number of experts and its top k."""
    function = getattr(inspect.getmodule(type(model)), "load_balancing_loss_func", None)
    names = list(inspect.signature(function).parameters) if function else []
    config = model.config.get_text_config()
    num_experts, top_k = (
        getattr(model, name, getattr(config, name, None))
        for name in ("num_experts", "num_experts_per_tok")
    )
    if names != ROUTER_ARGUMENTS or num_experts is None or top_k is None:
        raise ModelError(
            f"{model.config.model_type}: asks for a load-balancing loss of an unsupported kind; "
            "must be that of Mixtral; set output_router_logits to False to train without it"
        )
    return function, int(num_experts), int(top_k)


def _router_loss(model: PreTrainedModel, router_logits: Any, batch: Batch) -> Tensor:
    """Load-balancing loss of the model over the tokens of documents, a scalar."""
    function, num_experts, top_k = _router_function(model)
    return function(router_logits, num_experts, top_k, (batch.sample_ids >= 0).long())


def tap_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the hidden states that `forward_rows` can return, in forward order.

    `embed` is the output of the input embedding, `layer_i` that of block i, `final_prenorm` that of
    the last block (the same tensor as the last `layer_i`), `final_postnorm` the input of the head.
    """
    # `hidden_states[-1]` is before or after the final norm depending on the model
    # (huggingface/transformers#26142), so taps are named explicitly.
    return [*_tapped_modules(model), "final_postnorm"]


def tap_width(model: PreTrainedModel, tap: str) -> int:
    """Return the width D of a hidden state. Raises ModelError if the model has no such tap."""
    _select_modules(model, [tap])
    if tap == "embed":
        return input_layer(model).weight.shape[1]
    if tap == "final_postnorm":
        return head_layer(model).weight.shape[1]
    return int(model.config.get_text_config().hidden_size)


def takes_positions(module: nn.Module) -> bool:
    return "position_ids" in inspect.signature(module.forward).parameters


def inputs_of(module: nn.Module, **inputs: Tensor) -> dict[str, Tensor]:
    """Return the inputs without positions, if a module counts them from the start of a window."""
    if not takes_positions(module):
        del inputs["position_ids"]
    return inputs


def _select_modules(model: PreTrainedModel, taps: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules behind taps. `final_postnorm` has none."""
    if not taps:
        return {}
    modules = _tapped_modules(model)
    names = [*modules, "final_postnorm"]
    for tap in taps:
        if tap not in names:
            raise ModelError(
                f"{model.config.model_type}: no hidden state `{tap}`{nearest(tap, names)}"
            )
    return {tap: modules[tap] for tap in taps if tap in modules}


def _gather(hidden_BTD: Tensor, rows: Rows) -> Tensor:
    return hidden_BTD.flatten(0, 1).index_select(0, rows.index)


def body_of(model: PreTrainedModel) -> nn.Module:
    body = model.base_model
    if body is model:
        raise ModelError(
            f"{model.config.model_type}: has no body separate from its head; must be a causal "
            f"language model"
        )
    return body


def block_list(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks of a model, one per layer. Raises ModelError if they are not found."""
    # The blocks are the outermost `ModuleList` whose length is the config's number of layers.
    count = int(model.config.get_text_config().num_hidden_layers)
    lists = [
        (name.count("."), module)
        for name, module in body_of(model).named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ModelError(
            f"{model.config.model_type}: no list of {count} blocks was found, so its layers "
            "cannot be tapped or cut out; remove the terms on its layers, or start from another "
            "student"
        )
    return min(lists, key=lambda item: item[0])[1]


def _tapped_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the module behind each tap but `final_postnorm`, in forward order."""
    blocks = block_list(model)
    layers = {f"layer_{number}": block for number, block in enumerate(blocks)}
    return {"embed": input_layer(model), **layers, "final_prenorm": blocks[-1]}


def _head_scale(config: PretrainedConfig) -> float:
    """Return the factor of the logits: Cohere and Falcon-H1 multiply, Granite divides."""
    scale = 1.0
    for name in FACTORS:
        factor = getattr(config, name, None)
        # MPT's config has `logit_scale`, but its model ignores it.
        if isinstance(factor, (int, float)) and config.model_type != "mpt":
            scale *= float(factor)
    mup = getattr(config, "logits_mup_width_multiplier", None)  # Inkling
    if isinstance(mup, (int, float)):
        scale /= float(mup)
    divisor = getattr(config, "logits_scaling", None)
    if isinstance(divisor, (int, float)):
        # HyperCLOVA X multiplies by the key that Granite divides by.
        scale *= divisor if config.model_type == "hyperclovax" else 1.0 / divisor
    return scale


def forward_bytes(model: PreTrainedModel) -> int:
    """Estimate bytes per token of a forward pass: 8 tensors of its width, 4 of its widest layer."""
    head = head_layer(model)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    width, itemsize = head.weight.shape[1], head.weight.element_size()
    widest = max((max(m.in_features, m.out_features) for m in layers), default=4 * width)
    return itemsize * (8 * width + 4 * widest)
