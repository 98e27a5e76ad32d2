"""The records that flow through one training step, and the protocols of the exchangeable parts.

Shapes: B batch, T time, N rows (the trained positions of a batch), n block of rows, V vocabulary,
K teachers, D width of a model's hidden states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from pydantic import ConfigDict
from torch import Tensor

IGNORE = -100
"""Label of a token that is not trained on, as in Hugging Face datasets."""

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
"""Configuration of every option class: `@dataclass(frozen=True, kw_only=True, config=STRICT)` of pydantic."""


def is_row(labels: Tensor, position_ids: Tensor) -> Tensor:
    """Which tokens but the first are predicted: targets that do not begin a document; (..., T) twice -> (..., T - 1) bool."""
    return (labels[..., 1:] != IGNORE) & (position_ids[..., 1:] > 0)


def domain_number(name: str) -> int:
    """A domain as a number that every data set agrees on: 63 bits of the SHA-256 of its name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def teacher_number(name: str) -> int:
    """A teacher that a row of text is meant for, as a number: made like `domain_number`, so that never 0."""
    return domain_number(name)


@dataclass(frozen=True, slots=True)
class Rows:
    """The N trained positions of a batch, chosen once; every later tensor is (N, ...).

    Rows stand in document order, and the rows of one document are contiguous.
    """

    index: Tensor
    """(N,) int64: position, in the flattened B*T, whose hidden state predicts the label."""
    labels: Tensor
    """(N,) int64: the token to predict."""
    documents: Tensor
    """(N,) int64: which stretch of one document inside one window the row belongs to."""
    samples: Tensor
    """(N,) int64: the number of the document in its dataset, for messages and statistics per domain."""
    domains: Tensor | None = None
    """(N,) int64: `domain_number` of the document's domain; None where the data says nothing of domains."""
    teachers: Tensor | None = None
    """(N,) int64: `teacher_number` of the teacher that the document names, 0 where it names none; None where no document does."""

    def __len__(self) -> int:
        return self.labels.shape[0]

    def part(self, which: slice | Tensor) -> Rows:
        """Some of the rows, chosen by a slice, a mask or indices, in their order."""
        return Rows(
            self.index[which],
            self.labels[which],
            self.documents[which],
            self.samples[which],
            None if self.domains is None else self.domains[which],
            None if self.teachers is None else self.teachers[which],
        )

    def to(self, device: torch.device) -> Rows:
        """The same rows on another device."""
        return Rows(
            self.index.to(device),
            self.labels.to(device),
            self.documents.to(device),
            self.samples.to(device),
            None if self.domains is None else self.domains.to(device),
            None if self.teachers is None else self.teachers.to(device),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """A collated batch. Documents are kept apart by `position_ids`, which restart at 0 at each of them."""

    input_ids: Tensor
    """(B, T) int64."""
    position_ids: Tensor
    """(B, T) int64; padding is one more document at the end of a window."""
    labels: Tensor
    """(B, T) int64, not shifted: the token's own id where it is a target, `IGNORE` elsewhere."""
    sample_ids: Tensor
    """(B, T) int64: number of the document in its dataset, -1 for padding."""
    domain_ids: Tensor | None = None
    """(B, T) int64: `domain_number` of the document's domain; None where the data says nothing of domains."""
    teacher_ids: Tensor | None = None
    """(B, T) int64: `teacher_number` of the teacher that the document names, 0 where it names none; None where no document does."""

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Tensor]) -> Batch:
        """Read the tensors out of what a data loader yields; other keys are ignored."""
        return cls(
            inputs["input_ids"],
            inputs["position_ids"],
            inputs["labels"],
            inputs["sample_ids"],
            inputs.get("domain_ids"),
            inputs.get("teacher_ids"),
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.labels.to(device),
            self.sample_ids.to(device),
            None if self.domain_ids is None else self.domain_ids.to(device),
            None if self.teacher_ids is None else self.teacher_ids.to(device),
        )

    def part(self, windows: Tensor) -> Batch:
        """Some of the windows, chosen by (b,) indices."""
        return Batch(
            self.input_ids[windows],
            self.position_ids[windows],
            self.labels[windows],
            self.sample_ids[windows],
            None if self.domain_ids is None else self.domain_ids[windows],
            None if self.teacher_ids is None else self.teacher_ids[windows],
        )

    def rows(self) -> Rows:
        """Choose the trained positions: token t is predicted from t - 1 of the same document, never a first token."""
        batch_size, length = self.input_ids.shape
        is_target = is_row(self.labels, self.position_ids)
        starts = self.position_ids == 0
        starts[:, 0] = True
        document_BT = starts.flatten().cumsum(0).view(batch_size, length) - 1
        row, column = is_target.nonzero(as_tuple=True)
        return Rows(
            index=row * length + column,
            labels=self.labels[row, column + 1],
            documents=document_BT[row, column + 1],
            samples=self.sample_ids[row, column + 1],
            domains=None if self.domain_ids is None else self.domain_ids[row, column + 1],
            teachers=None if self.teacher_ids is None else self.teacher_ids[row, column + 1],
        )


