"""Small synthetic caches for tests of the store and of its readers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collegium.cache.build import build_cache
from collegium.cache.codecs.targets import SCALARS, TargetCodec, row_keys
from collegium.cache.keys import PieceKey, document_hash, window_hash
from collegium.cache.manifest import Manifest, manifest_digest
from collegium.cache.options import Samples, Targets, TopK
from collegium.cache.processes import Ranks
from collegium.cache.shards import EncodedPiece
from collegium.cache.sources import LocalShards

VOCAB = 300
LENGTHS = [9, 2, 17, 5, 30, 12, 3]
"""Tokens per piece; equal for all shards."""


def identity(codec: Targets, **changed: Any) -> dict[str, Any]:
    """Return the identity of such a cache."""
    snippet = (
        {"name": "samples", "draws": codec.draws}
        if isinstance(codec, Samples)
        else {"name": "top_k", "k": codec.k}
    )
    fields: dict[str, Any] = {
        "kind": "fused",
        "targets": snippet,
        "vocab_size": VOCAB,
        "teachers": {"code": {"weights": "aa"}, "prose": {"weights": "bb"}},
        "seed": 3,
    }
    return fields | changed


def tokens_of(shard: int, piece: int, length: int) -> np.ndarray:
    """Return the tokens of a piece."""
    return np.random.default_rng([shard, piece]).integers(VOCAB, size=length)


def key_of(shard: int, piece: int, length: int) -> PieceKey:
    """Return the key of a piece."""
    is_target = np.arange(length) > 0
    window = window_hash(tokens_of(shard, piece, length), is_target)
    return PieceKey(document_hash(f"{shard}-{piece}"), 10 * piece, window)


def logp_of(shard: int, piece: int, length: int) -> torch.Tensor:
    """Return the (L - 1, V) targets of a piece."""
    generator = torch.Generator().manual_seed(1000 * shard + piece)
    return torch.randn(length - 1, VOCAB, generator=generator).mul_(3).log_softmax(-1)


def codec_of(targets: Targets, vocab_size: int = VOCAB) -> TargetCodec:
    """Return the codec of a fused cache."""
    return TargetCodec("fused", targets, vocab_size)


def pieces_of(shard: int, targets: Targets, lengths: Sequence[int] = LENGTHS) -> list[EncodedPiece]:
    """Return the encoded pieces of a shard."""
    pieces = []
    for piece, length in enumerate(lengths):
        key, logp = key_of(shard, piece, length), logp_of(shard, piece, length)
        keys = row_keys(3, np.full(length - 1, key.document, np.uint64), np.arange(length - 1))
        scalars = {name: logp[:, i] for i, name in enumerate(SCALARS)}
        pieces.append(EncodedPiece(key, codec_of(targets).encode(logp, keys, scalars), piece))
    return pieces


class Stop(Exception):
    """Interrupts a build."""


@dataclass
class Encoder:
    """A corpus encoder of synthetic pieces, which records its calls."""

    targets: Targets = field(default_factory=lambda: Samples(draws=20))
    num_shards: int = 3
    stop_at: int = -1
    """Shard at which the build is interrupted."""
    encoded: list[int] = field(default_factory=list)
    sampled: int = 0

    @property
    def shard_targets(self) -> list[int]:
        return [sum(LENGTHS) - len(LENGTHS)] * self.num_shards

    def load(self) -> None:
        pass

    def encode(self, shard: int, codec: TargetCodec) -> Iterator[EncodedPiece]:
        if shard == self.stop_at:
            raise Stop
        self.encoded.append(shard)
        yield from pieces_of(shard, self.targets)

    def sample(self, codec: TargetCodec) -> list[EncodedPiece]:
        self.sampled += 1
        return pieces_of(0, self.targets)


def build(
    path: Path,
    targets: Targets | None = None,
    *,
    num_shards: int = 3,
    encoder: Encoder | None = None,
    ranks: Ranks | None = None,
    **changed: Any,
) -> Manifest | None:
    """Build a cache, or the shards of a rank."""
    targets = targets or Samples(draws=20)
    encoder = encoder or Encoder(targets, num_shards)
    return build_cache(
        path, identity(targets, **changed), LocalShards(encoder), ranks=ranks or Ranks()
    )


def entries_of(path: Path) -> list[dict[str, Any]]:
    """Return the entries of the shards in a manifest."""
    return json.loads((path / "manifest.json").read_text())["shards"]


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a folder, and give it the digest of its new content."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = manifest_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def content(path: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a cache except its locks."""
    return {p.name: p.read_bytes() for p in path.iterdir() if not p.name.startswith(".lock")}


CODECS = [Samples(draws=20), TopK(k=12)]
