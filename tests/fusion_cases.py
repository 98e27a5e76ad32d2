"""Rows, teachers and every weighting rule, as the fusion tests use them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collegium.fusion.pooling import FusedBlock, FusedTarget, Fusion
from collegium.fusion.weights import (
    BestSingle,
    Entropy,
    Fixed,
    PrefixLikelihood,
    Uniform,
    Weighting,
)
from collegium.types import DenseRows, Rows, TeacherRows

NAMES = ["law", "medicine", "prose"]
WEIGHTING_CASES: list[Weighting] = [
    Uniform(),
    Fixed(weights={"law": 0.2, "medicine": 0.5, "prose": 0.3}),
    Fixed(weights={"law": 0.4, "medicine": 0.0, "prose": 0.6}),
    BestSingle(teacher="medicine"),
    PrefixLikelihood(),
    PrefixLikelihood(eta=2.0, decay=1.0),
    *[
        Entropy(form=form, granularity=granularity, tau=tau)
        for form, tau in (("softmax", 0.7), ("inverse", 1.0), ("complement", 1.0))
        for granularity in ("token", "sequence", "batch")
    ],
]


class CountedRows:
    """Logits held whole that count how often each block is asked for."""

    def __init__(self, logits_NV: Tensor) -> None:
        self.logits_NV = logits_NV
        self.asked: list[tuple[int, int]] = []

    def logits(self, block: slice) -> Tensor:
        self.asked.append((block.start, block.stop))
        return self.logits_NV[block]


def make_rows(labels: Tensor, documents: Sequence[int]) -> Rows:
    """Rows of the given documents."""
    numbers = torch.tensor(list(documents))
    return Rows(torch.arange(len(labels)), labels, numbers, numbers)


def make_teachers(logits_KNV: Tensor, names: Sequence[str] = NAMES) -> list[TeacherRows]:
    """One teacher per leading index."""
    pairs = zip(names, logits_KNV, strict=False)
    return [TeacherRows(name, DenseRows(logits_NV)) for name, logits_NV in pairs]


def fuse(
    fusion: Fusion, teachers: Sequence[TeacherRows], rows: Rows, block_size: int = 4
) -> FusedBlock:
    """All rows of a fused target, asked block by block and glued together."""
    target = FusedTarget(fusion, teachers, rows)
    starts = range(0, len(rows), block_size)
    blocks = [target.block(slice(s, min(s + block_size, len(rows)))) for s in starts]
    normalizers = [b.log_normalizer_n for b in blocks if b.log_normalizer_n is not None]
    return FusedBlock(
        logp_nV=torch.cat([b.logp_nV for b in blocks]),
        weights_Kn=torch.cat([b.weights_Kn for b in blocks], dim=1),
        entropy_Kn=torch.cat([b.entropy_Kn for b in blocks], dim=1),
        label_logp_Kn=torch.cat([b.label_logp_Kn for b in blocks], dim=1),
        max_logp_Kn=torch.cat([b.max_logp_Kn for b in blocks], dim=1),
        log_normalizer_n=torch.cat(normalizers) if normalizers else None,
        pooled_temperature=fusion.pooled_temperature,
    )
