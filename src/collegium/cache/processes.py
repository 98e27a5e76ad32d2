"""Which process of several builds which shards: decided without a word between them.

`accelerate launch` and `torchrun` start the same command several times and tell each its number. Every process builds the shards
that are its own, whoever finishes last writes the manifest, and the bytes are those of one process alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from collegium.errors import RecipeError
from collegium.files import hold_lock, lock_folder

REMEDY = "wait for it, or set another cache.path"


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process of `world` that build a cache together."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """What the launcher says in RANK and WORLD_SIZE; one process alone where it says nothing.

        Raises:
            RecipeError: they are no numbers that fit each other.
        """
        told = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if all(text.isdecimal() for text in told) and int(told[0]) < int(told[1]):
            return cls(int(told[0]), int(told[1]))
        raise RecipeError(
            f"RANK, WORLD_SIZE: got {told[0]!r}, {told[1]!r}; must be a number below the second; start with a launcher, "
            "or unset both"
        )

    @property
    def is_single(self) -> bool:
        """Whether there are no other processes."""
        return self.world == 1

    def owns(self, shard: int) -> bool:
        """Whether this process builds a shard."""
        return shard % self.world == self.rank

    def set_device(self, environment: Mapping[str, str] = os.environ) -> None:
        """Let each process of a machine compute on a GPU of its own, as LOCAL_RANK says."""
        if not self.is_single and torch.cuda.is_available():
            local_rank = int(environment.get("LOCAL_RANK", self.rank))
            torch.cuda.set_device(local_rank % torch.cuda.device_count())

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Hold the folder against everybody but the processes with other ranks.

        Raises:
            CollegiumError: a builder alone, or one of the same rank, is at work.
        """
        with ExitStack() as held:
            held.enter_context(lock_folder(path, REMEDY, shared=not self.is_single))
            if not self.is_single:
                held.enter_context(hold_lock(path, f".lock-{self.rank}", REMEDY))
            yield
