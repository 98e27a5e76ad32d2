"""Data types and operations that every kernel backend shares.

Shapes: n rows of one block, V vocabulary, D width, E (row, token) entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from collegium.options import torch
from collegium.types import Head

if TYPE_CHECKING:
    from torch import Tensor

LOGP_FLOOR_FACTOR = 1e-8
"""Log-probabilities of -inf become this fraction of the dtype's lowest value.

The result is finite and leaves room to divide by a temperature.
"""

CAST_ELEMENTS = 2**20
"""Elements of a half-precision matrix that are cast at once, where products need one dtype.

4 MiB in float32: the copy is still in the cache of the CPU when it is multiplied.
"""

ROW_BYTES = 128
"""Row alignment of buffers on a GPU."""


@dataclass(frozen=True, slots=True)
class RawRows:
    """Raw outputs x of a head's matrix product, with the map to logits.

    z = cap tanh(scale x / cap), or z = scale x without a cap. A temperature folds into both: z / T
    has scale s / T and cap c / T.
    """

    values_nV: Tensor
    """(n, V) x, in the dtype of the head."""
    scale: float = 1.0
    softcap: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the arithmetic: float32, or float64 for float64 values."""
        return torch.promote_types(self.values_nV.dtype, torch.float32)

    def logits(self) -> Tensor:
        """Return (n, V) logits in a new tensor with a graph, in float32 or wider."""
        return Head(self.values_nV, None, self.scale, self.softcap).finish(self.values_nV)

    def empty_columns(self, count: int) -> Tensor:
        """Return an uninitialized (count, n) tensor in the dtype of the arithmetic."""
        return self.values_nV.new_empty(count, self.values_nV.shape[0], dtype=self.dtype)

    def tempered(self, temperature: float) -> RawRows:
        """Return the same values with z / T in place of z."""
        if temperature == 1.0:
            return self
        cap = None if self.softcap is None else self.softcap / temperature
        return replace(self, scale=self.scale / temperature, softcap=cap)

    def at_labels(self, labels_n: Tensor) -> tuple[Tensor, Tensor]:
        """Gather z and dz/dx at one token per row: (n,) -> (n,), (n,)."""
        return self._logits_and_slope(self.values_nV.gather(1, labels_n[:, None])[:, 0])

    def at(self, row_E: Tensor, ids_E: Tensor) -> tuple[Tensor, Tensor]:
        """Gather z and dz/dx at arbitrary entries: (E,), (E,) -> (E,), (E,)."""
        values_M, index_E = self._flat(row_E, ids_E)
        return self._logits_and_slope(values_M.index_select(0, index_E))

    def add_at_(self, row_E: Tensor, ids_E: Tensor, delta_E: Tensor) -> None:
        """Add `delta_E` to x at arbitrary entries, in the dtype of the values."""
        values_M, index_E = self._flat(row_E, ids_E)
        values_M.index_add_(0, index_E, delta_E.to(values_M.dtype))

    def _flat(self, row_E: Tensor, ids_E: Tensor) -> tuple[Tensor, Tensor]:
        # A flat view, gaps between rows included: one index is faster than two.
        (num_rows, vocab_size), stride = self.values_nV.shape, self.values_nV.stride(0)
        size = (num_rows - 1) * stride + vocab_size if num_rows else 0
        return self.values_nV.as_strided((size,), (1,)), row_E * stride + ids_E

    def _logits_and_slope(self, raw_E: Tensor) -> tuple[Tensor, Tensor]:
        raw_E = raw_E.to(self.dtype)
        if self.softcap is None:
            return raw_E * self.scale, torch.full_like(raw_E, self.scale)
        tanh_E = torch.tanh(raw_E * (self.scale / self.softcap))
        return self.softcap * tanh_E, self.scale * (1.0 - tanh_E.square())


