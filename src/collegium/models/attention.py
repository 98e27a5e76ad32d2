"""Queries, keys and values of the attention layers of a Hugging Face model.

Shapes: B batch, T time, M = B T positions, H heads of queries, J heads of keys and values, d width
of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from collegium.errors import ModelError
from collegium.options import torch
from collegium.types import AttentionStates, Batch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

ATTENTION = "attention_"
"""Start of the taps of attention: `attention_0` is that of the block `layer_0`."""

Call = tuple["Tensor", "Tensor", "Tensor", dict[str, Any]]
"""Query (B, H, T, d), key and value (B, J, T, d), and further arguments of an attention layer."""


@contextmanager
def recorded_attention(
    model: PreTrainedModel, blocks: Mapping[str, nn.Module]
) -> Iterator[dict[str, Call]]:
    """Record the arguments of the attention in `blocks`, by name, during the block.

    Any kernel computes the attention as before. Raises ModelError, at the end, for a block whose
    attention was not called.
    """
    # The one function through which models of transformers 5 call any kernel, after rotary
    # embedding and normalization of each family. Hooks on projections would need a table of names.
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls: dict[str, Call] = {}
    if not blocks:
        yield calls
        return
    owners = {id(module): name for name, block in blocks.items() for module in block.modules()}
    local, kernel = ALL_ATTENTION_FUNCTIONS._local_mapping, model.config._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS.get(kernel)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any):
        if id(module) in owners:
            # Only references: an operation here would run inside gradient checkpointing.
            calls[owners[id(module)]] = query, key, value, kw
        forward: Any = original
        if original is None:  # `eager` is a function of each family
            forward = vars(inspect.getmodule(type(module)))["eager_attention_forward"]
        return forward(module, query, key, value, *args, **kw)

    before = local.get(kernel)
    local[kernel] = attend
    try:
        yield calls
    finally:
        if before is None:
            del local[kernel]
        else:
            local[kernel] = before
    if missing := [name for name in blocks if name not in calls]:
        raise ModelError(
            f"{model.config.model_type}: the attention of {missing[0]} cannot be read; must be an "
            "attention layer of transformers; remove the attention and relation terms"
        )


def to_states(call: Call, batch: Batch) -> AttentionStates:
    """Flatten the recorded arguments to positions of the batch.

    Raises:
        ModelError: the layer attends to a window that is shorter than the batch.
    """
    query, key, value, options = call
    length, window = batch.input_ids.shape[1], options.get("sliding_window")
    if window is not None and window < length:
        raise ModelError(
            f"attention: got a sliding window of {window} tokens for windows of {length}; must see "
            "the whole document; lower data.max_length, or use other layers"
        )
    place_BT = torch.arange(batch.input_ids.numel(), device=query.device).view_as(batch.input_ids)
    is_start_BT = batch.position_ids == 0
    is_start_BT[:, 0] = True
    starts_M = torch.where(is_start_BT, place_BT, 0).flatten().cummax(0).values
    # One flat window under flash attention is flattened like the others.
    query_MHd, key_MJd, value_MJd = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    scale = options.get("scaling")
    return AttentionStates(
        query=query_MHd,
        key=key_MJd,
        value=value_MJd,
        starts=starts_M,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=options.get("softcap"),
    )
