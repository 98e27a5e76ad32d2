"""Teacher-forced scoring of models against the text and the fused target in one pass.

Shapes: N rows (target tokens) of a batch, n block of rows, V vocabulary, K teachers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from collegium.console import OnProgress
from collegium.data.collate import Collator
from collegium.data.windows import PackedDataset
from collegium.distributions import Answer, Distribution, Teacher
from collegium.errors import CollegiumError, ModelError
from collegium.evaluate.metrics import Metrics, ScoredTokens
from collegium.fusion.buffered import buffer_rows, buffered, strips_of, vocab_size_of
from collegium.fusion.fuse import Fusion, Target, fuse
from collegium.kernels.rows import Workspace, floor_, top_tokens
from collegium.models.loading import choose_device
from collegium.storage.records import ModelInfo, ResultRow
from collegium.types import Batch, Rows

FUSED = "fused target"
"""Name of the row of the fused target."""

KINDS = ("untouched", "teacher", "fused", "control", "student")
"""Kinds of models in the order of results.json."""

BLOCK_ELEMENTS = 2**23
"""Elements of one (n, V) buffer if no block size is given: 32 MiB in float32."""


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a dataset that are scored."""

    dataset: PackedDataset
    """Packed or padded documents."""
    indices: Sequence[int]
    batch_size: int
    """Windows per forward pass."""
    progress: OnProgress | None = None
    """Called with the numbers of finished and of all batches."""

    @classmethod
    def spread(
        cls,
        dataset: PackedDataset,
        batch_size: int,
        max_tokens: int | None = None,
        progress: OnProgress | None = None,
    ) -> Windows:
        """Choose windows with about `max_tokens` targets, evenly spread. None chooses all."""
        return cls(dataset, spread_windows(dataset, max_tokens), batch_size, progress)

    def counts(self) -> np.ndarray:
        """Count the target tokens of each window."""
        return self.dataset.targets_per_window()[list(self.indices)]

    def batches(self) -> Iterator[tuple[Batch, Rows, ScoredTokens]]:
        """Yield the batches with their rows in order, skipping those without targets."""
        chosen = Subset(self.dataset, self.indices)
        loader = DataLoader(chosen, batch_size=self.batch_size, collate_fn=Collator())
        # Teachers put logits on the device of the batch. On the CPU, every block would be copied.
        device = choose_device("auto")
        report = self.progress or (lambda done, total: None)
        report(0, len(loader))
        for step, inputs in enumerate(loader):
            batch = Batch.from_inputs(inputs)
            rows = batch.rows()
            if len(rows):
                samples_N = rows.samples.numpy()
                num_bytes_N = inputs["num_bytes"].flatten()[rows.index + 1].numpy()
                domains_N = self.dataset.sample_domains[samples_N]
                domains = tuple(self.dataset.domains)
                tokens = ScoredTokens(samples_N, domains_N, num_bytes_N, domains)
                yield batch.to(device), rows.to(device), tokens
            report(step + 1, len(loader))

    def answers(
        self, scorers: Sequence[Teacher]
    ) -> Iterator[tuple[list[Answer], Rows, ScoredTokens]]:
        """Yield the answers of all scorers per batch, and its rows on the same device."""
        for batch, rows, tokens in self.batches():
            answers = [scorer.score(batch, rows) for scorer in scorers]
            # Only logits reveal the device of a scorer: read one row.
            yield answers, rows.to(answers[0].distribution.logits(slice(0, 1)).device), tokens


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
    windows: Windows,
    *,
    with_acceptance: bool = True,
) -> dict[str, Metrics]:
    """Score every model and the fused target of the teachers in one pass.

    A model that is also a teacher is scored once. Rows are processed in blocks, so no [N, V] tensor
    is materialized.

    Args:
        models: models that get a row in the result, in this order.
        teachers: members of the fusion. Agreement is measured with each of them.
        fusion: how the teachers are fused. None skips the fused target and all distances to it.
        windows: the text to score.
        with_acceptance: whether to measure the acceptance of each other model as draft of each
            teacher, which takes one more exponential per token of the vocabulary and pair.

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
    teacher_names = [teacher.name for teacher in teachers]
    values: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    workspace, pooled = Workspace(), Workspace()
    # All that is kept of a batch: keeping batches would hold the dataset in GPU memory.
    tokens: list[ScoredTokens] = []
    with torch.no_grad():
        for answers, rows, batch_tokens in windows.answers(scorers):
            vocab_size = vocab_size_of(answers[0].distribution)
            answers = buffered(answers, buffer_rows(vocab_size))
            by_name = {answer.name: answer for answer in answers}
            members = [by_name[name] for name in teacher_names]
            fused = None if fusion is None else fuse(fusion, members, rows, workspace=pooled)
            measures = _BatchMeasures(
                answers, teacher_names, fused, rows.labels, workspace, with_acceptance
            )
            for block in strips_of(slice(0, len(rows)), vocab_size, rows.labels.device):
                measures.read(block)
            tokens.append(batch_tokens)
            for key, value_N in measures.columns.items():
                values[key].append(value_N)
    targets = ScoredTokens.cat(tokens)
    arrays = {key: torch.cat(parts).numpy() for key, parts in values.items()}
    names = [model.name for model in models] + ([FUSED] if fusion is not None else [])
    return {name: _metrics(name, arrays, teacher_names, targets) for name in names}


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


def spread_windows(dataset: PackedDataset, max_tokens: int | None) -> list[int]:
    """Return evenly spread windows with about `max_tokens` targets in total, or all for None."""
    return spread(dataset.targets_per_window(), max_tokens)


def spread(counts: Sequence[int] | np.ndarray, max_tokens: int | None) -> list[int]:
    """Return evenly spread indices of about `max_tokens` of these counts, or all for None."""
    size = len(counts)
    if max_tokens is None or size == 0:
        return list(range(size))
    # Evenly spread, so that an ordered dataset is represented by all of its domains.
    num_kept = max(1, min(size, round(size * max_tokens / max(1, sum(counts)))))
    return [int(at) for at in np.linspace(0, size, num_kept, endpoint=False)]


def blocks_of(rows: Rows, scores: Distribution, block_size: int | None = None) -> list[slice]:
    """Return the slices to read rows in, by default about 32 MiB of logits each."""
    # Only logits reveal the vocabulary size of a scorer: read one row.
    size = block_size or max(16, BLOCK_ELEMENTS // scores.logits(slice(0, 1)).shape[1])
    return [slice(at, min(at + size, len(rows))) for at in range(0, len(rows), size)]


def row_measures(
    logp_nV: Tensor,
    labels_n: Tensor,
    workspace: Workspace,
    target: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Measure (n, V) log-probabilities against the labels and those of a fused target.

    Those of -inf are overwritten. `target` has its (n, V) finite log-probabilities, and its
    probabilities.

    Returns: NLL, entropy, confidence and top-1 token, and KL with a target, each (n,).
    """
    # Buffers: fresh ones, between the columns that are kept, would fragment the heap to gigabytes.
    scratch_nV = workspace.matrix("measure", logp_nV.shape, logp_nV)
    nll_n, top1_n = -logp_nV.gather(1, labels_n[:, None]).squeeze(1), top_tokens(logp_nV)
    floor_(logp_nV)  # so that 0 log 0 = 0
    measures = {
        "nll": nll_n,
        "entropy": -torch.exp(logp_nV, out=scratch_nV).mul_(logp_nV).sum(1),
        "confidence": logp_nV.gather(1, top1_n[:, None]).squeeze(1).exp(),
        "top1": top1_n,
        "is_correct": top1_n == labels_n,
    }
    if target is not None:
        # KL(target || model) = sum_v P (log P - log Q).
        target_nV, prob_nV = target
        difference_nV = torch.sub(target_nV, logp_nV, out=scratch_nV)
        measures["kl"] = difference_nV.mul_(prob_nV).sum(1)
    return measures


