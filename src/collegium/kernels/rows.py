"""What the kernels read and write, and the operations that every backend has.

Shapes: n rows of one block, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from collegium.types import Head

FLOOR_SHARE = 1e-8
"""Log-probabilities of -inf become this share of the dtype's lowest value: finite, with room for a temperature."""


@dataclass(frozen=True, slots=True)
class RawRows:
    """What a head's matrix product gave, and how that becomes logits: z = cap tanh(scale x / cap), without a cap z = scale x.

    A temperature is part of both: z / T has the scale s / T and the cap c / T.
    """

    values_nV: Tensor
    """(n, V) x, in the dtype of the head."""
    scale: float = 1.0
    softcap: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """In which the arithmetic is done: float32, or float64 for float64 values."""
        return torch.promote_types(self.values_nV.dtype, torch.float32)

    def tempered(self, temperature: float) -> RawRows:
        """The same values with z / T for z."""
        if temperature == 1.0:
            return self
        cap = None if self.softcap is None else self.softcap / temperature
        return replace(self, scale=self.scale / temperature, softcap=cap)

    def at_labels(self, labels_n: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of one token per row, and dz/dx there: (n,) -> (n,), (n,)."""
        return self._picked(self.values_nV.gather(1, labels_n[:, None])[:, 0])

    def at(self, row_E: Tensor, ids_E: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of any tokens of any rows, and dz/dx there: (E,), (E,) -> (E,), (E,)."""
        values_M, place_E = self._places(row_E, ids_E)
        return self._picked(values_M.index_select(0, place_E))

    def add_at_(self, row_E: Tensor, ids_E: Tensor, added_E: Tensor) -> None:
        """x += added at any tokens of any rows, in the dtype of the values."""
        values_M, place_E = self._places(row_E, ids_E)
        values_M.index_add_(0, place_E, added_E.to(values_M.dtype))

    def _places(self, row_E: Tensor, ids_E: Tensor) -> tuple[Tensor, Tensor]:
        """All values in one line, with what lies between the rows, and where in it they are: faster than two indices."""
        (num_rows, vocab_size), stride = self.values_nV.shape, self.values_nV.stride(0)
        size = (num_rows - 1) * stride + vocab_size if num_rows else 0
        return self.values_nV.as_strided((size,), (1,)), row_E * stride + ids_E

    def _picked(self, raw_E: Tensor) -> tuple[Tensor, Tensor]:
        raw_E = raw_E.to(self.dtype)
        if self.softcap is None:
            return raw_E * self.scale, torch.full_like(raw_E, self.scale)
        bent_E = torch.tanh(raw_E * (self.scale / self.softcap))
        return self.softcap * bent_E, self.scale * (1.0 - bent_E.square())


@dataclass(frozen=True, slots=True)
class LogSumExp:
    """log sum_v exp z of n rows in two parts, so that log P = (z - max) - log_sum is exact to a rounding for any size of z."""

    max_n: Tensor
    """(n,) max_v z."""
    log_sum_n: Tensor
    """(n,) log sum_v exp(z - max)."""

    def to(self, dtype: torch.dtype) -> LogSumExp:
        """The same in another dtype."""
        return LogSumExp(self.max_n.to(dtype), self.log_sum_n.to(dtype))

    def total(self) -> Tensor:
        """(n,) log sum_v exp z."""
        return self.max_n + self.log_sum_n

    def logp(self, z_n: Tensor) -> Tensor:
        """(n,) finite log-probabilities of one logit per row."""
        return ((z_n - self.max_n) - self.log_sum_n).clamp_(min=floor(z_n.dtype))


@dataclass(frozen=True, slots=True)
class BlockStats:
    """What one sweep over n rows tells, (n,) each, in float32 or wider."""

    log_sum: LogSumExp
    entropy_n: Tensor
    """Nats."""
    label_logp_n: Tensor
    """Log-probability of the label, at least `floor`."""

    @property
    def max_logp_n(self) -> Tensor:
        """Log-probability of the most likely token."""
        return -self.log_sum.log_sum_n


@dataclass(frozen=True, slots=True)
class DenseTarget:
    """One distribution per row: logits with their log-sum, log P, or P itself."""

    rows: RawRows
    kind: Literal["logits", "logp", "prob"]
    log_sum: LogSumExp | None = None
    """Of the rows, where they are logits."""

    @classmethod
    def of_logp(cls, logp_nV: Tensor) -> DenseTarget:
        """From finite, normalized log-probabilities, which `logp_` gives back as they are."""
        return cls(RawRows(logp_nV), "logp")

    def to(self, dtype: torch.dtype) -> DenseTarget:
        """The same target for a student of another dtype."""
        if self.rows.dtype == dtype:
            return self
        rows = replace(self.rows, values_nV=self.rows.values_nV.to(dtype))
        log_sum = None if self.log_sum is None else self.log_sum.to(dtype)
        return DenseTarget(rows, self.kind, log_sum)

    def logp_(self) -> Tensor:
        """(n, V) finite log-probabilities in the place of the values, where their dtype allows; the target is then used up."""
        values_nV = self.rows.values_nV
        if self.kind == "logp":
            return values_nV
        if self.kind == "prob":
            return values_nV.clamp_(min=torch.finfo(values_nV.dtype).tiny).log_()
        logits_nV = to_logits(self.rows, values_nV)
        if logits_nV.is_contiguous() or self.log_sum is None:
            return floor_(torch.log_softmax(logits_nV, -1, out=logits_nV))
        # Into rows with gaps it would have to be copied.
        logits_nV.sub_(self.log_sum.max_n[:, None]).sub_(self.log_sum.log_sum_n[:, None])
        return floor_(logits_nV)


class RowKernels(Protocol):
    """The operations on which all time beside the matrix products is spent."""

    name: str

    def read(self, rows: RawRows, labels_n: Tensor) -> BlockStats:
        """Statistics of n rows; the rows stay as they are."""
        ...

    def add_(
        self,
        pool_nV: Tensor,
        rows: RawRows,
        log_sum: LogSumExp,
        share_n: Tensor | None,
        *,
        is_log: bool,
        unit_n: Tensor | None = None,
        is_last: bool = True,
    ) -> Tensor | None:
        """pool <- (1 - share) pool + share m, with m = P of the rows, or log P for `is_log`; without shares pool <- m.

        A pool of which more comes may be left as multiples of a unit per row, which saves a sweep.

        Args:
            pool_nV: what there is of the pool; written over without shares.
            rows: the member's.
            log_sum: of the rows.
            share_n: (n,) the member's share.
            is_log: whether log-probabilities are pooled.
            unit_n: what the call before returned.
            is_last: whether the pool must be whole.

        Returns:
            (n,) unit: the mean is unit times the pool; None for 1.
        """
        ...

    def softmax_(self, rows: RawRows, log_sum: LogSumExp, factor_n: Tensor) -> None:
        """x <- factor softmax(z) dz/dx: the dense part of the gradient of a loss with a sparse target."""
        ...

    def distill_(
        self,
        rows: RawRows,
        target: DenseTarget | None,
        kd_n: Tensor,
        ce_n: Tensor,
        *,
        temperature: float,
    ) -> tuple[LogSumExp, Tensor]:
        """Forward KL of each row and its gradient at the head's product, with the dense part of that of cross-entropy.

        With Q_T = softmax(z / T): KL_n = sum_v P (log P - log Q_T), and
        x <- [kd_n (Q_T sum_v P - P) / T + ce_n Q_1] dz/dx. What is missing is -ce_n dz/dx at the label.

        Returns:
            The log-sum of the rows, and (n,) KL in nats, zero without a target.
        """
        ...


def floor(dtype: torch.dtype) -> float:
    """The least log-probability: a token that a model rules out must not turn 0 * log 0 into NaN."""
    return FLOOR_SHARE * torch.finfo(dtype).min


def floor_(logp_nV: Tensor) -> Tensor:
    """Make -inf finite in place."""
    return logp_nV.clamp_(min=floor(logp_nV.dtype))


def to_logits(rows: RawRows, out_nV: Tensor) -> Tensor:
    """The logits: in `out_nV` where it has their dtype, else in new memory."""
    if out_nV.dtype != rows.dtype:
        out_nV = torch.empty_like(rows.values_nV, dtype=rows.dtype)
    if out_nV.data_ptr() != rows.values_nV.data_ptr():
        out_nV.copy_(rows.values_nV)
    if rows.softcap is not None:
        return out_nV.mul_(rows.scale / rows.softcap).tanh_().mul_(rows.softcap)
    return out_nV if rows.scale == 1.0 else out_nV.mul_(rows.scale)


def head_product(hidden_nD: Tensor, head: Head, out_nV: Tensor) -> RawRows:
    """Apply a head's matrix, and nothing else, into `out_nV`: no gradient, no new memory of its size."""
    weight_VD = head.weight.detach()
    hidden_nD = hidden_nD.detach().to(weight_VD.dtype)
    for part in spans(weight_VD):
        if head.bias is None:
            torch.mm(hidden_nD, weight_VD[part].T, out=out_nV[:, part])
        else:
            bias_v = head.bias.detach()[part]
            torch.addmm(bias_v, hidden_nD, weight_VD[part].T, out=out_nV[:, part])
    return RawRows(out_nV, head.scale, head.softcap)


def row_alignment_bytes(device: torch.device) -> int:
    """Of what the length of a row of a block is a multiple: a device reads 16 aligned bytes at a time, or one value."""
    return 1 if device.type == "cpu" else 128


def _unit(like: Tensor) -> int:
    """`row_bytes` in elements of a tensor."""
    return max(1, row_alignment_bytes(like.device) // like.element_size())


def spans(weight_VD: Tensor) -> list[slice]:
    """The vocabulary of a head in parts for its matrix products: all that fills units of `row_bytes`, then the few tokens left.

    Devices do products whose sizes are odd at a fraction of their speed.
    """
    vocab_size = weight_VD.shape[0]
    unit = _unit(weight_VD)
    whole = vocab_size // unit * unit
    return [part for part in (slice(0, whole), slice(whole, vocab_size)) if part.stop > part.start]


class Workspace:
    """Large buffers that are made once and used for block after block, and on a CPU for step after step.

    Fresh memory of this size costs more than the arithmetic: every page of it is faulted in and cleared. Whoever asks for a
    name anew may overwrite what was there.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def matrix(self, name: str, shape: tuple[int, int], like: Tensor) -> Tensor:
        """An uninitialized matrix with the dtype and device of `like`; between its rows there may be a gap."""
        num_rows, num_columns = shape
        unit = _unit(like)
        stride = -(-num_columns // unit) * unit
        num_bytes = num_rows * stride * like.element_size()
        buffer = self._buffers.pop(name, None)
        if buffer is None or buffer.numel() < num_bytes or buffer.device != like.device:
            buffer = None  # gone before there is a new one
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=like.device)
        self._buffers[name] = buffer
        return buffer[:num_bytes].view(like.dtype).view(num_rows, stride)[:, :num_columns]

    def release(self) -> None:
        """Drop what a device gives back at once when asked again; a CPU would have to clear it anew."""
        self._buffers = {k: v for k, v in self._buffers.items() if v.device.type == "cpu"}

    def __deepcopy__(self, memo: object) -> Workspace:
        return Workspace()

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()
