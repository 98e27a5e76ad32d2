"""One teacher-forced pass over a dataset: how well each model predicts it, and how close it is to the fused target.

Shapes: N rows (target tokens) of a batch, n block of rows, V vocabulary, K teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from collegium.data.pack import Collator, PackedDataset
from collegium.errors import CollegiumError, DataError, ModelError
from collegium.evaluate.metrics import Metrics, Targets
from collegium.evaluate.metrics import paired_bootstrap as paired_bootstrap
from collegium.fusion.pooling import FusedTarget, Fusion
from collegium.models.loading import choose_device
from collegium.types import Batch, RowLogits, Rows, TeacherRows, is_row

FUSED = "fused target"
"""Name under which the fused target itself is scored."""

BLOCK_ELEMENTS = 2**23
"""Elements of one [n, V] buffer when no block size is given: 32 MiB in float32."""

Columns = dict[str, list[Tensor]]
"""Per-row values of one model by name, one piece (n,) per block."""

Progress = Callable[[int, int], None]
"""Called after each batch with the number done and the number of all batches."""


class Scorer(Protocol):
    """Whatever scores rows: a teacher, or a student wrapped as one."""

    @property
    def name(self) -> str: ...

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> TeacherRows:
        """Score the rows without gradient."""
        ...


@dataclass(frozen=True, slots=True)
class Origins:
    """What the rows of one batch stand for, (N,) int64 each on the CPU: all of a batch that outlives its turn."""

    samples_N: Tensor
    domains_N: Tensor
    num_bytes_N: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """One batch of a dataset with its rows, on the device that scores, and what each row stands for."""

    batch: Batch
    rows: Rows
    origins: Origins


def score_models(
    models: Sequence[Scorer],
    teachers: Sequence[Scorer],
    fusion: Fusion | None,
    dataset: PackedDataset,
    *,
    batch_size: int,
    block_size: int | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Metrics]:
    """Score every model and the fused target of the teachers in one pass, in blocks of rows.

    A model that is also a teacher is scored once. No [N, V] tensor is held: each block of rows is read, measured and dropped.

    Args:
        models: what gets a row in the result, in this order.
        teachers: what the fusion is made of; agreement is measured with each of them.
        fusion: how the teachers become one target; None leaves out the fused target and every distance to it.
        dataset: packed or padded documents.
        batch_size: windows per forward pass.
        block_size: rows per block; None chooses about 32 MiB per buffer.
        max_tokens: about how many target tokens to score, in windows spread over the dataset; None for all.
        progress: called with (batches done, all batches).

    Returns:
        The metrics by name of the model; with a fusion also `fused target`, last.

    Raises:
        CollegiumError: two models share a name.
        DataError: the dataset holds no target token.
        ModelError: a model gives values that are not numbers.
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
            fused_of = None
            if fusion is not None:
                fused_of = partial(FusedTarget, fusion, [scores[t.name] for t in teachers])
            _measure_rows(columns, scores, fused_of, chunk.rows, block_size)
            origins.append(chunk.origins)
    targets = gather_targets(origins, dataset)
    names = [model.name for model in models] + ([FUSED] if fusion is not None else [])
    teacher_names = [teacher.name for teacher in teachers]
    return {name: _metrics(name, columns, teacher_names, targets) for name in names}


def unique_scorers(models: Sequence[Scorer], teachers: Sequence[Scorer]) -> list[Scorer]:
    """Every scorer once, in order.

    Raises:
        CollegiumError: two different scorers share a name, or one is called like the fused target.
    """
    known: dict[str, Scorer] = {}
    for scorer in (*models, *teachers):
        if scorer.name == FUSED or known.setdefault(scorer.name, scorer) is not scorer:
            raise CollegiumError(
                f"score_models: got the name `{scorer.name}` twice; must be unique (and not `{FUSED}`); "
                "give each model its own name"
            )
    return list(known.values())


