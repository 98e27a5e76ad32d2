"""Rows, teachers and one or more cases of every weighting rule, for the fusion tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collegium.cache.codecs.targets import encode_draws, row_keys
from collegium.cache.options import Samples, TopK
from collegium.distributions import Answer, DenseRows, Distribution, NamedRows, StoredScalars
from collegium.fusion.calibration import TEMPERATURES, GridReader, TemperatureTables
from collegium.fusion.conflict import ConflictBlock
from collegium.fusion.fitted import CalibratedEntropy, DomainWeights, Fixed, Route
from collegium.fusion.fuse import Fusion, StreamedTarget, TargetBlock, fuse
from collegium.fusion.gate import Gate
from collegium.fusion.pools import TeacherReader
from collegium.fusion.rules import (
    AvgCE,
    BestSingle,
    ConfidenceAware,
    Consensus,
    Entropy,
    MinCE,
    PrefixLikelihood,
    Uniform,
)
from collegium.fusion.weighting import CalibrationData, RowStats, Weighting
from collegium.kernels.rows import DenseTarget, RawRows
from collegium.types import Rows, domain_number

DOMAINS = ["court", "clinic", "novel"]
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
    DomainWeights(
        weights={
            "court": {"law": 0.7, "medicine": 0.1, "prose": 0.2},
            "clinic": {"law": 0.2, "medicine": 0.5, "prose": 0.3},
        },
        default={"law": 0.25, "medicine": 0.35, "prose": 0.4},
    ),
    DomainWeights(
        weights={"court": {"law": 0.0, "medicine": 0.9, "prose": 0.1}},
        default={"law": 0.0, "medicine": 0.5, "prose": 0.5},
    ),
    Route(default="law", domains={"court": "prose", "clinic": "medicine"}),
    Route(default="medicine"),
    CalibratedEntropy(
        maps={
            "law": [[0.2, 0.9], [0.7, 1.1], [1.4, 2.5]],
            "medicine": [[0.1, 0.1], [1.5, 1.5]],
            "prose": [[0.6, 1.2]],
        },
        tau=0.8,
    ),
    Consensus(),
    Gate(
        offsets={"law": 0.0, "medicine": 0.0, "prose": 0.0},
        entropy=-0.3,
        max_logp=0.2,
        consensus=-1.3,
        prefix_nll=-0.4,
        decay=0.8,
    ),
    ConfidenceAware(),
    ConfidenceAware(granularity="sequence"),
    MinCE(),
    AvgCE(),
    AvgCE(tau=0.5),
]
SCALAR_CASES = [weighting for weighting in WEIGHTING_CASES if not weighting.needs_consensus]
"""Rules that need only the scalars of each teacher, not whole distributions."""
POOL_CASES: list[dict[str, Any]] = [
    {"pool": "linear"},
    {"pool": "log_linear"},
    {"pool": "power_mean", "exponent": 0.3},
]


class CountedRows(Distribution):
    """Full logits that record every block that is read."""

    def __init__(self, logits_NV: Tensor) -> None:
        self.logits_NV = logits_NV
        self.blocks: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.logits_NV)

    def logits(self, block: slice) -> Tensor:
        self.blocks.append((block.start, block.stop))
        return self.logits_NV[block]

    def take(self, rows_m: Tensor) -> CountedRows:
        part = CountedRows(self.logits_NV[rows_m])
        part.blocks = self.blocks
        return part


def make_rows(labels: Tensor, documents: Sequence[int]) -> Rows:
    """Rows of the documents passed in; the domain of a document follows from its number."""
    numbers = torch.tensor(list(documents))
    domains = torch.tensor([domain_number(name) for name in domains_of(documents)])
    return Rows(torch.arange(len(labels)), labels, numbers, numbers, domains)


def domains_of(documents: Sequence[int]) -> list[str]:
    """Domain of each row's document."""
    return [DOMAINS[number % len(DOMAINS)] for number in documents]


def stats_of(
    teachers: Sequence[Answer], rows: Rows, temperatures: dict[str, float] | None = None
) -> RowStats:
    """Statistics of all rows, including the divergence from the consensus."""
    reader = TeacherReader(teachers, rows, temperatures or {})
    return reader.stats(slice(0, len(rows)), consensus=True)


def calibration_data(
    stats: RowStats, rows: Rows, *, domains: Sequence[str] = DOMAINS
) -> CalibrationData:
    """Rows to fit a rule on, with the same statistics raw and at the temperatures."""
    return CalibrationData(teachers=NAMES, rows=rows, stats=stats, raw=stats, domains=domains)