@dataclass(frozen=True, slots=True)
class Head:
    """The last layer of a language model: hidden states to logits over the V tokens of the shared vocabulary.

    logits = cap * tanh(scale * (h W^T + b) / cap), without the tanh where `softcap` is None.
    """

    weight: Tensor
    """(V, D), pad rows already cut off."""
    bias: Tensor | None = None
    """(V,)"""
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_nD: Tensor) -> Tensor:
        """(n, D) -> (n, V), in float32 or wider."""
        raw_nV = torch.nn.functional.linear(hidden_nD.to(self.weight.dtype), self.weight, self.bias)
        return self.finish(raw_nV)

    def scaled(self, factor: float) -> Head:
        """The head whose logits are `factor` times those of this one."""
        cap = None if self.softcap is None else self.softcap * factor
        return replace(self, scale=self.scale * factor, softcap=cap)

    def finish(self, raw_nV: Tensor) -> Tensor:
        """Scale and cap what the linear map gave: (n, V) -> (n, V), in float32 or wider."""
        logits_nV = raw_nV.to(torch.promote_types(raw_nV.dtype, torch.float32))
        if self.scale != 1.0:
            logits_nV = logits_nV * self.scale
        if self.softcap is not None:
            logits_nV = self.softcap * torch.tanh(logits_nV / self.softcap)
        return logits_nV


