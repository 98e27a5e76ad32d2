"""Memory of a forward and a backward pass, counted on tensors without values.

The body of a model runs on fake tensors, of which every storage is counted while it lives. Layers
are alike, so two bodies of one and of two layers give those of any depth.

Shapes: B windows of T tokens.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from collegium.models import loading
from collegium.models.cut import Cut
from collegium.models.forward import body_of, takes_positions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Pass:
    """Bytes of the tensors that a pass creates, besides parameters and their gradients."""

    saved: int
    """Held for the backward pass at the end of the forward pass."""
    peak: int
    """Alive at once at most."""


class _LiveBytes(TorchDispatchMode):
    """Counts the storages of all tensors that operations return, until they are freed."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Leave out the storages of a model, of which operations return views."""
        super().__init__()
        self.live = self.peak = 0
        owned = (*model.parameters(), *model.buffers())
        self._seen = {tensor.untyped_storage()._cdata for tensor in owned}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def count_pass(
    config: PretrainedConfig,
    shape: tuple[int, int],
    *,
    dtype: str,
    device: torch.device,
    attention: str = "auto",
    is_checkpointed: bool = False,
    autocast: bool = False,
    is_trained: bool = True,
) -> Pass | None:
    """Count a pass of (B, T) tokens through the body of a model, None if it cannot be run so.

    `is_trained` includes the backward pass, of recomputed layers if `is_checkpointed`. `autocast`
    runs the layers in bfloat16. Adapters are not counted: they save the inputs of the layers that
    they adapt, which full training saves as well.
    """
    # Without a graph, each layer frees what the one before it needed.
    depth = int(config.get_text_config().num_hidden_layers) if is_trained else 1
    counts: list[Pass] = []
    for layers in range(1, min(depth, 2) + 1):
        part = Cut(list(range(layers)), None).config(config)
        try:
            with FakeTensorMode(), torch.device(device):
                model = loading.build_model(part, seed=0, attention=attention, dtype=dtype)
                model.train(is_trained)
                if is_checkpointed:
                    loading.enable_checkpointing(model)
                with torch.set_grad_enabled(is_trained):
                    context = torch.autocast(device.type, torch.bfloat16, enabled=autocast)
                    counts.append(_run(model, shape, context, is_trained))
        # Types with operations that depend on values, or that fake tensors lack, raise any error.
        except Exception:
            return None
    if depth < 2:
        return counts[0]
    one, two = counts
    more = depth - 2
    return Pass(two.saved + more * (two.saved - one.saved), two.peak + more * (two.peak - one.peak))


def _run(
    model: PreTrainedModel,
    shape: tuple[int, int],
    context: contextlib.AbstractContextManager[Any],
    is_trained: bool,
) -> Pass:
    body, length = body_of(model), shape[1]
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.long)}
    if takes_positions(body):
        inputs["position_ids"] = torch.arange(length).expand(shape).contiguous()
    with _LiveBytes(model) as live:
        with context:
            hidden_BTD = body(**inputs, use_cache=False).last_hidden_state
        saved = live.live
        if is_trained:
            gradients = _hooked_gradients(model)
            with gradients:
                hidden_BTD.sum().backward()
    return Pass(saved, live.peak)


@contextlib.contextmanager
def _hooked_gradients(model: PreTrainedModel) -> Iterator[None]:
    """Drop each gradient once it is finished: parameters are counted elsewhere."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(drop) for parameter in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