@dataclass(frozen=True, slots=True)
class LogSumExp:
    """Logsumexp over the vocabulary of n rows, split into the maximum and the rest."""

    # Subtracting one total from z leaves no float32 digits of P at logits of a few hundred. In two
    # parts, log P = (z - max) - log_sum is exact to one rounding for logits of any size.
    max_n: Tensor
    """(n,) max_v z."""
    log_sum_n: Tensor
    """(n,) log sum_v exp(z - max)."""

    def to(self, dtype: torch.dtype) -> LogSumExp:
        """Cast both parts."""
        return LogSumExp(self.max_n.to(dtype), self.log_sum_n.to(dtype))

    def total(self) -> Tensor:
        """(n,) log sum_v exp z."""
        return self.max_n + self.log_sum_n

    def logp(self, z_n: Tensor) -> Tensor:
        """(n,) finite log-probabilities of one logit per row."""
        return ((z_n - self.max_n) - self.log_sum_n).clamp_(min=logp_floor(z_n.dtype))


@dataclass(frozen=True, slots=True)
class DenseTarget:
    """One distribution per row, as logits with their logsumexp, as finite log P, or as P."""

    rows: RawRows
    kind: Literal["logits", "logp", "prob"]
    logsumexp: LogSumExp | None = None
    """Of the rows, for `logits` only."""
    temperature: float = 1.0
    """Temperature T at which the student is compared with it. The target itself is softened."""
    is_normalized: bool = True
    """False for draws at another temperature: their mass is 1 on average, not in each row."""

    def to(self, dtype: torch.dtype) -> DenseTarget:
        """Cast to the dtype of the student, a no-op if it already matches."""
        if self.rows.dtype == dtype:
            return self
        rows = replace(self.rows, values_nV=self.rows.values_nV.to(dtype))
        logsumexp = None if self.logsumexp is None else self.logsumexp.to(dtype)
        return replace(self, rows=rows, logsumexp=logsumexp)

    def mass(self) -> Tensor:
        """(n,) sum_v P."""
        if self.kind == "prob":
            return self.rows.values_nV.sum(-1)
        total_n = self.rows.logits().logsumexp(-1)
        return (total_n if self.logsumexp is None else total_n - self.logsumexp.total()).exp()

    def as_logp_(self) -> DenseTarget:
        """The same target as finite log-probabilities, in-place if its dtype allows."""
        return replace(self, rows=RawRows(self.logp_()), kind="logp", logsumexp=None)

    def logp_(self) -> Tensor:
        """Turn the target into (n, V) finite log-probabilities, in-place if its dtype allows."""
        values_nV = self.rows.values_nV
        if self.kind == "logp":
            return values_nV
        if self.kind == "prob":
            return values_nV.clamp_(min=torch.finfo(values_nV.dtype).tiny).log_()
        logits_nV = to_logits(self.rows, values_nV)
        if self.logsumexp is None or (logits_nV.is_contiguous() and self.is_normalized):
            return floor_(torch.log_softmax(logits_nV, -1, out=logits_nV))
        # With gaps between the rows, log_softmax would need a copy.
        logits_nV.sub_(self.logsumexp.max_n[:, None]).sub_(self.logsumexp.log_sum_n[:, None])
        return floor_(logits_nV)


@dataclass(slots=True)
class RunningMean:
    """A weighted mean of members that arrive one by one, stored as `unit_n` times `values_nV`.

    Before the last member a backend may leave a unit per row, which saves a sweep.
    """

    values_nV: Tensor
    """(n, V), overwritten by the first member."""
    is_log: bool = False
    """Whether the members are log P instead of P."""
    num_remaining: int = 0
    """Members that follow the one being added."""
    unit_n: Tensor | None = None
    """(n,); None for 1, and always after the last member."""


class RowKernels(ABC):
    """Operations that take all of the time outside the matrix products."""

    @abstractmethod
    def read(self, rows: RawRows) -> tuple[LogSumExp, Tensor]:
        """Compute logsumexp and (n,) entropy in nats of n rows, without changing them."""

    @abstractmethod
    def add_(
        self, mean: RunningMean, rows: RawRows, logsumexp: LogSumExp, share_n: Tensor | None
    ) -> None:
        """Add a member m: mean <- (1 - share) mean + share m, or m without shares.

        `rows` and `logsumexp` are of the new member, whose P or log P is m. `share_n` is its (n,)
        share, None for the first member.
        """

    @abstractmethod
    def softmax_(self, rows: RawRows, logsumexp: LogSumExp, factor_n: Tensor) -> None:
        """x <- factor softmax(z) dz/dx: the dense gradient of a loss on a sparse target."""

    @abstractmethod
    def distill_(
        self, rows: RawRows, target: DenseTarget | None, kd_n: Tensor, ce_n: Tensor
    ) -> tuple[LogSumExp, Tensor]:
        """Compute the forward KL per row and overwrite x with the gradient of KL and CE.

        With Q_T = softmax(z / T): KL_n = sum_v P (log P - log Q_T), and
        x <- [kd_n (Q_T sum_v P - P) / T + ce_n Q_1] dz/dx. The caller adds the sparse part of the
        gradient of cross-entropy (CE), -ce_n dz/dx at the label.

        Returns:
            The logsumexp of the rows, and (n,) KL in nats, zero without a target.
        """


