"""Records of one training step: batches, their rows, the student's head and the summed loss.

Shapes: B batch, T time, N rows (the trained positions of a batch), n block of rows, V vocabulary,
K teachers, D width of a model's hidden states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from collegium.errors import DataError
from collegium.options import Tensor, torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")

IGNORE = -100
"""Label of a token that is not trained on, as in Hugging Face datasets."""


def is_row(labels: Tensor, position_ids: Tensor) -> Tensor:
    """Mask of the predicted tokens: targets that do not start a document.

    (..., T), (..., T) -> (..., T - 1) bool, for the tokens from the second on.
    """
    return (labels[..., 1:] != IGNORE) & (position_ids[..., 1:] > 0)


def domain_number(name: str) -> int:
    """63 bits of the SHA-256 of a domain's name, the same number in every data set."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


teacher_number = domain_number
"""The number of a teacher that a document names, never 0."""


def map_tensors(record: Record, function: Callable[[Tensor], Tensor]) -> Record:
    """Apply a function to each tensor of a dataclass, and of the mappings and records in it."""

    def mapped(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: mapped(item) for key, item in value.items()}
        if is_dataclass(value) and not isinstance(value, type):
            return map_tensors(value, function)
        return function(value) if isinstance(value, torch.Tensor) else value

    return replace(record, **{f.name: mapped(getattr(record, f.name)) for f in fields(record)})


def join_tensors(parts: Sequence[Record], join: Callable[[list[Tensor]], Tensor]) -> Record:
    """Join each field of records of tensors. A field is None where that of any part is."""
    joined: dict[str, Any] = {}
    for name in (f.name for f in fields(parts[0])):
        column = [getattr(part, name) for part in parts]
        joined[name] = None if any(tensor is None for tensor in column) else join(column)
    return replace(parts[0], **joined)


@dataclass(frozen=True, slots=True)
class Rows:
    """The N trained positions of a batch. Every later tensor is (N, ...).

    Rows are in document order, and the rows of one document are contiguous.
    """

    index: Tensor
    """(N,) int64: position in the flattened B*T whose hidden state predicts the label."""
    labels: Tensor
    """(N,) int64: the token to predict."""
    documents: Tensor
    """(N,) int64: the stretch of one document inside one window."""
    samples: Tensor
    """(N,) int64: the number of the document in its dataset."""
    domains: Tensor | None = None
    """(N,) int64: `domain_number` of the document's domain. None for data without domains."""
    teachers: Tensor | None = None
    """(N,) int64: `teacher_number` of the teacher that the document names, 0 for none."""

    def __len__(self) -> int:
        return self.labels.shape[0]

    def part(self, which: slice | Tensor) -> Rows:
        """The rows of a slice, a mask or indices, in their order."""
        return map_tensors(self, lambda tensor_N: tensor_N[which])

    @classmethod
    def cat(cls, parts: Sequence[Rows]) -> Rows:
        """Concatenate rows. Document numbers are kept as they are."""
        return join_tensors(parts, torch.cat)

    def to(self, device: torch.device) -> Rows:
        """The same rows on another device."""
        return map_tensors(self, lambda tensor_N: tensor_N.to(device))


@dataclass(frozen=True, slots=True)
class Batch:
    """A collated batch. `position_ids` separate documents: they restart at 0 at each of them."""

    input_ids: Tensor
    """(B, T) int64."""
    position_ids: Tensor
    """(B, T) int64. Padding is one more document at the end of a window."""
    labels: Tensor
    """(B, T) int64, not shifted: the token's own id for a target, else `IGNORE`."""
    sample_ids: Tensor
    """(B, T) int64: number of the document in its dataset, -1 for padding."""
    domain_ids: Tensor | None = None
    """(B, T) int64: `domain_number` of the document's domain. None for data without domains."""
    teacher_ids: Tensor | None = None
    """(B, T) int64: `teacher_number` of the teacher that the document names, 0 for none."""

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Tensor]) -> Batch:
        """Read the output of our collator, or of one for Hugging Face causal language models.

        Of the latter, `attention_mask` marks padding, on either side. `position_ids` default to the
        place in the row, and `sample_ids` to the number of the row. Other keys are ignored.

        Raises:
            DataError: `input_ids` or `labels` is missing, or a mask is not (B, T).
        """
        if missing := [name for name in ("input_ids", "labels") if name not in inputs]:
            raise DataError(
                f"batch: got {', '.join(inputs)}; must have `{missing[0]}`; use a collator for "
                "causal language models"
            )
        ids_BT, labels_BT = inputs["input_ids"], inputs["labels"]
        if {"sample_ids", "position_ids"} <= inputs.keys() and "attention_mask" not in inputs:
            position_BT, sample_BT = inputs["position_ids"], inputs["sample_ids"]
        else:
            position_BT, sample_BT = _positions(inputs)
            labels_BT = labels_BT.masked_fill((sample_BT < 0) | (position_BT == 0), IGNORE)
        numbers = inputs.get("domain_ids"), inputs.get("teacher_ids")
        return cls(ids_BT, position_BT, labels_BT, sample_BT, *numbers)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return map_tensors(self, lambda tensor_BT: tensor_BT.to(device))

    def part(self, windows: Tensor) -> Batch:
        """The windows at (b,) indices."""
        return map_tensors(self, lambda tensor_BT: tensor_BT[windows])

    def num_rows(self) -> Tensor:
        """Scalar int64: the number of rows."""
        return is_row(self.labels, self.position_ids).sum()

    def rows(self) -> Rows:
        """Choose the trained positions: token t is predicted from t - 1 of the same document."""
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


