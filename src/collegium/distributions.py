"""Distributions over the vocabulary at the rows of a batch, and the answers made of them.

Shapes: N rows, n rows of one block, m rows that a teacher answers, V vocabulary, D width of the
hidden states, E named entries of all rows together.

    full     HiddenRows (hidden states and a head), DenseRows (logits)
    named    NamedRows: the top k with the mass of the tail, or independent draws
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

from collegium.kernels.rows import RawRows, Workspace, head_product, logits_dtype
from collegium.options import Tensor, torch
from collegium.types import AttentionStates, Batch, Head, Rows, map_tensors


class Distribution(ABC):
    """One distribution per row. Storage is up to the subclass.

    The properties describe a full distribution, and a subclass of named tokens overrides them.
    """

    __slots__ = ()
    is_sampled: bool = False
    """Whether entries are random draws: unbiased, but not inside a logarithm."""

    @property
    def is_full(self) -> bool:
        """Whether every token has its own probability, which allows any temperature."""
        return self.temperatures is None

    @property
    def temperatures(self) -> Collection[float] | None:
        """The temperatures at which it can be read. None for any."""
        return None

    @property
    def logit_bytes(self) -> int | None:
        """Bytes of one logit if a head computes them into a scratch buffer, else None."""
        return None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def logits(self, block: slice) -> Tensor:
        """(n, V) logits of the rows in `block`, in float32 or wider."""

    @abstractmethod
    def take(self, rows_m: Tensor) -> Distribution:
        """The rows at ascending (m,) indices."""

    def raw(self, block: slice, workspace: Workspace, buffer: str) -> tuple[RawRows, bool]:
        """The rows in `block` as kernels read them, and whether the values may be overwritten."""
        return RawRows(self.logits(block)), False

    def scalars(self, block: slice, temperature: float) -> tuple[Tensor, Tensor, Tensor] | None:
        """Stored entropy, label and maximum log-probability, (n,) each. None to compute them."""
        return None


@dataclass(frozen=True, slots=True)
class HiddenRows(Distribution):
    """Hidden states of N rows and the head that turns them into logits."""

    hidden: Tensor
    """(N, D) after the final norm: the input of the head."""
    head: Head
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Tapped hidden states by name (`embed`, `layer_0`, ..., `final_postnorm`), each (N, D)."""
    router_loss: Tensor | None = None
    """Scalar: the load-balancing loss of a student that is a mixture of experts."""
    attention: Mapping[str, AttentionStates] = field(default_factory=dict)
    """Tapped attention by name (`attention_0`, ...), at all positions of the batch."""

    @property
    def logit_bytes(self) -> int:
        return logits_dtype(self.head).itemsize

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def logits(self, block: slice) -> Tensor:
        has_graph = self.hidden.requires_grad or self.head.weight.requires_grad
        if self.head.weight.dtype.itemsize >= 4 or (has_graph and torch.is_grad_enabled()):
            return self.head.logits(self.hidden[block])
        raw = head_product(self.hidden[block], self.head, Workspace())
        return self.head.finish(raw.values_nV)

    def take(self, rows_m: Tensor) -> HiddenRows:
        return HiddenRows(self.hidden[rows_m.to(self.hidden.device)], self.head)

    def raw(self, block: slice, workspace: Workspace, buffer: str) -> tuple[RawRows, bool]:
        return head_product(self.hidden[block], self.head, workspace, buffer=buffer), True


@dataclass(frozen=True, slots=True)
class DenseRows(Distribution):
    """Logits of N rows held in memory, for small vocabularies, preflight and tests."""

    logits_NV: Tensor

    def __len__(self) -> int:
        return self.logits_NV.shape[0]

    def logits(self, block: slice) -> Tensor:
        logits_nV = self.logits_NV[block]
        return logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))

    def take(self, rows_m: Tensor) -> DenseRows:
        return DenseRows(self.logits_NV[rows_m.to(self.logits_NV.device)])


