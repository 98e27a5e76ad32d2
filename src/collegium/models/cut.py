"""Smaller models cut out of a larger one: some of its layers, heads, FFN units and channels.

Shapes: L layers, D channels (the hidden size), F units of an FFN, G groups of heads that share
keys and values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from collegium.errors import ModelError
from collegium.models import loading
from collegium.models.forward import block_list
from collegium.models.probe import is_close
from collegium.options import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

PER_LAYER = (
    *("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type", "no_rope_layers"),
    *("layer_rope_theta", "num_attention_heads_per_layer", "activation_sparsity_pattern"),
)
"""Keys of a config with one value per layer."""
WIDTH_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose width can be cut: their layers hold the modules of `AXES` and no other."""
AXES: Mapping[str, tuple[str | None, ...]] = {
    **dict.fromkeys(["embed_tokens", "lm_head"], (None, "channels")),
    **dict.fromkeys(["norm", "input_layernorm", "post_attention_layernorm"], ("channels",)),
    "q_proj": ("heads", "channels"),
    **dict.fromkeys(["k_proj", "v_proj"], ("groups", "channels")),
    "o_proj": ("channels", "heads"),
    **dict.fromkeys(["gate_proj", "up_proj"], ("units", "channels")),
    "down_proj": ("channels", "units"),
    **dict.fromkeys(["q_norm", "k_norm"], (None,)),
}
"""Module of a model in `WIDTH_TYPES` -> the axes of its weight. A bias has the first one."""
INDEXED_TYPES = frozenset(["beam", "diffllama", "minicpm3", "nemotron_h", "zamba2", "zaya"])
"""Model types whose layers compute something else as another layer of the same shapes, or need
others. tests/models/test_cut.py compares them with all types."""
CHECKED_TOKENS = 16


@dataclass(frozen=True)
class Width:
    """The kept parts of each kept layer, as ascending indices of the larger model."""

    channels: Tensor
    """(D',)."""
    units: Sequence[Tensor]
    """(F',) per kept layer."""
    groups: Sequence[Tensor]
    """(G',) per kept layer."""
    heads_per_group: int
    head_dim: int

    def index(self, axis: str, layer: int) -> Tensor:
        """Return the rows or columns that an axis keeps in a kept layer."""
        if axis == "channels":
            return self.channels
        if axis == "units":
            return self.units[layer]
        size = self.head_dim * (self.heads_per_group if axis == "heads" else 1)
        return (self.groups[layer][:, None] * size + torch.arange(size)).flatten()


