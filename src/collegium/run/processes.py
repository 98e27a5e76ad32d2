"""Several processes of one run: rank 0 runs the stages, and the others join its shared builds.

    rank 0    check ─▶ corpus, preflight ─▶ caches ────▶ training ─▶ evaluation, export, report
                                              │            │                             │
    others    wait ─────────────────────▶ their shards ▶ their batches ▶ wait ─────────▶ end

Rank 0 decides what is built from the run folder, and broadcasts the name of each shared build. No
other rank reads the folder to decide, so no collective waits for a rank that took another branch.
All processes need the same run folder, and so a shared file system on several machines.

A process that ends closes its connections, which ends the others. A process that hangs ends them
after `train.ddp_timeout` seconds in a step, and a launcher ends all processes of a failed one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from collegium.cache.processes import Ranks
from collegium.config.recipe import Recipe
from collegium.console import quiet_libraries, silence
from collegium.errors import RecipeError, TrainingError, first_line
from collegium.models.loading import choose_device
from collegium.options import plain
from collegium.run.folder import environment
from collegium.storage.files import differing_fields

STAGE_LIMIT = timedelta(days=7)
"""Longest wait for a stage of rank 0. A dead process is noticed at once, by its connections."""
LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, eq=False)
class Processes:
    """This process and the others of its run. Without others, every method is a no-op."""

    rank: int = 0
    world_size: int = 1
    _group: Any = None
    """Group of all processes with a time limit for whole stages, on the CPU."""
    _owns_default_group: bool = False

    @classmethod
    def join(cls, recipe: Recipe, variables: Mapping[str, str] = os.environ) -> Processes:
        """Meet the other processes that a launcher has started. A no-op for a single one.

        Raises:
            RecipeError: a variable of the launcher is missing, or the processes run other recipes
                or versions.
            TrainingError: one of them does not start within `train.ddp_timeout`.
        """
        ranks = Ranks.from_environment(variables)
        if ranks.is_single:
            return cls()
        quiet_libraries()
        owns_default_group = not dist.is_initialized()
        missing = [name for name in LAUNCHER_VARIABLES if not variables.get(name)]
        if owns_default_group and missing:
            raise RecipeError(
                f"{', '.join(missing)}: not set, with WORLD_SIZE={ranks.world_size}; must be the "
                "address of rank 0; start with torchrun or accelerate launch"
            )
        with noticing_loss(ranks):
            if owns_default_group:
                _init_default_group(recipe, ranks, variables)
            group = dist.new_group(backend="gloo", timeout=STAGE_LIMIT)
            processes = cls(ranks.rank, ranks.world_size, group, owns_default_group)
            processes._compare(recipe)
        if processes.rank > 0:
            silence()
        return processes

    @property
    def is_single(self) -> bool:
        """True without other processes."""
        return self.world_size == 1

    @property
    def ranks(self) -> Ranks:
        """Rank and number of the processes."""
        return Ranks(self.rank, self.world_size)

    @contextmanager
    def sharing(self, name: str) -> Iterator[None]:
        """Announce a build of rank 0 that the others join, and wait for their parts."""
        if self.is_single:
            yield
            return
        self._broadcast(name)
        yield
        dist.barrier(self._group)

    def shared_builds(self) -> Iterator[str]:
        """Yield the name of each build that rank 0 announces, to join it, until the run ends."""
        while (name := self._broadcast(None)) is not None:
            yield name
            dist.barrier(self._group)
        self._leave()

    def end(self) -> None:
        """End the run of all processes."""
        if not self.is_single:
            self._broadcast(None)
            self._leave()

    def _leave(self) -> None:
        dist.barrier(self._group)
        if self._owns_default_group:
            dist.destroy_process_group()

    def _broadcast(self, value: str | None) -> str | None:
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def _compare(self, recipe: Recipe) -> None:
        """Raise RecipeError unless all processes have the same recipe, versions and devices."""
        installed = environment()
        facts = {
            "recipe": plain(recipe),
            "python": installed.python,
            **{f"version of {name}": one for name, one in installed.packages.items()},
            "device": choose_device("auto").type,
        }
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, facts, group=self._group)
        for rank, other in enumerate(gathered):
            if changes := differing_fields(gathered[0], other):
                raise RecipeError(
                    f"process {rank}: differs from process 0: {'; '.join(changes[:5])}; must be "
                    "the same everywhere; start all processes with one recipe and environment"
                )


SINGLE = Processes()


def _init_default_group(recipe: Recipe, ranks: Ranks, variables: Mapping[str, str]) -> None:
    from accelerate import PartialState

    on_cpu = choose_device(recipe.student.device).type == "cpu"
    if not on_cpu:
        # Two processes on one GPU fail in NCCL, long after the start.
        here, count = int(variables.get("LOCAL_WORLD_SIZE", 1)), torch.accelerator.device_count()
        if here > count:
            raise RecipeError(
                f"LOCAL_WORLD_SIZE: got {here} processes on a machine with {count} devices; must "
                "be at most one per device; start fewer"
            )
    ranks.set_device()
    PartialState(cpu=on_cpu, timeout=timedelta(seconds=recipe.train.ddp_timeout))


@contextmanager
def noticing_loss(ranks: Ranks) -> Iterator[None]:
    """Raise TrainingError where a collective fails: another process ended, hangs or is missing."""
    try:
        yield
    except RuntimeError as error:
        if ranks.is_single or not _is_lost_connection(error):
            raise
        # Without the path of a source file before it, and advice to developers after it.
        reason = re.sub(r"^\[\S+\] ", "", first_line(error)).partition(". This is")[0]
        raise TrainingError(
            f"process {ranks.rank} of {ranks.world_size}: another process ended or exceeded its "
            f"time limit ({reason}); its own message comes first; run the same command again to "
            "resume"
        ) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    """Return whether an error is one of a collective. Those of gloo have no class of their own."""
    return isinstance(error, dist.DistError) or any(
        text in str(error)
        for text in ("gloo", "Gloo", "Connection closed", "timeout caused pair closure")
    )