def make_teachers(logits_KNV: Tensor, names: Sequence[str] = NAMES) -> list[Answer]:
    """One teacher per leading index."""
    pairs = zip(names, logits_KNV, strict=False)
    return [Answer(name, DenseRows(logits_NV)) for name, logits_NV in pairs]


def stored_rows(
    logits_NV: Tensor,
    labels_N: Tensor,
    targets: Samples | TopK,
    *,
    temperatures: Sequence[float] = (),
    seed: int = 0,
) -> NamedRows:
    """Contents of a per-teacher cache without rounding."""
    logp_NV = logits_NV.log_softmax(1)
    num_rows, vocab_size = logp_NV.shape
    if isinstance(targets, TopK):
        top = logp_NV.topk(targets.k)
        tail_N = logp_NV.scatter(1, top.indices, -torch.inf).logsumexp(1)
        starts, ids = torch.arange(num_rows + 1) * targets.k, top.indices.flatten()
        rows = NamedRows(starts, ids, top.values.flatten(), tail_N, vocab_size)
    else:
        keys_N = row_keys(seed, np.full(num_rows, 3, np.uint64), np.arange(num_rows))
        columns = encode_draws(logp_NV, keys_N, targets.draws)
        sizes, ids, counts = columns["sizes"], columns["ids"], columns["counts"]
        starts = torch.from_numpy(np.concatenate([[0], sizes.astype(np.int64).cumsum()]))
        mass_E = torch.from_numpy(counts.astype(np.float64)) / targets.draws
        rows = NamedRows(starts, torch.from_numpy(ids), mass_E.log(), None, vocab_size, True)
        rows = replace(rows, token_logp=logp_NV[rows.row_of_entry(), rows.ids])
    at = {value: (logits_NV / value).log_softmax(1) for value in (1.0, *temperatures)}
    stored = StoredScalars(
        logp_NV.gather(1, labels_N[:, None])[:, 0],
        logp_NV.amax(1),
        {value: torch.special.entr(logp.exp()).sum(1) for value, logp in at.items()},
        {value: (logp_NV / value).logsumexp(1) for value in temperatures},
    )
    return replace(rows, stored=stored)


def fused(
    fusion: Fusion,
    teachers: Sequence[Answer],
    rows: Rows,
    block_size: int = 4,
    *,
    is_streamed: bool = False,
) -> TargetBlock:
    """Fuse all rows block by block, and concatenate the blocks over the vocabulary."""
    target = (StreamedTarget if is_streamed else fuse)(fusion, teachers, rows)
    starts = range(0, len(rows), block_size)
    blocks = [target.block(slice(s, min(s + block_size, len(rows)))) for s in starts]
    conflicts = [b.conflict for b in blocks if b.conflict is not None]
    normalizers = [b.log_normalizer_n for b in blocks if b.log_normalizer_n is not None]
    stats = [b.stats for b in blocks if b.stats is not None]
    return TargetBlock(
        DenseTarget(RawRows(torch.cat([dense_logp(b) for b in blocks])), "logp"),
        torch.cat([b.weights_Kn for b in blocks if b.weights_Kn is not None], dim=1),
        RowStats.cat(stats) if stats else None,
        log_normalizer_n=torch.cat(normalizers) if normalizers else None,
        pooled_temperature=fusion.pooled_temperature,
        conflict=_concatenated(conflicts) if conflicts else None,
    )


def dense_logp(block: TargetBlock) -> Tensor:
    """(n, V) log-probabilities of a target, the tail of named tokens spread evenly."""
    if isinstance(block.target, NamedRows):
        return block.target.logits(slice(0, len(block.target)))
    return block.logp()


def _concatenated(parts: Sequence[ConflictBlock]) -> ConflictBlock:
    factors = [part.kd_factor_n for part in parts if part.kd_factor_n is not None]
    return ConflictBlock(
        torch.cat([part.disagreement_n for part in parts]),
        torch.cat([part.applied_n for part in parts]),
        torch.cat(factors) if factors else None,
    )


@torch.no_grad()
def temperature_tables(
    answers: Sequence[Answer],
    rows: Rows,
    *,
    grid: Sequence[float] = TEMPERATURES,
    consensus_kl_KN: Tensor | None = None,
) -> TemperatureTables:
    """Read the answers of one batch at every temperature of the grid."""
    reader, block = GridReader(grid), slice(0, len(rows))
    tables = {
        answer.name: reader.read(answer.distribution, rows.labels, block) for answer in answers
    }
    return TemperatureTables(grid, tables, rows, consensus_kl_KN)