@dataclass(frozen=True)
class WrappedRows(Distribution):
    """Base of a distribution that changes the logits of another one."""

    inner: Distribution

    @property
    def is_sampled(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.is_sampled

    @property
    def temperatures(self) -> Collection[float] | None:
        return self.inner.temperatures

    def __len__(self) -> int:
        return len(self.inner)

    def take(self, rows_m: Tensor) -> Distribution:
        return replace(self, inner=self.inner.take(rows_m))


@dataclass(frozen=True, slots=True)
class StoredScalars:
    """Statistics of N stored distributions, in nats, at temperature 1 and at a few others."""

    label_logp_N: Tensor
    """(N,) log-probability of the label at temperature 1."""
    max_logp_N: Tensor
    """(N,) log-probability of the most likely token at temperature 1."""
    entropy: Mapping[float, Tensor]
    """Temperature -> (N,) entropy. 1 is among the keys."""
    log_z: Mapping[float, Tensor] = field(default_factory=dict)
    """Temperature T other than 1 -> (N,) log sum_v P(v)^(1/T)."""


@dataclass(frozen=True, slots=True)
class NamedRows(Distribution):
    """Distributions of N rows that name E tokens in all, as compressed sparse rows.

    Row r owns the entries starts[r] to starts[r + 1]. Draws: t_i = count_i / N, so E[t] = P and a
    token that was not drawn says nothing. Otherwise the named probabilities are exact, and all
    other tokens share `log_tail`.
    """

    starts: Tensor
    """(N + 1,) int64."""
    ids: Tensor
    """(E,) int64: no token twice in a row."""
    logp: Tensor
    """(E,) log of the mass of each entry, float32 or wider."""
    log_tail: Tensor | None
    """(N,) log of the mass of all tokens that are not named. None for zero mass."""
    vocab_size: int
    is_sampled: bool = False
    """Whether the entries are draws, or a mean of distributions one of which is made of draws."""
    token_logp: Tensor | None = None
    """(E,) the teacher's log-probability of each drawn token. None where `logp` is that already."""
    stored: StoredScalars | None = None
    """Statistics of the whole distributions. None where only the entries are known."""

    @property
    def temperatures(self) -> frozenset[float]:
        return frozenset({1.0} if self.stored is None else {1.0, *self.stored.log_z})

    def __len__(self) -> int:
        return self.starts.shape[0] - 1

    def to(self, device: torch.device) -> NamedRows:
        """The same rows on another device."""
        return map_tensors(self, lambda tensor: tensor.to(device))

    def block(self, block: slice) -> NamedRows:
        """The rows of `block`, without a copy if they are contiguous."""
        start, stop, step = block.indices(len(self))
        if step != 1:
            return self.take(torch.arange(len(self), device=self.starts.device)[block])
        starts = self.starts[start : stop + 1]
        entries = slice(int(starts[0]), int(starts[-1]))
        return self._part(starts - starts[0], entries, slice(start, stop))

    def take(self, rows_m: Tensor) -> NamedRows:
        rows_m = rows_m.to(self.starts.device)
        is_kept = torch.zeros(len(self), dtype=torch.bool, device=self.starts.device)
        is_kept[rows_m] = True
        starts = torch.cat([self.starts.new_zeros(1), self.starts.diff()[rows_m].cumsum(0)])
        return self._part(starts, is_kept[self.row_of_entry()], rows_m)

    def _part(self, starts: Tensor, entries: slice | Tensor, rows: slice | Tensor) -> NamedRows:
        return replace(
            self,
            starts=starts,
            ids=self.ids[entries],
            logp=self.logp[entries],
            log_tail=None if self.log_tail is None else self.log_tail[rows],
            token_logp=None if self.token_logp is None else self.token_logp[entries],
            stored=None if self.stored is None else map_tensors(self.stored, lambda x_N: x_N[rows]),
        )

    def row_of_entry(self) -> Tensor:
        """(E,) int64: the row that owns each entry."""
        rows = torch.arange(len(self), device=self.starts.device)
        return rows.repeat_interleave(self.starts.diff(), output_size=self.ids.shape[0])

    def log_rest(self) -> Tensor:
        """(N,) log-probability of each token that is not named: the tail spread evenly."""
        if self.log_tail is None:
            return self.logp.new_full((len(self),), -torch.inf)
        num_others = (self.vocab_size - self.starts.diff()).clamp(min=1).to(self.logp.dtype)
        return self.log_tail.to(self.logp.dtype) - num_others.log()

    def logits(self, block: slice) -> Tensor:
        """(n, V) log-probabilities with the tail spread evenly; -inf for tokens without mass."""
        part = self.block(block)
        logp_nV = part.log_rest()[:, None].repeat(1, self.vocab_size)
        logp_nV[part.row_of_entry(), part.ids] = part.logp
        return logp_nV

    def raw(self, block: slice, workspace: Workspace, buffer: str) -> tuple[RawRows, bool]:
        return RawRows(self.logits(block)), True

    def scalars(self, block: slice, temperature: float) -> tuple[Tensor, Tensor, Tensor] | None:
        """Stored statistics at a stored temperature: log P_T = log P / T - log Z_T."""
        if self.stored is None:
            return None
        stored = map_tensors(self.stored, lambda x_N: x_N[block])
        at = self.stored_temperature(temperature)
        log_z_n = stored.log_z.get(at, 0.0)  # none is stored at temperature 1
        label_n, max_n = stored.label_logp_N / at - log_z_n, stored.max_logp_N / at - log_z_n
        return stored.entropy[at], label_n, max_n

    def tempered(self, temperature: float) -> NamedRows:
        """The distributions P_T = P^(1/T) / Z_T, for a stored temperature T.

        Draws from P become draws that are unbiased for P_T by the factor
        P_T(v) / P(v) = exp((1/T - 1) log P(v) - log Z_T). Their mass need not sum to 1.
        """
        at = self.stored_temperature(temperature)
        if at == 1.0:
            return self
        assert self.stored is not None
        log_z_E = self.stored.log_z[at][self.row_of_entry()]
        if self.is_sampled:
            assert self.token_logp is not None  # written with every stored temperature
            return replace(self, logp=self.logp + (1.0 / at - 1.0) * self.token_logp - log_z_E)
        logp = self.logp / at - log_z_E
        named_N = logp.new_zeros(len(self)).index_add(0, self.row_of_entry(), logp.exp())
        return replace(self, logp=logp, log_tail=torch.log1p(-named_N.clamp(max=1.0)))

    def stored_temperature(self, temperature: float) -> float:
        """The stored temperature that equals this one up to rounding.

        Raises:
            ValueError: none is that close. `fusion.requirements` checks this before a run.
        """
        stored = self.temperatures
        if (nearest := nearest_temperature(temperature, stored)) is None:
            raise ValueError(f"temperature: got {temperature:g}; must be one of {stored}")
        return nearest


def nearest_temperature(temperature: float, stored: Collection[float]) -> float | None:
    """The stored temperature equal to this one up to rounding. None where there is none."""
    return next((t for t in (1.0, *stored) if abs(temperature - t) <= 1e-6 * t), None)


@dataclass(frozen=True, slots=True)
class Answer:
    """The output of one teacher at N rows, in the student's vocabulary."""

    name: str
    distribution: Distribution
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """Tapped hidden states by name, each (N, D) or, for some of the rows, (m, D)."""
    rows: Tensor | None = None
    """(m,) int64, ascending: the rows that it answers. None for all of them."""
    attention: Mapping[str, AttentionStates] = field(default_factory=dict)
    """Tapped attention by name, at all positions of the batch."""


class Capability(Enum):
    """An operation that not every source of targets supports, and the reason."""

    LOGARITHMS = "random draws are biased inside a logarithm"
    """Logarithms, powers and entropies of a distribution."""
    ALL_TOKENS = "it reads the tokens that were not kept one by one"
    """The log-probability of every token."""
    ANY_TEMPERATURE = "softening needs the tokens that were not kept"
    """Softening that needs tokens which top k and draws leave out."""
    REFUSION = "its weights were fixed when it was built"
    """Fusing again with weights and temperatures that were not fixed when a cache was built."""
    PER_BATCH = "it would depend on the batch or the step"
    """Weights that depend on the other rows of a batch, and row weights of the divergence."""
    SUBSETS = "it scores all rows"
    """Skipping the forward pass for windows without a row of this teacher."""
    FEATURES = "it holds no hidden states"
    ATTENTION = "it holds no queries, keys and values"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The operations that a source supports, compared with the requirements before a run."""

    source: str
    """A noun phrase for messages, such as `a cache of draws`."""
    supported: frozenset[Capability]
    temperatures: Collection[float] | None = None
    """Stored temperatures of each teacher. None for any."""
    remedy: str = ""
    """The way to get what the source lacks."""


LIVE = Capabilities("live teachers", frozenset(Capability))


class Teacher(Protocol):
    """A frozen model, or a source that answers for one."""

    @property
    def name(self) -> str: ...

    @property
    def capabilities(self) -> Capabilities: ...

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> Answer:
        """Score the rows without gradient. `taps` names the hidden states and attention to return.

        Tensors are on the device of the batch, wherever the teacher computes them.
        """
        ...
