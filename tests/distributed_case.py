"""One of several processes: a wrapped step against a single process, or a run of the trainer.

Run by tests/train/test_distributed.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from collegium.cache.build import build_cache
from collegium.cache.encode import FusedEncoder
from collegium.cache.sources import LocalShards
from collegium.cache.store import open_cache
from collegium.data.collate import Collator
from collegium.data.encode import Encoded
from collegium.data.windows import PackedDataset
from collegium.errors import TrainingError
from collegium.fusion.fitted import Route
from collegium.fusion.fuse import Fusion
from collegium.losses.features import FeatureLoss
from collegium.losses.pairing import AttentionOptions, FeatureOptions, RelationOptions
from collegium.losses.row_terms import CrossEntropyTerm, DivergenceTerm
from collegium.losses.schedule import ScheduleStage, Stages
from collegium.models.forward import tap_names, tap_width
from collegium.models.sharded import num_processes
from collegium.storage.records import read_log
from collegium.teachers.cached import CachedTargets
from collegium.teachers.local import LocalTeacher
from collegium.train.nan_diagnosis import NanGuard
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.progress import TrainingProgress
from collegium.train.sharded import gathered_root, whole
from collegium.train.step import DistillStep
from tiny import tiny_model
from training_runs import VOCAB, small_model, trainer

V, LENGTH = 60, 12
TIED = {"tie_word_embeddings": True}
SOURCES = ("live", "features", "cache", "stages", "route")
SHARDED_TEACHERS = "-sharded-teachers"
"""Suffix of a source whose teachers are sharded."""
WINDOWS_PER_STEP = 4
SHARDED = "sharded-"
"""Prefix of a source whose student FSDP2 shards."""


def make_step(teachers: list[LocalTeacher]) -> DistillStep:
    features = FeatureLoss(
        FeatureOptions(dynamic_scale=False), {"layer_1": 32}, {"t0": {"layer_1": 32}}
    )
    objective = Objective(ObjectiveOptions(kd_ratio=0.6, block_size=5), Fusion(), states=[features])
    student = tiny_model(V + 4, seed=9, **TIED)
    return DistillStep(student, objective, vocab_size=V, teachers=teachers)


def make_inputs() -> dict[str, torch.Tensor]:
    """Make four windows, the last one untrained, so that the second rank has fewer rows."""
    ids = torch.randint(V, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[2:, 5:] = -100
    labels[3] = -100
    return {"input_ids": ids, "labels": labels}


def wrapped(name: str, step: DistillStep) -> Any:
    if name == "ddp":
        return torch.nn.parallel.DistributedDataParallel(step)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in step.student.base_model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(step, mesh=mesh)


def compare_step(name: str, folder: Path) -> None:
    """Loss and gradients of a wrapped step, each rank with half of a batch."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/met", rank=rank, world_size=2)
    teachers = [LocalTeacher(f"t{k}", tiny_model(V, seed=k), vocab_size=V) for k in range(2)]
    inputs, single = make_inputs(), make_step(teachers)
    total, loss = single(inputs)
    num_rows = loss.num_rows
    expected = total / num_rows
    expected.backward()
    module = wrapped(name, make_step(teachers))
    half = {key: value[2 * rank : 2 * rank + 2] for key, value in inputs.items()}
    for accumulated in (1, 2):  # the second micro-batch adds to the gradients
        mean = module(half)[0] / num_rows
        (2 * mean).backward()
        mean = mean.detach()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean, expected.detach(), rtol=1e-5, atol=1e-6)
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
    step = getattr(module, "module", module)
    with torch.no_grad(), gathered_root(step):
        logits = step.student(input_ids=half["input_ids"]).logits
        torch.testing.assert_close(logits, single.student(input_ids=half["input_ids"]).logits)
    guard = NanGuard(step)
    guard.add(half, torch.tensor(float("nan") if rank == 1 else 1.0))
    try:
        guard.check(1)
    except TrainingError:
        return
    assert rank == 0, "a loss that is not finite must be refused"
    assert name == "ddp", "all ranks must end together, or one would wait for the others"


def make_windows() -> PackedDataset:
    """Eleven windows of one document each; every fourth one has no trained token."""
    generator = np.random.default_rng(0)
    documents, domains = [], []
    for number, length in enumerate(generator.integers(4, 13, 11)):
        is_target = (np.arange(length) > 0) & (number % 4 > 0)
        ids = generator.integers(2, VOCAB, length)
        documents.append(Encoded(ids, is_target, np.ones(length, np.int64), False))
        domains.append(("law", "news", "code")[number % 3])
    return PackedDataset(documents, max_length=12, packing=False, domains=domains)


def make_teachers(*, shard: bool = False) -> list[LocalTeacher]:
    models = [small_model(1).double(), small_model(2, width=16).double()]
    return [
        LocalTeacher(f"t{k}", model, vocab_size=VOCAB, shard=shard)
        for k, model in enumerate(models)
    ]


def check_shares(teachers: Sequence[LocalTeacher]) -> None:
    """Check that this process holds its share of the layers, and whole heads."""
    for teacher in teachers:
        layers = teacher.model.base_model.layers
        for parameter in layers.parameters():
            assert isinstance(parameter, DTensor)
            share = parameter.to_local().numel() * dist.get_world_size()
            assert share <= parameter.numel() + dist.get_world_size() * parameter[0].numel()
        assert not isinstance(teacher.model.lm_head.weight, DTensor)