def _positions(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(B, T) positions that restart at 0 at every change of the mask, and sample numbers."""
    ids_BT = inputs["input_ids"]
    mask_BT = inputs.get("attention_mask", torch.ones_like(ids_BT))
    if mask_BT.shape != ids_BT.shape:
        raise DataError(
            f"batch: got an attention_mask of shape {tuple(mask_BT.shape)}; must be "
            f"{tuple(ids_BT.shape)}; separate documents by position_ids"
        )
    is_start_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    is_start_BT[:, 1:] = mask_BT[:, 1:] != mask_BT[:, :-1]
    if "position_ids" in inputs:
        # Packed documents restart inside of a run of tokens; the run itself starts at 0.
        is_start_BT |= (mask_BT != 0) & (inputs["position_ids"] == 0)
    place_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    position_BT = place_BT - torch.where(is_start_BT, place_BT, 0).cummax(1).values
    row_B1 = torch.arange(ids_BT.shape[0], device=ids_BT.device)[:, None]
    sample_BT = inputs.get("sample_ids", row_B1.expand_as(ids_BT))
    return position_BT, sample_BT.masked_fill(mask_BT == 0, -1)


@dataclass(frozen=True, slots=True)
class Head:
    """The last layer of a language model: hidden states to logits over the V shared tokens.

    logits = cap * tanh(scale * (h W^T + b) / cap), without the tanh for `softcap` None.
    """

    weight: Tensor
    """(V, D), without padding rows."""
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
        """Scale and cap the product: (n, V) -> (n, V), in float32 or wider."""
        logits_nV = raw_nV.to(torch.promote_types(raw_nV.dtype, torch.float32))
        if self.scale != 1.0:
            logits_nV = logits_nV * self.scale
        if self.softcap is not None:
            logits_nV = self.softcap * torch.tanh(logits_nV / self.softcap)
        return logits_nV


@dataclass(frozen=True, slots=True)
class AttentionStates:
    """Queries, keys and values of one layer at all M = B T positions of a batch.

    They are those that the layer attends with, after rotary embedding and normalization.
    score(t, s) = scale q_t k_s, or cap * tanh(score / cap) with a cap, for s <= t of one document.
    """

    query: Tensor
    """(M, H, d)"""
    key: Tensor
    """(M, J, d): each of J heads serves H / J heads of queries."""
    value: Tensor
    """(M, J, d)"""
    starts: Tensor
    """(M,) int64: the position where the document of each position starts."""
    scale: float
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss summed over N rows. Only the trainer normalizes it."""

    total: Tensor
    """Scalar with a graph: the sum over terms of weight times value."""
    terms: Mapping[str, Tensor]
    """Unweighted sum over the rows of each term, detached."""
    weights: Mapping[str, float]
    """The factor of each term in `total`."""
    grad_norms: Mapping[str, Tensor]
    """Norm of each weighted term's gradient at the hidden states it reads. Empty if unmeasured."""
    rows: Rows
    teacher_weights_KN: Tensor | None = None
    """(K, N) fusion weights, detached. None without teachers."""
    conflict: Mapping[str, Tensor] = field(default_factory=dict)
    """(N,) measurements of a conflict policy in [0, 1], by name. Empty without one."""
    nll: Tensor | None = None
    """Sum of -log softmax(z)_label, whatever the terms. None where gradients are computed."""

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.rows)

    def with_term(self, name: str, value: Tensor, weight: float) -> LossSum:
        """Add a term, given as a mean over the rows, with a graph."""
        summed = value * self.num_rows
        return replace(
            self,
            total=self.total + weight * summed,
            terms={**self.terms, name: summed.detach()},
            weights={**self.weights, name: weight},
        )
