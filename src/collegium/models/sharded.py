"""Layers of a frozen model shared between the processes of a training (FSDP2)."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from collegium.models.forward import block_list, body_of
from collegium.options import torch


def num_processes() -> int:
    """Return the number of processes that communicate, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shard_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Keep a share of each layer in each process, on `device`. A collective.

    Each layer is gathered before it runs, and freed after it. Embeddings, the last norm and the
    head stay whole, since losses read rows of the head after the forward pass. Layers move to the
    device one at a time, so a model on the CPU never is there as a whole.
    """
    mesh = init_device_mesh(device.type, (num_processes(),))
    body, blocks = body_of(model), block_list(model)
    shared = {id(p) for block in blocks for p in block.parameters()}
    whole = {p for p in model.parameters() if id(p) not in shared}
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The common root of all layers: the next one is gathered while one computes.
    fully_shard(body, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.to(device)  # type: ignore[arg-type]
