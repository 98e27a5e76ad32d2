"""Parameters that FSDP2 shards over processes: whole tensors for files, and shards of whole ones.

A checkpoint holds whole tensors, so it does not depend on the number of processes that wrote it,
nor on whether they sharded the student. All functions that gather are collectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP2 has sharded a module."""
    return isinstance(module, FSDPModule)


def whole(tensors: Mapping[str, Any], *, keep: bool = True) -> dict[str, Any]:
    """Return tensors with all their shards, gathered one at a time, in the memory of the CPU.

    Values that are not sharded stay as they are. A process that does not `keep` the tensors takes
    part in the gathers, and gets empty ones.
    """
    gathered = {}
    for name, value in tensors.items():
        if isinstance(value, DTensor):
            tensor = cast(DTensor, value.detach()).full_tensor()
            gathered[name] = tensor.cpu() if keep else tensor.new_empty(0)
        else:
            gathered[name] = value
    return gathered


def shards_of(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the shards that this rank has of whole tensors, laid out as `like`, of the same names.

    Every rank reads the whole tensors, so nothing is sent.
    """
    return {name: shard_of(tensor, like.get(name)) for name, tensor in tensors.items()}


def shard_of(tensor: Tensor, like: Tensor | None) -> Tensor:
    """Return a whole tensor laid out as a sharded one of its shape, else the tensor."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None)


@contextmanager
def gathered_root(module: nn.Module) -> Iterator[None]:
    """Gather the parameters outside of the blocks, as the `forward` of a sharded module does.

    Blocks gather their own when they are called. A no-op for a module that is not sharded.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def is_true_anywhere(flag: Tensor, module: nn.Module) -> bool:
    """Return whether a flag is true in any process of a sharded module, else in this one."""
    if is_sharded(module):
        flag = flag.to(torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