class RowLogits(Protocol):
    """Anything that gives the logits of a block of rows; what it keeps in memory is its own affair."""

    def logits(self, block: slice) -> Tensor:
        """(n, V) logits of the rows in `block`, in float32 or wider."""
        ...


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """Hidden states of N rows and the head that turns them into logits."""

    hidden: Tensor
    """(N, D) after the final norm: what the head reads."""
    head: Head
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Tapped hidden states by name (`embed`, `layer_0` ..., `final_prenorm`, `final_postnorm`), each (N, D)."""

    def logits(self, block: slice) -> Tensor:
        return self.head.logits(self.hidden[block])


@dataclass(frozen=True, slots=True)
class DenseRows:
    """Logits of N rows, held whole; for small vocabularies and tests."""

    logits_NV: Tensor

    def logits(self, block: slice) -> Tensor:
        logits_nV = self.logits_NV[block]
        return logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))


@dataclass(frozen=True, slots=True)
class SparseRows:
    """Target distributions of N rows that name E tokens in all, in compressed rows: row r owns entries starts[r] to starts[r+1].

    Without a tail, a row's entries sum to 1. With a tail, the entries and the tail do: all other tokens together.
    """

    starts: Tensor
    """(N + 1,) int64."""
    ids: Tensor
    """(E,) int64: no token twice in a row."""
    logp: Tensor
    """(E,) log-probabilities, float32 or wider."""
    log_tail: Tensor | None
    """(N,) log of the mass of all tokens that are not named, or None where that mass is zero by construction."""
    vocab_size: int

    def __len__(self) -> int:
        return self.starts.shape[0] - 1

    def to(self, device: torch.device) -> SparseRows:
        """The same rows on another device."""
        tail = None if self.log_tail is None else self.log_tail.to(device)
        return SparseRows(
            self.starts.to(device), self.ids.to(device), self.logp.to(device), tail, self.vocab_size
        )

    def block(self, block: slice) -> SparseRows:
        """The rows of `block`, which may leave some out by its step."""
        start, stop, step = block.indices(len(self))
        if step != 1:
            return self._spread(block)
        starts = self.starts[start : stop + 1]
        entries = slice(int(starts[0]), int(starts[-1]))
        tail = None if self.log_tail is None else self.log_tail[start:stop]
        return SparseRows(
            starts - starts[0], self.ids[entries], self.logp[entries], tail, self.vocab_size
        )

    def _spread(self, block: slice) -> SparseRows:
        """The rows that a step above 1 leaves."""
        is_kept = torch.zeros(len(self), dtype=torch.bool, device=self.starts.device)
        is_kept[block] = True
        is_kept_E = is_kept[self.row_of_entry()]
        sizes = self.starts.diff()[block]
        starts = torch.cat([self.starts.new_zeros(1), sizes.cumsum(0)])
        tail = None if self.log_tail is None else self.log_tail[block]
        return SparseRows(starts, self.ids[is_kept_E], self.logp[is_kept_E], tail, self.vocab_size)

    def row_of_entry(self) -> Tensor:
        """(E,) int64: the row that owns each entry."""
        rows = torch.arange(len(self), device=self.starts.device)
        return rows.repeat_interleave(self.starts.diff(), output_size=self.ids.shape[0])

    def logits(self, block: slice) -> Tensor:
        """(n, V) log-probabilities, -inf for tokens without mass; a tail is spread evenly, as a reader must guess it."""
        part = self.block(block)
        log_rest_n1 = torch.full((len(part), 1), -torch.inf, dtype=self.logp.dtype)
        log_rest_n1 = log_rest_n1.to(self.logp.device)
        if part.log_tail is not None:
            num_others = (self.vocab_size - part.starts.diff()).clamp(min=1)
            log_rest_n1 = (part.log_tail - num_others.log()).to(self.logp.dtype)[:, None]
        logp_nV = log_rest_n1.repeat(1, self.vocab_size)
        logp_nV[part.row_of_entry(), part.ids] = part.logp
        return logp_nV


@dataclass(frozen=True, slots=True)
class StoredRows:
    """What a cache keeps of one teacher at N rows: a distribution to be fused, at temperature 1 and at a few others."""

    rows: SparseRows
    """Draws, or the top k with their tail, at temperature 1."""
    logp: Tensor
    """(E,) log-probability of each entry at temperature 1."""
    label_logp_N: Tensor
    """(N,) log-probability of the label at temperature 1."""
    max_logp_N: Tensor
    """(N,) the same of the most likely token."""
    entropy: Mapping[float, Tensor]
    """Temperature -> (N,) nats; 1 is among them."""
    log_z: Mapping[float, Tensor]
    """Temperature T other than 1 -> (N,) log sum_v P(v)^(1/T)."""

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> StoredRows:
        """The same rows on another device."""
        return StoredRows(
            self.rows.to(device),
            self.logp.to(device),
            self.label_logp_N.to(device),
            self.max_logp_N.to(device),
            {value: entropy_N.to(device) for value, entropy_N in self.entropy.items()},
            {value: log_z_N.to(device) for value, log_z_N in self.log_z.items()},
        )

    def logits(self, block: slice) -> Tensor:
        """(n, V) log-probabilities at temperature 1 as far as they are kept; see `SparseRows.logits`."""
        return self.rows.logits(block)


StudentRows = HiddenRows


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """What one teacher says about N rows, in the student's vocabulary."""

    name: str
    scores: RowLogits
    """Its distributions; `SparseRows` are a finished target, not one to be fused, and `StoredRows` fuse with their like."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    answered: Tensor | None = None
    """(m,) int64, ascending: the rows that `scores` speaks of, in their order, where the others were not asked for; None for all."""


class Teacher(Protocol):
    """A frozen model, or anything that answers in its place."""

    @property
    def name(self) -> str: ...

    @property
    def provides(self) -> frozenset[str]:
        """Of `dense` (full distributions) and `features` (hidden states); asked before a run starts."""
        ...

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> TeacherRows:
        """Score the rows without gradient; `taps` names the hidden states to return.

        Logits and features are on the device of the batch, wherever the teacher computes them.
        """
        ...


class Divergence(Protocol):
    """A distance between two distributions per row."""

    def __call__(self, target_logp_nV: Tensor, student_logp_nV: Tensor) -> Tensor:
        """(n, V), (n, V) log-probabilities -> (n,) in nats."""
        ...


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss summed over N rows; nobody but the trainer divides it."""

    total: Tensor
    """Scalar with a graph: the sum over terms of weight times value."""
    terms: Mapping[str, Tensor]
    """Unweighted sum over the rows of each term, detached."""
    weights: Mapping[str, float]
    """The factor of each term in `total`."""
    grad_norms: Mapping[str, Tensor]
    """Norm of each weighted term's gradient at the hidden states it reads; empty unless asked for."""
    num_rows: int
    teacher_weights_KN: Tensor | None = None
    """(K, N) fusion weights, detached; None without teachers."""
    conflict: Mapping[str, Tensor] = field(default_factory=dict)
    """What a conflict policy saw and did, by name, each (N,) in [0, 1]; empty without a policy."""
