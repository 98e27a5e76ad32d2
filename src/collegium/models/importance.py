"""Importance of layers, channels, FFN units and heads of a model, measured on text.

Shapes: N rows, L layers, D channels, F units of an FFN, G groups of heads that share keys and
values.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from collegium.models.forward import block_list, forward_rows
from collegium.options import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from collegium.types import Batch, Rows


@dataclass(frozen=True)
class Importance:
    """Sums over rows in float64. They are compared within a layer, or between layers."""

    layers: Tensor
    """(L,) sum_n (1 - cos(x_n, y_n)) of the input and output of a layer.

    Source: ShortGPT, arXiv 2403.03853, block influence.
    """
    channels: Tensor | None = None
    """(D,) sum_n |x_n| over the outputs x of all norms. None unless the width was measured.

    Source of the importances of the width: Minitron, arXiv 2407.14679, section 2.2.
    """
    units: Tensor | None = None
    """(L, F) sum_n |a_n| over the inputs a of the last linear map of the FFN."""
    groups: Tensor | None = None
    """(L, G) sum_n ||h_n|| over the outputs h of the heads of a group."""


def largest(importance: Tensor, count: int) -> Tensor:
    """Return the ascending indices of the largest values, the first ones among equals."""
    return importance.argsort(descending=True, stable=True)[:count].sort().values


def measure(model: PreTrainedModel, batches: Iterable[Batch], *, width: bool) -> Importance:
    """Measure importances at the trained rows of batches.

    `width` needs a model of `cut.WIDTH_TYPES`, whose modules have the same names.
    """
    meter = _Meter(model.config)
    with ExitStack() as hooks:
        for hook in meter.hooks(model, width=width):
            hooks.enter_context(hook)
        with torch.no_grad():
            for batch in batches:
                batch = batch.to(model.device)
                meter.rows = batch.rows()
                forward_rows(model.eval(), batch, meter.rows, vocab_size=1)
    names = ("layers", "units", "groups") if width else ("layers",)
    layers = range(len(block_list(model)))
    sums = {name: torch.stack([meter.sums[name, layer] for layer in layers]) for name in names}
    return Importance(channels=meter.sums["channels", 0] if width else None, **sums)


class _Meter:
    """Sums of activations by (name, layer), collected by hooks."""

    def __init__(self, config: Any) -> None:
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.rows: Rows | None = None
        self._config = config

    def hooks(self, model: PreTrainedModel, *, width: bool) -> Iterable[Any]:
        for layer, block in enumerate(block_list(model)):
            influence = partial(self._influence, layer)
            yield block.register_forward_hook(influence, with_kwargs=True)
            if width:
                yield from self._width_hooks(layer, block)
        if width:
            body: Any = model.base_model
            yield body.norm.register_forward_hook(self._norm)

    def _width_hooks(self, layer: int, block: Any) -> Iterable[Any]:
        yield block.mlp.down_proj.register_forward_pre_hook(partial(self._units, layer))
        yield block.self_attn.o_proj.register_forward_pre_hook(partial(self._groups, layer))
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            yield norm.register_forward_hook(self._norm)

    def _influence(
        self, layer: int, _block: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        x_ND = self._at_rows(args[0] if args else kwargs["hidden_states"])
        y_ND = self._at_rows(output[0] if isinstance(output, tuple | list) else output)
        self._add("layers", layer, (1 - torch.cosine_similarity(x_ND, y_ND, dim=-1)).sum())

    def _norm(self, _norm: nn.Module, _args: Any, output: Tensor) -> None:
        self._add("channels", 0, self._at_rows(output).abs().sum(0))

    def _units(self, layer: int, _linear: nn.Module, args: Any) -> None:
        self._add("units", layer, self._at_rows(args[0]).abs().sum(0))

    def _groups(self, layer: int, _linear: nn.Module, args: Any) -> None:
        heads, groups = self._config.num_attention_heads, self._config.num_key_value_heads
        norm_NH = self._at_rows(args[0]).unflatten(1, (heads, -1)).norm(dim=-1)
        self._add("groups", layer, norm_NH.unflatten(1, (groups, -1)).sum((0, 2)))

    def _at_rows(self, hidden_BTD: Tensor) -> Tensor:
        assert self.rows is not None
        return hidden_BTD.flatten(0, 1)[self.rows.index].double()

    def _add(self, name: str, layer: int, value: Tensor) -> None:
        self.sums[name, layer] = self.sums.get((name, layer), 0.0) + value.cpu()