def acceptance(target_logp_nV: Tensor, draft_logp_nV: Tensor) -> Tensor:
    """Return the probability that the target keeps a token drawn from the draft model, (n,).

    sum_v min(P_v, Q_v) for target P and draft Q: speculative sampling keeps token v with
    probability min(1, P_v / Q_v).

    Source: Leviathan et al. 2023, arXiv 2211.17192, theorem 3.5 and corollary 3.6.
    """
    return torch.minimum(target_logp_nV, draft_logp_nV).exp().sum(1)


@dataclass(eq=False)
class _BatchMeasures:
    """Measures of all models at the rows of one batch, written block by block."""

    answers: Sequence[Answer]
    teachers: Sequence[str]
    fused: Target | None
    labels_N: Tensor
    workspace: Workspace
    with_acceptance: bool
    columns: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(model, measure) -> (N,) values, on the CPU."""

    def read(self, block: slice) -> None:
        """Measure all models on one block of rows."""
        target, teachers = None, self.teachers
        if self.fused is not None:
            logp_nV = self.fused.block(block).logp()
            prob_nV = self.workspace.matrix("target", logp_nV.shape, logp_nV)
            target = logp_nV, torch.exp(logp_nV, out=prob_nV)
            self._measure(FUSED, block, logp_nV, target)
        # A teacher that was fused has its logits in a buffer.
        # Drafts come after the teachers, whose blocks stay in memory for them.
        has_drafts = self.with_acceptance and any(a.name not in teachers for a in self.answers)
        targets: dict[str, Tensor] = {}
        for answer in sorted(self.answers, key=lambda answer: answer.name not in teachers):
            is_kept = has_drafts and answer.name in teachers
            logits_nV = answer.distribution.logits(block).to(self.labels_N.device)
            buffer = f"logp/{answer.name}" if is_kept else "logp"
            logp_nV = self.workspace.matrix(buffer, logits_nV.shape, logits_nV)
            torch.log_softmax(logits_nV, 1, out=logp_nV)
            self._measure(answer.name, block, logp_nV, target)
            if is_kept:
                targets[answer.name] = logp_nV
                continue
            for name, target_logp_nV in targets.items():
                rate_n = acceptance(target_logp_nV, logp_nV)
                self._write(answer.name, f"acceptance/{name}", block, rate_n)

    def _measure(
        self, name: str, block: slice, logp_nV: Tensor, target: tuple[Tensor, Tensor] | None
    ) -> None:
        measures = row_measures(logp_nV, self.labels_N[block], self.workspace, target)
        for measure, value_n in measures.items():
            self._write(name, measure, block, value_n)

    def _write(self, name: str, measure: str, block: slice, value_n: Tensor) -> None:
        # One column per batch. Small tensors that are kept of each block split the free memory
        # between the large ones: 3 GB in a preflight of 1,000 tokens at V = 49,152.
        key = name, measure
        if key not in self.columns:
            dtype = torch.float32 if value_n.is_floating_point() else value_n.dtype
            self.columns[key] = torch.empty(len(self.labels_N), dtype=dtype)
        self.columns[key][block] = value_n.to(self.columns[key])


def _metrics(
    name: str,
    values: Mapping[tuple[str, str], np.ndarray],
    teachers: Sequence[str],
    targets: ScoredTokens,
) -> Metrics:
    if np.isnan(values[name, "nll"]).any():
        raise ModelError(
            f"model `{name}`: got NaN log-probabilities; must be finite; "
            "load it in float32 or bfloat16 and check its weights"
        )
    top1_N, fused_N = values[name, "top1"], values.get((FUSED, "top1"))
    return Metrics(
        targets=targets,
        nll_N=values[name, "nll"],
        entropy_N=values[name, "entropy"],
        confidence_N=values[name, "confidence"],
        is_correct_N=values[name, "is_correct"],
        kl_to_fused_N=values.get((name, "kl")),
        agrees_fused_N=None if fused_N is None else top1_N == fused_N,
        agrees_N={other: top1_N == values[other, "top1"] for other in teachers},
        acceptance_N={
            other: values[name, key]
            for other in teachers
            if (name, key := f"acceptance/{other}") in values
        },
    )
