"""One of two processes: each reads half of a batch and compares with a single process.

Run by tests/train/test_distributed.py.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist

from collegium.fusion.fuse import Fusion
from collegium.losses.features import FeatureLoss
from collegium.losses.pairing import FeatureOptions
from collegium.teachers.local import LocalTeacher
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import DistillStep
from collegium.types import Batch
from tiny import tiny_model

V, LENGTH = 60, 12
TIED = {"tie_word_embeddings": True}


def make_step() -> DistillStep:
    teachers = [LocalTeacher(f"t{k}", tiny_model(V, seed=k), vocab_size=V) for k in range(2)]
    features = FeatureLoss(
        FeatureOptions(dynamic_scale=False), {"layer_1": 32}, {"t0": {"layer_1": 32}}
    )
    objective = Objective(ObjectiveOptions(kd_ratio=0.6, block_size=5), Fusion(), features=features)
    student = tiny_model(V + 4, seed=9, **TIED)
    return DistillStep(student, objective, vocab_size=V, teachers=teachers)


def make_inputs() -> dict[str, torch.Tensor]:
    """Make four windows, the last one untrained, so that the second rank has fewer rows."""
    ids = torch.randint(V, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[2:, 5:] = -100
    labels[3] = -100
    return {
        "input_ids": ids,
        "position_ids": torch.arange(LENGTH).expand_as(ids).contiguous(),
        "labels": labels,
        "sample_ids": torch.arange(4)[:, None].expand_as(ids).contiguous(),
    }


def half(inputs: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    return {name: value[2 * rank : 2 * rank + 2] for name, value in inputs.items()}


def wrapped(name: str, step: DistillStep) -> Any:
    if name == "ddp":
        return torch.nn.parallel.DistributedDataParallel(step)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in step.student.base_model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(step, mesh=mesh)


def main() -> None:
    name, meeting = sys.argv[1:]
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    inputs, single = make_inputs(), make_step()
    num_rows = len(Batch.from_inputs(inputs).rows())
    expected = single(inputs)[0] / num_rows
    expected.backward()
    module = wrapped(name, make_step())
    for accumulated in (1, 2):  # the second micro-batch adds to the gradients
        loss = module(half(inputs, rank))[0] / num_rows
        (2 * loss).backward()
        loss = loss.detach()
        dist.all_reduce(loss)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
        for (path, reference), (_, sharded) in zip(
            single.named_parameters(), module.named_parameters(), strict=True
        ):
            assert reference.grad is not None, path
            assert sharded.grad is not None, path
            grad = sharded.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            torch.testing.assert_close(
                grad,
                accumulated * reference.grad,
                rtol=1e-4,
                atol=1e-6,
                msg=lambda m, p=path: f"{p}: {m}",
            )
    print("same as one process", flush=True)
    dist.barrier()
    # Skips interpreter shutdown, where the process group can deadlock with its own thread.
    os._exit(0)


if __name__ == "__main__":
    main()