def staged() -> Objective:
    """Attention and features of teachers, then distillation, with gradient checkpointing."""
    first, second = (
        Stages(stages=[ScheduleStage(factor=a, until=3), ScheduleStage(factor=1 - a)])
        for a in (1, 0)
    )
    terms = [
        FeatureOptions(teachers=["t0"], schedule=first),
        AttentionOptions(loss="kl", schedule=first),
        RelationOptions(),
        DivergenceTerm(weight=0.6, schedule=second),
        CrossEntropyTerm(weight=0.4, schedule=second),
    ]
    return Objective(ObjectiveOptions(terms=terms), Fusion())


def build_fused_cache(folder: Path) -> None:
    """The fused target of both teachers at all windows, as the top 8 with their tail."""
    encoder = FusedEncoder(
        dataset=make_windows(), batch_size=8, seed=0, teachers=make_teachers, fusion=Fusion()
    )
    identity = {"kind": "fused", "targets": {"name": "top_k", "k": 8}, "vocab_size": VOCAB}
    build_cache(folder, identity, LocalShards(encoder))


class Gradients(TrainerCallback):
    """Records all gradients of each optimizer step."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.made: Any = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        for name, parameter in self.made.step.named_parameters():
            if parameter.grad is not None:  # a stage may leave some out
                key = f"gradient {state.global_step}/{name}"
                self.tensors |= whole({key: parameter.grad.clone()})


LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
"""Variables that `accelerate launch --use_fsdp --fsdp_version 2` sets."""


def allow_sharding_on_cpu() -> None:
    """Let Accelerate, which has FSDP for accelerators only, shard over gloo as well."""
    os.environ.update(LAUNCHED)
    create = Trainer.create_accelerator_and_postprocess

    def created(made: Trainer) -> None:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(made)

    Trainer.create_accelerator_and_postprocess = created  # type: ignore[method-assign]


def train(
    source: str, folder: Path, cache: Path, *, batch_size: int = 1, accumulated: int = 1
) -> dict[str, torch.Tensor]:
    """Train two epochs of three steps in float64; return gradients, weights and scales.

    Goes on where the folder has checkpoints, which are saved every two steps.
    """
    is_sharded = source.startswith(SHARDED)
    source = source.removeprefix(SHARDED)
    if is_sharded:
        allow_sharding_on_cpu()
    shard, source = source.endswith(SHARDED_TEACHERS), source.removesuffix(SHARDED_TEACHERS)
    teachers = [] if source == "cache" else make_teachers(shard=shard)
    student, kept = small_model().double(), Gradients()
    objective, targets = Objective(ObjectiveOptions(kd_ratio=0.6), Fusion()), None
    if source == "features":
        options = FeatureOptions(weight=0.5)
        widths = [{tap: tap_width(m, tap) for tap in tap_names(m)} for m in (student, student)]
        features = FeatureLoss(options, widths[0], {"t0": widths[1]}, seed=0).double()
        objective = Objective(ObjectiveOptions(features=options), Fusion(), states=[features])
    elif source == "stages":
        objective = staged()
    elif source == "route":
        weighting = Route(default="t0", domains={"law": "t1", "code": "t0"})
        objective = Objective(ObjectiveOptions(kd_ratio=0.6), Fusion(weighting=weighting))
    elif source == "cache":
        targets = CachedTargets(open_cache(cache), make_windows().sample_names)
    made = trainer(
        folder,
        model=student,
        teachers=teachers,
        objective=objective,
        targets=targets,
        train_dataset=make_windows(),
        eval_dataset=make_windows(),
        data_collator=Collator(),
        callbacks=[kept, TrainingProgress(quiet=True)],
        options={
            "max_steps": -1,
            "num_train_epochs": 2,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size,
            "gradient_accumulation_steps": accumulated,
            "logging_steps": 1,
            "save_steps": 2,
            "gradient_checkpointing": source == "stages",
        },
    )
    kept.made = made
    made.step.objective.double()
    metrics = made.evaluate()
    made.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    made.save_student(folder / "final")
    if shard and num_processes() > 1:
        check_shares(teachers)
    metrics |= {f"trained {name}": value for name, value in made.evaluate().items()}
    kept.tensors |= {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in metrics.items()
        if name.endswith(("loss", "kd", "num_tokens"))
    }
    log = [row.loss for row in read_log(folder / "log.jsonl") or ()]
    kept.tensors |= whole({f"weight/{name}": v for name, v in made.step.state_dict().items()})
    return {**kept.tensors, "log": torch.tensor(log, dtype=torch.float64)}


def run_trainer(source: str, folder: Path) -> None:
    """This rank's part of a run; rank 0 writes its result."""
    world_size = int(os.environ["WORLD_SIZE"])
    accumulated = WINDOWS_PER_STEP // world_size
    result = train(source, folder / "many", folder / "cache", accumulated=accumulated)
    assert dist.get_world_size() == world_size
    if dist.get_rank() == 0:
        save_file(result, folder / "many.safetensors")


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    if name.removeprefix(SHARDED).removesuffix(SHARDED_TEACHERS) in SOURCES:
        run_trainer(name, folder)
    else:
        compare_step(name, folder)
    print("done", flush=True)
    dist.barrier()
    # Skips interpreter shutdown, where the process group can deadlock with its own thread.
    os._exit(0)


if __name__ == "__main__":
    main()