def iterate_chunks(
    dataset: PackedDataset,
    *,
    batch_size: int,
    windows: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Iterator[Chunk]:
    """The batches of a dataset in order, without those that have no target; `windows` chooses some of them."""
    chosen = range(len(dataset)) if windows is None else windows
    domain_of = torch.as_tensor(_domain_indices(dataset))
    loader = DataLoader(
        Subset(dataset, list(chosen)), batch_size=batch_size, shuffle=False, collate_fn=Collator()
    )
    # Teachers answer on the device of the batch: on the CPU, every block of logits would have to travel.
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


def gather_targets(origins: Sequence[Origins], dataset: PackedDataset) -> Targets:
    """What the rows of all batches stand for.

    Raises:
        DataError: there is no batch.
    """
    if not origins:
        raise DataError(
            "evaluation: got no target token; must be at least one; use a larger validation split"
        )
    return Targets(
        samples_N=_numpy([one.samples_N for one in origins]),
        domains_N=_numpy([one.domains_N for one in origins]),
        num_bytes_N=_numpy([one.num_bytes_N for one in origins]),
        domains=tuple(dataset.domains),
    )


def window_counts(dataset: PackedDataset, windows: Sequence[int]) -> list[int]:
    """Number of target tokens in each of the windows."""
    items = (dataset[window] for window in windows)
    return [int(is_row(item["labels"], item["position_ids"]).sum()) for item in items]


def spread_windows(dataset: PackedDataset, max_tokens: int | None) -> list[int]:
    """Windows spread evenly over the dataset that hold about `max_tokens` targets; all of them for None."""
    size = len(dataset)
    if max_tokens is None or size == 0:
        return list(range(size))
    total = sum(window_counts(dataset, range(size)))
    wanted = max(1, min(size, round(size * max_tokens / max(1, total))))
    return [int(at) for at in np.linspace(0, size, wanted, endpoint=False)]


def blocks_of(rows: Rows, scores: RowLogits, block_size: int | None) -> tuple[Rows, list[slice]]:
    """The rows on the device of the scores, and the slices to read them in."""
    probe_1V = scores.logits(slice(0, 1))
    size = block_size or max(16, BLOCK_ELEMENTS // probe_1V.shape[1])
    device = probe_1V.device
    return rows.to(device), [
        slice(at, min(at + size, len(rows))) for at in range(0, len(rows), size)
    ]


def measure(logp_nV: Tensor, labels_n: Tensor) -> dict[str, Tensor]:
    """NLL, entropy, confidence and most likely token of (n, V) log-probabilities, each (n,)."""
    confidence_n, top1_n = logp_nV.max(1)
    return {
        "nll": -logp_nV.gather(1, labels_n[:, None]).squeeze(1),
        "entropy": torch.special.entr(logp_nV.exp()).sum(1),
        "confidence": confidence_n.exp(),
        "top1": top1_n,
        "is_correct": top1_n == labels_n,
    }


def forward_kl(target_logp_nV: Tensor, logp_nV: Tensor) -> Tensor:
    """KL(target || model) = sum_v P (log P - log Q), (n, V) twice -> (n,) in nats; 0 log 0 = 0."""
    target_nV = target_logp_nV.exp()
    terms_nV = target_nV * (target_logp_nV - logp_nV)
    return torch.where(target_nV > 0, terms_nV, torch.zeros_like(terms_nV)).sum(1)


def _measure_rows(
    columns: dict[str, Columns],
    scores: Mapping[str, TeacherRows],
    fused_of: Callable[[Rows], FusedTarget] | None,
    rows: Rows,
    block_size: int | None,
) -> None:
    """Measure everyone on the rows of one batch; the head of a teacher is applied here and in the fusion."""
    rows, blocks = blocks_of(rows, next(iter(scores.values())).scores, block_size)
    fused = None if fused_of is None else fused_of(rows)
    for block in blocks:
        labels_n = rows.labels[block]
        target_nV = None
        if fused is not None:
            target_nV = fused.block(block).logp_nV
            _append(columns, FUSED, measure(target_nV, labels_n), target_nV, target_nV)
        for name, answer in scores.items():
            logp_nV = answer.scores.logits(block).to(labels_n.device).log_softmax(1)
            _append(columns, name, measure(logp_nV, labels_n), logp_nV, target_nV)


def _append(
    columns: dict[str, Columns],
    name: str,
    measured: dict[str, Tensor],
    logp_nV: Tensor,
    target_nV: Tensor | None,
) -> None:
    if target_nV is not None:
        measured["kl"] = forward_kl(target_nV, logp_nV)
    for key, values_n in measured.items():
        kept_n = values_n.float() if values_n.is_floating_point() else values_n
        columns.setdefault(name, {}).setdefault(key, []).append(kept_n.cpu())


def _metrics(
    name: str, columns: Mapping[str, Columns], teachers: Sequence[str], targets: Targets
) -> Metrics:
    own = {key: torch.cat(parts).numpy() for key, parts in columns[name].items()}
    if np.isnan(own["nll"]).any():
        raise ModelError(
            f"model `{name}`: got log-probabilities that are not numbers; must be finite; "
            "load it in float32 or bfloat16 and check its weights"
        )
    agrees = {other: own["top1"] == _top1(columns, other) for other in teachers}
    return Metrics(
        name=name,
        targets=targets,
        nll_N=own["nll"],
        entropy_N=own["entropy"],
        confidence_N=own["confidence"],
        is_correct_N=own["is_correct"],
        kl_to_fused_N=own.get("kl"),
        agrees_fused_N=own["top1"] == _top1(columns, FUSED) if FUSED in columns else None,
        agrees_N=agrees,
    )


def _top1(columns: Mapping[str, Columns], name: str) -> np.ndarray:
    return torch.cat(columns[name]["top1"]).numpy()


def _domain_indices(dataset: PackedDataset) -> list[int]:
    """Index into `dataset.domains` of each document of the dataset."""
    number = {domain: index for index, domain in enumerate(dataset.domains)}
    return [
        number[domain] if isinstance(domain, str) else int(domain)
        for domain in dataset.sample_domains
    ]


def _numpy(parts: Sequence[Tensor]) -> np.ndarray:
    return torch.cat(list(parts)).numpy().astype(np.int64)