def logp_floor(dtype: torch.dtype) -> float:
    """Return the smallest log-probability: finite, so that 0 * log 0 is not NaN."""
    return LOGP_FLOOR_FACTOR * torch.finfo(dtype).min


def floor_(logp_nV: Tensor) -> Tensor:
    """Clamp -inf to `logp_floor` in-place."""
    return logp_nV.clamp_(min=logp_floor(logp_nV.dtype))


def top_tokens(values_nV: Tensor) -> Tensor:
    """Return the (n,) index of the largest value of each row, the first one on a CPU."""
    if values_nV.device.type != "cpu" or values_nV.dtype == torch.bfloat16:
        return values_nV.argmax(-1)
    # 0.1 ns per value with numpy, 4 ns with torch.
    return torch.from_numpy(values_nV.detach().numpy().argmax(-1))


def to_logits(rows: RawRows, out_nV: Tensor) -> Tensor:
    """Compute the logits, in `out_nV` if it has their dtype, else in new memory."""
    if out_nV.dtype != rows.dtype:
        out_nV = torch.empty_like(rows.values_nV, dtype=rows.dtype)
    if out_nV.data_ptr() != rows.values_nV.data_ptr():
        out_nV.copy_(rows.values_nV)
    if rows.softcap is not None:
        return out_nV.mul_(rows.scale / rows.softcap).tanh_().mul_(rows.softcap)
    return out_nV if rows.scale == 1.0 else out_nV.mul_(rows.scale)


def head_product(
    hidden_nD: Tensor, head: Head, workspace: Workspace, *, buffer: str = "logits"
) -> RawRows:
    """Apply the head's matrix and bias without a graph: (n, V) in a workspace buffer.

    In float32 or wider: logits of a student and of teachers close to it, rounded to bfloat16, give
    gradients that are off by 3 to 12 %.
    """
    weight_VD = head.weight.detach()
    hidden_nD = hidden_nD.detach().to(weight_VD.dtype)
    like = weight_VD.new_empty(0, dtype=logits_dtype(head))
    out_nV = workspace.matrix(buffer, (hidden_nD.shape[0], weight_VD.shape[0]), like)
    for part in spans(weight_VD):
        bias_v = None if head.bias is None else head.bias.detach()[part]
        if bias_v is not None and weight_VD.dtype == out_nV.dtype:
            torch.addmm(bias_v, hidden_nD, weight_VD[part].T, out=out_nV[:, part])
            continue
        add_product_(out_nV[:, part], hidden_nD, weight_VD[part].T, beta=0)
        if bias_v is not None:
            out_nV[:, part] += bias_v
    return RawRows(out_nV, head.scale, head.softcap)


def logits_dtype(head: Head) -> torch.dtype:
    """The dtype of a head's product."""
    return torch.promote_types(head.weight.dtype, torch.float32)


def add_product_(sum_RC: Tensor, left_Rn: Tensor, right_nC: Tensor, *, beta: int = 1) -> None:
    """sum <- beta sum + left right in the dtype of the sum, without a temporary if possible.

    The sum may be uninitialized for `beta` 0. A float32 left is rounded where the right is half:
    always on CUDA, and for bfloat16 on a CPU with native products.
    """
    if left_Rn.dtype == right_nC.dtype == sum_RC.dtype:
        torch.addmm(sum_RC, left_Rn, right_nC, beta=beta, out=sum_RC)
    elif sum_RC.dtype == torch.float32 and multiplies_half(sum_RC.device):
        left_Rn = left_Rn.to(right_nC.dtype)
        torch.addmm(sum_RC, left_Rn, right_nC, beta=beta, out_dtype=torch.float32, out=sum_RC)
    else:
        with _native_products(right_nC):
            _add_cast_product_(sum_RC, left_Rn.to(sum_RC.dtype), right_nC, beta)


