"""Teacher-forced scoring of models against the text and the fused target in one pass.

Shapes: N rows (target tokens) of a batch, n block of rows, V vocabulary, K teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from collegium.data.pack import Collator, PackedDataset
from collegium.distributions import Answer, Distribution, Teacher
from collegium.errors import CollegiumError, DataError, ModelError
from collegium.evaluate.metrics import Metrics, ScoredTokens
from collegium.fusion.fuse import Fusion, Target, fuse
from collegium.models.loading import choose_device
from collegium.storage.records import ModelInfo, ResultRow
from collegium.types import Batch, Rows, is_row

FUSED = "fused target"
"""Name of the row of the fused target."""

KINDS = ("untouched", "teacher", "fused", "control", "student")
"""Kinds of models in the order of results.json."""

BLOCK_ELEMENTS = 2**23
"""Elements of one [n, V] buffer if no block size is given: 32 MiB in float32."""

Columns = dict[str, list[Tensor]]
"""Per-row values of one model by name, one tensor (n,) per block."""

OnProgress = Callable[[int, int], None]
"""Called after each batch with the number of batches done and their total."""


@dataclass(frozen=True, slots=True)
class Origins:
    """Document, domain and bytes of each row of one batch, (N,) int64 each, on the CPU."""

    # All that is kept of a batch: keeping batches would hold the dataset in GPU memory.

    samples_N: Tensor
    domains_N: Tensor
    num_bytes_N: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """One batch and its rows on the scoring device, with the origins of the rows."""

    batch: Batch
    rows: Rows
    origins: Origins


def results_rows(metrics: Mapping[str, Metrics], about: Sequence[ModelInfo]) -> list[ResultRow]:
    """Return the rows of results.json: untouched, teachers, fused, controls, student.

    The fused target needs no entry in `about`.

    Raises:
        CollegiumError: a scored model is missing in `about`.
    """
    infos = {info.name: info for info in (ModelInfo(name=FUSED, kind="fused"), *about)}
    for name in metrics:
        if name not in infos:
            raise CollegiumError(
                f"results: got metrics of `{name}`; must have a description; add it to `about`"
            )
    rows = [ResultRow(**dict(infos[name]), **dict(metrics[name].scores())) for name in metrics]
    return sorted(rows, key=lambda row: KINDS.index(row.kind))


def score_models(
    models: Sequence[Teacher],
    teachers: Sequence[Teacher],
    fusion: Fusion | None,
    dataset: PackedDataset,
    *,
    batch_size: int,
    block_size: int | None = None,
    max_tokens: int | None = None,
    progress: OnProgress | None = None,
) -> dict[str, Metrics]:
    """Score every model and the fused target of the teachers in one pass.

    A model that is also a teacher is scored once. Rows are processed in blocks, so no [N, V] tensor
    is materialized.

    Args:
        models: models that get a row in the result, in this order.
        teachers: members of the fusion. Agreement is measured with each of them.
        fusion: how the teachers are fused. None skips the fused target and all distances to it.
        dataset: packed or padded documents.
        batch_size: windows per forward pass.
        block_size: rows per block. None chooses about 32 MiB per buffer.
        max_tokens: approximate number of target tokens to score, in windows spread over the
            dataset. None scores all.
        progress: called with (batches done, all batches).

    Returns:
        Metrics by model name, and with a fusion also those of `fused target`, last.

    Raises:
        CollegiumError: two models share a name.
        DataError: the dataset has no target tokens.
        ModelError: a model outputs NaN.
    """
    scorers = unique_scorers(models, teachers)
    if fusion is not None and not teachers:
        raise CollegiumError(
            "score_models: got a fusion without teachers; must have at least one; pass fusion=None"
        )
    columns: dict[str, Columns] = {}
    origins: list[Origins] = []
    windows = spread_windows(dataset, max_tokens)
    source = iterate_chunks(dataset, batch_size=batch_size, windows=windows, progress=progress)
    with torch.no_grad():
        for chunk in source:
            scores = {scorer.name: scorer.score(chunk.batch, chunk.rows) for scorer in scorers}
            # Deferred: the rows must first be on the device of the outputs (`_measure_rows`).
            fused_of = None
            if fusion is not None:
                fused_of = partial(fuse, fusion, [scores[t.name] for t in teachers])
            _measure_rows(columns, scores, fused_of, chunk.rows, block_size)
            origins.append(chunk.origins)
    targets = gather_targets(origins, dataset)
    names = [model.name for model in models] + ([FUSED] if fusion is not None else [])
    teacher_names = [teacher.name for teacher in teachers]
    return {name: _metrics(name, columns, teacher_names, targets) for name in names}


def unique_scorers(models: Sequence[Teacher], teachers: Sequence[Teacher]) -> list[Teacher]:
    """Return every scorer once, in order.

    Raises:
        CollegiumError: two different scorers share a name, or one is named `fused target`.
    """
    by_name: dict[str, Teacher] = {}
    for scorer in (*models, *teachers):
        if scorer.name == FUSED or by_name.setdefault(scorer.name, scorer) is not scorer:
            raise CollegiumError(
                f"score_models: got the name `{scorer.name}` twice; must be unique (and not "
                f"`{FUSED}`); give each model a different name"
            )
    return list(by_name.values())


def iterate_chunks(
    dataset: PackedDataset,
    *,
    batch_size: int,
    windows: Sequence[int] | None = None,
    progress: OnProgress | None = None,
) -> Iterator[Chunk]:
    """Yield the batches of a dataset in order, skipping those without targets.

    `windows` selects a subset of the windows.
    """
    chosen = range(len(dataset)) if windows is None else windows
    domain_of = torch.as_tensor(_domain_indices(dataset))
    loader = DataLoader(
        Subset(dataset, list(chosen)), batch_size=batch_size, shuffle=False, collate_fn=Collator()
    )
    # Teachers put their logits on the device of the batch. On the CPU, every block would be copied.
    device = choose_device("auto")
    for step, inputs in enumerate(loader):
        batch = Batch.from_inputs(inputs)
        rows = batch.rows()
        if len(rows):
            num_bytes_N = inputs["num_bytes"].flatten()[rows.index + 1]
            origins = Origins(rows.samples, domain_of[rows.samples], num_bytes_N)
            yield Chunk(batch.to(device), rows.to(device), origins)
        if progress is not None:
            progress(step + 1, len(loader))


def gather_targets(origins: Sequence[Origins], dataset: PackedDataset) -> ScoredTokens:
    """Concatenate the origins of all batches.

    Raises:
        DataError: there are no batches.
    """
    if not origins:
        raise DataError(
            "evaluation: got no target token; must have at least one; use a larger validation split"
        )
    return ScoredTokens(
        samples_N=_numpy([part.samples_N for part in origins]),
        domains_N=_numpy([part.domains_N for part in origins]),
        num_bytes_N=_numpy([part.num_bytes_N for part in origins]),
        domains=tuple(dataset.domains),
    )


def window_counts(dataset: PackedDataset, windows: Sequence[int]) -> list[int]:
    """Count the target tokens of each window."""
    items = (dataset[window] for window in windows)
    return [int(is_row(item["labels"], item["position_ids"]).sum()) for item in items]


def spread_windows(dataset: PackedDataset, max_tokens: int | None) -> list[int]:
    """Return evenly spread windows with about `max_tokens` targets in total, or all for None."""
    windows = range(len(dataset))
    return (
        list(windows) if max_tokens is None else spread(window_counts(dataset, windows), max_tokens)
    )


def spread(counts: Sequence[int], max_tokens: int | None) -> list[int]:
    """Return evenly spread indices of about `max_tokens` of these counts, or all for None."""
    size = len(counts)
    if max_tokens is None or size == 0:
        return list(range(size))
    # Evenly spread, so that an ordered dataset is represented by all of its domains.
    num_kept = max(1, min(size, round(size * max_tokens / max(1, sum(counts)))))
    return [int(at) for at in np.linspace(0, size, num_kept, endpoint=False)]


def blocks_of(rows: Rows, scores: Distribution, block_size: int | None) -> tuple[Rows, list[slice]]:
    """Return the rows on the device of the scores, and the slices to read them in."""
    # Only logits reveal the vocabulary size and the device of a scorer: read one row.
    probe_1V = scores.logits(slice(0, 1))
    size = block_size or max(16, BLOCK_ELEMENTS // probe_1V.shape[1])
    device = probe_1V.device
    return rows.to(device), [
        slice(at, min(at + size, len(rows))) for at in range(0, len(rows), size)
    ]


def row_measures(logp_nV: Tensor, labels_n: Tensor) -> dict[str, Tensor]:
    """Return NLL, entropy, confidence and top-1 token of (n, V) log-probabilities, each (n,)."""
    confidence_n, top1_n = logp_nV.max(1)
    return {
        "nll": -logp_nV.gather(1, labels_n[:, None]).squeeze(1),
        # entr(0) = 0, whereas p * log p would be NaN.
        "entropy": torch.special.entr(logp_nV.exp()).sum(1),
        "confidence": confidence_n.exp(),
        "top1": top1_n,
        "is_correct": top1_n == labels_n,
    }


def forward_kl(target_logp_nV: Tensor, logp_nV: Tensor) -> Tensor:
    """Return KL(target || model) = sum_v P (log P - log Q), (n, V) -> (n,) nats; 0 log 0 = 0."""
    target_nV = target_logp_nV.exp()
    terms_nV = target_nV * (target_logp_nV - logp_nV)
    return torch.where(target_nV > 0, terms_nV, torch.zeros_like(terms_nV)).sum(1)


def _measure_rows(
    columns: dict[str, Columns],
    scores: Mapping[str, Answer],
    fused_of: Callable[[Rows], Target] | None,
    rows: Rows,
    block_size: int | None,
) -> None:
    """Append the measures of all models on the rows of one batch to `columns`."""
    # The head of a teacher is applied twice per block: here and in the fusion.
    rows, blocks = blocks_of(rows, next(iter(scores.values())).distribution, block_size)
    fused = None if fused_of is None else fused_of(rows)
    for block in blocks:
        labels_n = rows.labels[block]
        target_nV = None
        if fused is not None:
            target_nV = fused.block(block).logp()
            _append(columns, FUSED, row_measures(target_nV, labels_n), target_nV, target_nV)
        for name, outputs in scores.items():
            logp_nV = outputs.distribution.logits(block).to(labels_n.device).log_softmax(1)
            _append(columns, name, row_measures(logp_nV, labels_n), logp_nV, target_nV)


def _append(
    columns: dict[str, Columns],
    name: str,
    measures: dict[str, Tensor],
    logp_nV: Tensor,
    target_nV: Tensor | None,
) -> None:
    if target_nV is not None:
        measures["kl"] = forward_kl(target_nV, logp_nV)
    for key, values_n in measures.items():
        kept_n = values_n.float() if values_n.is_floating_point() else values_n
        columns.setdefault(name, {}).setdefault(key, []).append(kept_n.cpu())


def _metrics(
    name: str, columns: Mapping[str, Columns], teachers: Sequence[str], targets: ScoredTokens
) -> Metrics:
    column = {key: torch.cat(parts).numpy() for key, parts in columns[name].items()}
    if np.isnan(column["nll"]).any():
        raise ModelError(
            f"model `{name}`: got NaN log-probabilities; must be finite; "
            "load it in float32 or bfloat16 and check its weights"
        )
    agrees_N = {other: column["top1"] == _top1(columns, other) for other in teachers}
    return Metrics(
        name=name,
        targets=targets,
        nll_N=column["nll"],
        entropy_N=column["entropy"],
        confidence_N=column["confidence"],
        is_correct_N=column["is_correct"],
        kl_to_fused_N=column.get("kl"),
        agrees_fused_N=column["top1"] == _top1(columns, FUSED) if FUSED in columns else None,
        agrees_N=agrees_N,
    )


def _top1(columns: Mapping[str, Columns], name: str) -> np.ndarray:
    return torch.cat(columns[name]["top1"]).numpy()


def _domain_indices(dataset: PackedDataset) -> list[int]:
    """Return the index into `dataset.domains` of each document."""
    indices = {domain: index for index, domain in enumerate(dataset.domains)}
    return [
        indices[domain] if isinstance(domain, str) else int(domain)
        for domain in dataset.sample_domains
    ]


def _numpy(parts: Sequence[Tensor]) -> np.ndarray:
    return torch.cat(list(parts)).numpy().astype(np.int64)
