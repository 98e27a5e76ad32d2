"""Small synthetic caches for tests of the store and of its readers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collegium.cache.build import build_cache
from collegium.cache.codec import SCALARS, Samples, Targets, TopK, encode_rows, row_keys
from collegium.cache.shards import PieceKey, PieceTargets, document_hash, window_hash

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


def pieces_of(shard: int, targets: Targets, lengths: Sequence[int] = LENGTHS) -> list[PieceTargets]:
    """Return the encoded pieces of a shard."""
    pieces = []
    for piece, length in enumerate(lengths):
        key, logp = key_of(shard, piece, length), logp_of(shard, piece, length)
        keys = row_keys(3, np.full(length - 1, key.document, np.uint64), np.arange(length - 1))
        scalars = {name: logp[:, i] for i, name in enumerate(SCALARS)}
        pieces.append(PieceTargets(key, encode_rows(targets, logp, keys, scalars=scalars)))
    return pieces


def build(
    path: Path, targets: Targets | None = None, *, num_shards: int = 3, **changed: Any
) -> dict[str, Any]:
    """Build a complete cache."""
    targets = targets or Samples(draws=20)
    manifest = build_cache(
        path,
        identity(targets, **changed),
        lambda number: pieces_of(number, targets),
        shard_targets=[sum(LENGTHS) - len(LENGTHS)] * num_shards,
    )
    assert manifest is not None
    return manifest


def content(path: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a cache except its locks."""
    return {p.name: p.read_bytes() for p in path.iterdir() if not p.name.startswith(".lock")}


CODECS = [Samples(draws=20), TopK(k=12)]