def multiplies_half(device: torch.device) -> bool:
    """Whether a product of half-precision matrices can be written in float32."""
    return device.type == "cuda" and torch.version.hip is None


def _add_cast_product_(sum_RC: Tensor, left_Rn: Tensor, right_nC: Tensor, beta: int) -> None:
    """Multiply by a copy of the right in the dtype of the sum, piece by piece of its longer side.

    Pieces of the shorter side would read all of the left once for each.
    """
    length, num_columns = right_nC.shape
    # Measured at n = 512, V = 49,152, D = 576 on one core, gradient of the hidden states: 374 ms in
    # pieces of the width, 170 ms in pieces of the vocabulary.
    if length > num_columns:
        step = max(1, CAST_ELEMENTS // max(1, num_columns))
        for start in range(0, length, step):
            part = slice(start, start + step)
            piece_nC = right_nC[part].to(sum_RC.dtype)
            torch.addmm(
                sum_RC, left_Rn[:, part], piece_nC, beta=beta if start == 0 else 1, out=sum_RC
            )
        return
    step = max(1, CAST_ELEMENTS // max(1, length))
    for start in range(0, num_columns, step):
        part = slice(start, start + step)
        piece_nC = right_nC[:, part].to(sum_RC.dtype)
        torch.addmm(sum_RC[:, part], left_Rn, piece_nC, beta=beta, out=sum_RC[:, part])


@contextmanager
def _native_products(matrix: Tensor) -> Iterator[None]:
    """Multiply float32 copies of bfloat16 matrices by bfloat16 instructions of the CPU, if any.

    oneDNN then rounds its float32 operands to bfloat16, which is exact for such copies, and adds
    and returns float32. PyTorch has no product of bfloat16 matrices into float32 on a CPU. The
    setting is global: float32 products of other threads are rounded too while it holds.
    """
    if matrix.device.type != "cpu" or matrix.dtype != torch.bfloat16:
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def row_alignment(like: Tensor) -> int:
    """Return the row alignment of a block's buffers, in elements of a tensor."""
    # From unaligned rows a GPU loads one value per thread and instruction instead of 16 bytes.
    return 1 if like.device.type == "cpu" else max(1, ROW_BYTES // like.element_size())


def spans(weight_VD: Tensor) -> list[slice]:
    """Split the vocabulary for matrix products: the aligned part, then the remainder."""
    # Matrix products of odd sizes run at a fraction of a GPU's speed, and vocabularies are often
    # odd: 151,665 of the 151,936 rows of a Qwen head, 50,257 for GPT-2.
    vocab_size = weight_VD.shape[0]
    unit = row_alignment(weight_VD)
    end = vocab_size // unit * unit
    return [part for part in (slice(0, end), slice(end, vocab_size)) if part.stop > part.start]


class Workspace:
    """Named buffers, allocated once and reused by every block, on a CPU also by every step.

    Requesting a name again may overwrite its previous contents.
    """

    def __init__(self) -> None:
        # Fresh memory of this size costs more than the arithmetic: pages are faulted in and zeroed.
        self._buffers: dict[str, Tensor] = {}

    def matrix(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return an uninitialized matrix with the dtype and device of `like`.

        Rows are aligned to `row_alignment`, so there may be a gap after each.
        """
        num_rows, num_columns = shape
        unit = row_alignment(like)
        stride = -(-num_columns // unit) * unit
        num_bytes = num_rows * stride * like.element_size()
        buffer = self._buffers.pop(name, None)
        if buffer is None or buffer.numel() < num_bytes or buffer.device != like.device:
            buffer = None  # freed before its successor exists: both at once exceed the budget
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=like.device)
        self._buffers[name] = buffer
        return buffer[:num_bytes].view(like.dtype).view(num_rows, stride)[:, :num_columns]

    def release(self) -> None:
        """Free device buffers, which the caching allocator hands out again at once."""
        # CPU buffers are kept: fresh pages would have to be zeroed again.
        self._buffers = {k: v for k, v in self._buffers.items() if v.device.type == "cpu"}

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        """Copy and pickle as an empty workspace."""
        return Workspace, ()
