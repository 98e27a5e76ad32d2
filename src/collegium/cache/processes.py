"""Assignment of shards to ranks, without communication.

`accelerate launch` and `torchrun` start one command per rank. Each rank builds its own shards, the
last one to finish writes the manifest, and the bytes equal those of a single process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from collegium.errors import RecipeError
from collegium.storage.files import lock_folder

REMEDY = "wait for it, or set another cache.path"


@dataclass(frozen=True, slots=True)
class Ranks:
    """Rank of this process among `world_size` that build a cache together."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """Read RANK and WORLD_SIZE of a launcher, or raise RecipeError. Unset means one process."""
        values = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if all(text.isdecimal() for text in values) and int(values[0]) < int(values[1]):
            return cls(int(values[0]), int(values[1]))
        raise RecipeError(
            f"RANK, WORLD_SIZE: got {values[0]!r}, {values[1]!r}; must be numbers, the first below "
            "the second; start with a launcher, or unset both"
        )

    @property
    def is_single(self) -> bool:
        """True without other processes."""
        return self.world_size == 1

    def owns(self, shard: int) -> bool:
        """Return True if this rank builds the shard."""
        return shard % self.world_size == self.rank

    def set_device(self, environment: Mapping[str, str] = os.environ) -> None:
        """Select one GPU per process of a machine by LOCAL_RANK. A no-op without CUDA."""
        if not self.is_single and torch.cuda.is_available():
            # Without LOCAL_RANK the global rank works too, because of the modulo below.
            local_rank = int(environment.get("LOCAL_RANK", self.rank))
            torch.cuda.set_device(local_rank % torch.cuda.device_count())

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Lock the folder against all but the other ranks. Raises CollegiumError if it is held."""
        # Ranks share the folder lock, which excludes single processes. A second lock, exclusive and
        # one per rank, excludes the same rank started twice.
        with ExitStack() as held:
            held.enter_context(lock_folder(path, REMEDY, shared=not self.is_single))
            if not self.is_single:
                held.enter_context(lock_folder(path, REMEDY, name=f".lock-{self.rank}"))
            yield


SINGLE_PROCESS = Ranks()