@dataclass(frozen=True)
class Cut:
    """The parts of a larger model that a smaller one keeps."""

    layers: Sequence[int]
    """Ascending numbers of the kept layers."""
    width: Width | None = None
    """None keeps all of each layer."""

    def config(self, config: PretrainedConfig) -> PretrainedConfig:
        """Return the config of the smaller model."""
        config = copy.deepcopy(config)
        part = config.get_text_config()
        for key in PER_LAYER:
            # Some types derive a list from other keys: it has no setter.
            values = vars(part).get(key)
            if isinstance(values, list | tuple) and len(values) == part.num_hidden_layers:
                setattr(part, key, [values[layer] for layer in self.layers])
        part.num_hidden_layers = len(self.layers)
        if self.width is not None:
            # Set in any case: by default it follows from the hidden size and the heads.
            part.head_dim = self.width.head_dim
            part.hidden_size = len(self.width.channels)
            part.intermediate_size = len(self.width.units[0])
            part.num_key_value_heads = len(self.width.groups[0])
            part.num_attention_heads = self.width.heads_per_group * len(self.width.groups[0])
        return config

    def state(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the tensors of the smaller model by name, cut out of those of the larger one."""
        prefix = f"{_block_prefix(model)}."
        place = {layer: number for number, layer in enumerate(self.layers)}
        state: dict[str, Tensor] = {}
        for name, tensor in model.state_dict().items():
            number = 0
            if name.startswith(prefix):
                layer, rest = name.removeprefix(prefix).split(".", 1)
                if int(layer) not in place:
                    continue
                number = place[int(layer)]
                name = f"{prefix}{number}.{rest}"
            state[name] = tensor if self.width is None else _narrowed(tensor, name, number, self)
        return state


def _narrowed(tensor: Tensor, name: str, layer: int, cut: Cut) -> Tensor:
    assert cut.width is not None
    axes = AXES[name.split(".")[-2]]
    for dim, axis in enumerate(axes[: tensor.dim()]):
        if axis is not None:
            tensor = tensor.index_select(dim, cut.width.index(axis, layer).to(tensor.device))
    return tensor


def _block_prefix(model: PreTrainedModel) -> str:
    blocks = block_list(model)
    return next(name for name, module in model.named_modules() if module is blocks)


def check_cut(config: PretrainedConfig, cut: Cut, *, where: str) -> PreTrainedModel:
    """Return the smaller model without values, from the config of the larger one.

    Raises ModelError if a model of this type cannot be cut so.
    """
    part = config.get_text_config()
    is_scaled = getattr(part, "scale_attn_by_inverse_layer_idx", False)  # GPT-2
    if part.model_type in INDEXED_TYPES or (is_scaled and cut.layers[-1] >= len(cut.layers)):
        raise _type_error(config, where)
    larger = loading.empty_model(config, where)
    smaller = loading.empty_model(cut.config(config), where)
    try:
        expected = cut.state(larger)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    if _shapes(expected) != _shapes(smaller.state_dict()):
        raise _type_error(config, where)
    return smaller


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _type_error(config: PretrainedConfig, where: str) -> ModelError:
    return ModelError(
        f"{where}: {config.model_type} has layers that depend on their number or on other layers; "
        "must be a family whose layers can be cut out one by one; keep other layers, or start from "
        "a whole model with `model`"
    )


def cut_model(larger: PreTrainedModel, cut: Cut, *, where: str) -> PreTrainedModel:
    """Copy the kept parts of a loaded model into a new one, in its data type and on its device.

    Raises ModelError if the result does not compute what the kept layers compute.
    """
    state, dtype = cut.state(larger), larger.dtype
    kernel = str(larger.config._attn_implementation)
    smaller = loading.build_model(cut.config(larger.config), seed=0, attention=kernel)
    if _shapes(state) != _shapes(smaller.state_dict()):
        raise _type_error(larger.config, where)
    smaller.load_state_dict(state)
    if dtype != torch.float32:
        smaller = loading.cast_model(smaller, dtype)
    torch.nn.Module.to(smaller, larger.device)
    smaller.generation_config = copy.deepcopy(larger.generation_config)
    if cut.width is None:
        _check_outputs(larger.eval(), smaller.eval(), cut, where)
    return smaller


def _check_outputs(larger: PreTrainedModel, smaller: PreTrainedModel, cut: Cut, where: str) -> None:
    """Compare logits with those of the larger model without the layers that are left out."""
    # Some types compute other things in layers of the same shapes, by the number of the layer.
    ids_BT = torch.arange(CHECKED_TOKENS, device=larger.device)[None]
    with torch.no_grad():
        with _skipped(larger, cut.layers):
            expected = larger(input_ids=ids_BT, use_cache=False).logits
        actual = smaller(input_ids=ids_BT, use_cache=False).logits
    if not is_close(actual, expected, larger.dtype, factor=8):
        raise _type_error(larger.config, where)


@contextmanager
def _skipped(model: PreTrainedModel, kept: Sequence[int]) -> Iterator[None]:
    """Make every layer but the kept ones return its input during the block."""

    def skip(_block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple | list) else hidden

    with ExitStack() as hooks:
        for number, block in enumerate(block_list(model)):
            if number not in kept:
                hooks.enter_context(block.register_forward_hook(skip, with_kwargs=True))
        yield
