"""Sources of the shards of a cache: this process, or actors on other machines.

A source computes. `collegium.cache.build` decides which shards are missing, writes the files and
shows progress, so a disk that fills and a killed build are the same for every source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from collegium.cache.shards import Codec, EncodedPiece, ShardMetadata, shard_bytes

OnTargets = Callable[[int], None]
"""Called with a number of targets that were encoded since the last call."""


class ShardSource(Protocol):
    """Computes the files of a cache. Equal inputs give equal bytes from every source."""

    @property
    def shard_targets(self) -> list[int]:
        """Number of targets of each shard."""
        ...

    def load(self) -> None:
        """Load the models that it reads, before the time of the first shard is measured."""
        ...

    def fit(self) -> bytes:
        """Return the content of the side file, for kinds with one."""
        ...

    def bytes_per_target(self, codec: Codec[Any]) -> float:
        """Estimate the size of a target on disk from a batch of windows."""
        ...

    def shards(
        self, metadata: Mapping[int, ShardMetadata], codec: Codec[Any], advance: OnTargets
    ) -> Iterator[tuple[int, memoryview | bytes]]:
        """Yield the number and the file of each shard in `metadata`, in any order."""
        ...


class PieceSource(Protocol):
    """Encodes the pieces of each shard, as `CorpusEncoder`."""

    @property
    def shard_targets(self) -> list[int]: ...
    def load(self) -> None: ...
    def fit(self) -> bytes: ...
    def sample(self, codec: Any) -> list[EncodedPiece]: ...
    def encode(self, shard: int, codec: Any) -> Iterator[EncodedPiece]: ...


@dataclass(frozen=True)
class LocalShards:
    """Shards that this process encodes, one after the other."""

    encoder: PieceSource

    @property
    def shard_targets(self) -> list[int]:
        return self.encoder.shard_targets

    def load(self) -> None:
        self.encoder.load()

    def fit(self) -> bytes:
        return self.encoder.fit()

    def bytes_per_target(self, codec: Codec[Any]) -> float:
        sample = [piece.columns for piece in self.encoder.sample(codec)]
        return codec.bytes_per_target(sample, max(self.shard_targets))

    def shards(
        self, metadata: Mapping[int, ShardMetadata], codec: Codec[Any], advance: OnTargets
    ) -> Iterator[tuple[int, memoryview | bytes]]:
        for number, one in metadata.items():
            pieces, num_targets = list[EncodedPiece](), 0
            for piece in self.encoder.encode(number, codec):
                pieces.append(piece)
                count = codec.num_targets(piece.columns)
                num_targets += count
                advance(count)
            if num_targets != one.num_targets:
                raise ValueError(
                    f"shard {number}: {num_targets} targets instead of {one.num_targets}"
                )
            yield number, shard_bytes(pieces, codec, one)
