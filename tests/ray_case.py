"""Caches that Ray actors build from synthetic pieces, with accidents on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cache_cases import Encoder, identity
from collegium.cache.codecs.targets import TargetCodec
from collegium.cache.options import Samples
from collegium.cache.shards import EncodedPiece
from collegium.errors import ModelError

TARGETS = Samples(draws=20)


@dataclass
class Accidents(Encoder):
    """Encodes into shards like `Encoder`, and leaves a file per call in `folder`."""

    folder: Path = field(kw_only=True)
    seconds: float = 0.0
    """Duration of a shard."""
    processes: int = 1
    """Processes that must have begun a shard before one is finished."""
    dies_once_at: int = -1
    dies_always_at: int = -1
    fails_at: int = -1

    def encode(self, shard: int, codec: TargetCodec) -> Iterator[EncodedPiece]:
        begun = len(list(self.folder.glob(f"{shard}-*")))
        (self.folder / f"{shard}-{begun}-{os.getpid()}").touch()
        for _ in range(1200):
            if len({p.name.split("-")[2] for p in self.folder.iterdir()}) >= self.processes:
                break
            time.sleep(0.05)
        time.sleep(self.seconds)
        if shard == self.dies_always_at or (shard == self.dies_once_at and not begun):
            os._exit(9)
        if shard == self.fails_at:
            raise ModelError(f"shard {shard}: model.safetensors is damaged; download it again")
        yield from super().encode(shard, codec)


@dataclass
class Source:
    """The inputs of a cache, as an artifact gives them."""

    encoder_: Accidents
    differs_elsewhere: bool = False
    """Whether other processes have other files."""
    home: int = field(default_factory=os.getpid)

    def identity(self) -> dict[str, Any]:
        other = self.differs_elsewhere and os.getpid() != self.home
        return identity(TARGETS, **({"seed": 4} if other else {}))

    def encoder(self) -> Accidents:
        return self.encoder_
