"""Codec of distributions: random draws, or top-k with its tail, and scalars of each row.

A fused cache holds one target per position. A cache of one teacher holds its distribution at
temperature 1, and the scalars to read it at a few others:

    P_T(v) = P(v)^(1/T) / Z_T,   log Z_T = log sum_v P(v)^(1/T),
    H_T = log Z_T - (1/T) sum_v P_T(v) log P(v)

Encoded columns:

    sizes     (n,) uint8 or uint16: number of entries of each row
    ids       (E,) uint16 or uint32: token ids, unique within a row
    counts    (E,) uint8 or uint16: draws of each token
    levels    (E,) uint16: -log P(token) in `STEP`s, of top-k and of the draws of one teacher
    log_tail  (n,) float32: top-k: log of the mass of all other tokens
    scalars   (n,) float16 each, in nats

Error bounds:

    draws     t = counts / N has E[t] = p exactly and Var[t_i] = p_i (1 - p_i) / N
    top-k     The tail is exact to float32. A kept log-probability is within `STEP` of the true one:
              it is rounded to a multiple of `STEP`, then all kept ones are scaled, by less than
              half a step, to sum to 1 - tail.
    levels    of drawn tokens are within `STEP` / 2, down to `-MAX_LEVEL * STEP`
    scalars   a relative error of 2^-11: below the precision of a bfloat16 teacher

Shapes: n rows, V vocabulary, N draws per row, k kept tokens per row, E entries of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from collegium.cache.codecs.token_ranks import from_gaps, from_heights, to_gaps, to_heights
from collegium.cache.options import TARGETS, Samples, TargetKind, Targets, TopK
from collegium.cache.shards import Columns, ListColumn, join_columns, starts_of
from collegium.distributions import NamedRows, StoredScalars
from collegium.options import OneOf

# bfloat16 logits near 16 are spaced eight times as far apart.
STEP = 1 / 64
"""Quantization step of stored log-probabilities, in nats."""
MAX_LEVEL = 2**16 - 1
SCALARS = ("entropy", "label_logp", "max_logp", "disagreement")
"""Per row of a fused target, in nats: H(P), log P(label), max log P, teacher disagreement."""
# Fitted to English text scored by SmolLM2: docs/results/cache.md.
FREQUENCY_BITS = 2.3
"""Bits per rank that unequal frequencies save."""


@dataclass(frozen=True, config=ConfigDict(extra="ignore", allow_inf_nan=False))
class TargetCodec:
    """Columns of a cache of distributions. Its fields are part of the cache's identity."""

    shared: ClassVar[str] = "vocabulary"
    entries: ClassVar[frozenset[str]] = frozenset({"ids", "counts", "levels", "gaps", "heights"})
    # One or two windows from 512 tokens on. Groups of 4,000 take 3 % less, and four times the time.
    group_targets: ClassVar[int] = 1000

    kind: TargetKind
    targets: Annotated[Targets, OneOf(TARGETS)]
    vocab_size: Annotated[int, Field(strict=True, ge=1, le=2**32)]
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Temperatures other than 1 at which the output of one teacher can be read."""

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the scalars of each row."""
        if self.kind == "fused":
            return SCALARS
        names = [name(value) for value in self.temperatures for name in (log_z_name, entropy_name)]
        return ("entropy", "label_logp", "max_logp", *names)

    @property
    def unread(self) -> frozenset[str]:
        # Those of a fused target are for other readers of the files.
        return frozenset(SCALARS if self.kind == "fused" else ())

    def encode(
        self, logp_nV: Tensor, keys_n: np.ndarray, scalars: Mapping[str, Tensor]
    ) -> dict[str, np.ndarray]:
        """Encode (n, V) log-probabilities and (n,) scalars in nats, by name.

        `keys_n` are (n,) uint64 from `row_keys`, ignored by top-k. Raises ValueError for a NaN.
        """
        targets = self.targets
        if isinstance(targets, TopK):
            columns = encode_top_k(logp_nV, targets.k)
        else:
            columns = encode_draws(logp_nV, keys_n, targets.draws)
            if self.kind == "per_teacher":
                row_E = np.repeat(np.arange(len(logp_nV)), columns["sizes"])
                columns["levels"] = _levels(logp_nV[row_E, columns["ids"]])
        columns["ids"] = columns["ids"].astype(id_dtype(self.vocab_size))
        return columns | {name: _float16(name, scalars[name]) for name in self.scalars}

    def num_targets(self, columns: Columns) -> int:
        return len(columns["sizes"])

    def pack(self, pieces: Sequence[Columns]) -> dict[str, ListColumn]:
        rows = join_columns(pieces)
        sizes = rows["sizes"]
        vocabulary, gaps, order = to_gaps(rows["ids"], sizes, self.vocab_size)
        columns = {"gaps": gaps, "sizes": sizes}
        if isinstance(self.targets, Samples):
            columns["counts"] = rows["counts"][order]
        else:
            columns["log_tail"] = rows["log_tail"]
        if "levels" in rows:
            columns["heights"], columns["floor"] = to_heights(rows["levels"][order], sizes)
        columns |= {name: rows[name] for name in self.scalars}
        row_at = starts_of([len(piece["sizes"]) for piece in pieces])
        entry_at = starts_of(sizes)[row_at]
        return {self.shared: ListColumn(vocabulary, np.where(row_at > 0, len(vocabulary), 0))} | {
            name: ListColumn(values, entry_at if name in self.entries else row_at)
            for name, values in columns.items()
        }

    def unpack(self, columns: Columns, shared: np.ndarray | None) -> dict[str, np.ndarray]:
        sizes = columns["sizes"]
        num_entries = int(sizes.sum())
        for name, values in columns.items():
            expected = num_entries if name in self.entries else len(sizes)
            if len(values) != expected:
                raise ValueError(f"column `{name}` has {len(values)} values instead of {expected}")
        if not sizes.all():
            raise ValueError("an empty row")
        assert shared is not None
        if shared.size and int(shared.max()) >= self.vocab_size:
            raise ValueError(f"a token not below {self.vocab_size}")
        rows = {name: columns[name] for name in columns.keys() - {"gaps", "heights", "floor"}}
        rows["ids"] = from_gaps(columns["gaps"], sizes, shared)
        if "heights" in columns:
            rows["levels"] = from_heights(columns["heights"], columns["floor"], sizes)
        if isinstance(self.targets, TopK):
            if not (rows["log_tail"] <= 0).all():
                raise ValueError("a tail is not a log-probability")
        else:
            totals = _row_sums(rows["counts"].astype(np.int64), sizes)
            if (rows["counts"] == 0).any() or (totals != self.targets.draws).any():
                raise ValueError(f"counts of a row do not add up to {self.targets.draws}")
        if missing := set(self.scalars) - self.unread - columns.keys():
            raise ValueError(f"no column `{min(missing)}`")
        return rows

    def decode(self, columns: Columns) -> NamedRows:
        """Decode stored rows, and the scalars if they are those of one teacher."""
        has_tail = isinstance(self.targets, TopK) and not self.targets.renormalized
        rows = NamedRows(
            starts=torch.from_numpy(starts_of(columns["sizes"])),
            ids=torch.from_numpy(columns["ids"].astype(np.int64)),
            logp=torch.from_numpy(_log_mass(self.targets, columns)),
            log_tail=torch.from_numpy(columns["log_tail"].copy()) if has_tail else None,
            vocab_size=self.vocab_size,
            is_sampled=isinstance(self.targets, Samples),
        )
        if self.kind == "fused":
            return rows
        scalars = {n: torch.from_numpy(columns[n].astype(np.float32)) for n in self.scalars}
        entropies = {t: scalars[entropy_name(t)] for t in (1.0, *self.temperatures)}
        log_zs = {t: scalars[log_z_name(t)] for t in self.temperatures}
        stored = StoredScalars(scalars["label_logp"], scalars["max_logp"], entropies, log_zs)
        if not rows.is_sampled:
            return replace(rows, stored=stored)
        token_logp = torch.from_numpy(columns["levels"] * np.float32(-STEP))
        return replace(rows, token_logp=token_logp, stored=stored)

    def bytes_per_target(self, sample: Sequence[Columns], num_targets: int) -> float:
        """Estimate the bytes per target on disk, in a shard of `num_targets`.

        A rank costs log2 V - log2(n!) / n - `FREQUENCY_BITS` bits: a row's n entries are sorted,
        and common tokens have small ranks. The vocabulary of the shard has at most V tokens, and
        grows as the square root of the targets (Heaps' law).
        """
        # The number of unique draws depends on the teachers' entropy: on English text 15 of 50 for
        # a good model, twice as many for a small one.
        num_rows = sum(map(self.num_targets, sample))
        entries = max(1.0, sum(len(piece["ids"]) for piece in sample) / max(num_rows, 1))
        order_bits = math.lgamma(entries + 1) / math.log(2) / entries
        rank_bytes = max(1.0, math.log2(self.vocab_size) - order_bits - FREQUENCY_BITS) / 8
        scalars = 1.8 * len(self.scalars)
        num_distinct = len(np.unique(np.concatenate([piece["ids"] for piece in sample] or [[]])))
        growth = math.sqrt(num_targets / max(num_rows, 1))
        # 1.2 to 1.6 bytes each, in shards of 2,048 to 32,768 targets at V of 4,096 to 151,936.
        vocabulary = 1.3 * min(self.vocab_size, num_distinct * growth) / max(num_targets, 1)
        # All other constants were fitted to the table in docs/results/cache.md.
        if isinstance(self.targets, TopK):
            return entries * (rank_bytes + 0.58) + 5.2 + scalars + vocabulary
        levels = 1.2 * entries + 1.9 if self.kind == "per_teacher" else 0.0
        return entries * (rank_bytes + 0.33) + 0.7 + levels + scalars + vocabulary


def encode_draws(logp_nV: Tensor, keys_n: np.ndarray, num_draws: int) -> dict[str, np.ndarray]:
    """Encode draws from (n, V) log-probabilities by (n,) uint64 keys. Equal keys draw the same."""
    drawn_nN = draw(logp_nV, keys_n, num_draws).sort(dim=1).values
    # Run-length encoding of the sorted draws, vectorized over all rows. The first draw of each row
    # starts a run, so no run crosses a row boundary.
    is_first_nN = torch.ones_like(drawn_nN, dtype=torch.bool)
    is_first_nN[:, 1:] = drawn_nN[:, 1:] != drawn_nN[:, :-1]
    run_starts = is_first_nN.flatten().nonzero().squeeze(1)
    end = run_starts.new_tensor([drawn_nN.numel()])
    dtype = np.min_scalar_type(num_draws)
    return {
        "sizes": is_first_nN.sum(1).cpu().numpy().astype(dtype),
        "ids": drawn_nN.flatten()[run_starts].cpu().numpy(),
        "counts": torch.cat([run_starts, end]).diff().cpu().numpy().astype(dtype),
    }


def encode_top_k(logp_nV: Tensor, k: int) -> dict[str, np.ndarray]:
    """Encode the k most likely tokens of (n, V) log-probabilities, and the mass of all others."""
    num_kept = min(k, logp_nV.shape[1])
    top = logp_nV.topk(num_kept, dim=1)
    # Logsumexp over the rest, because 1 - sum(kept) loses a tail below the rounding error.
    rest_nV = logp_nV.scatter(1, top.indices, -torch.inf)
    return {
        "sizes": np.full(len(logp_nV), num_kept, np.min_scalar_type(k)),
        "ids": top.indices.flatten().cpu().numpy(),
        "levels": _levels(top.values.flatten()),
        "log_tail": rest_nV.logsumexp(1).float().cpu().numpy(),
    }


def _log_mass(targets: Targets, columns: Columns) -> np.ndarray:
    """Return (E,) float32 log(count / N), or log-probabilities that sum, with the tail, to 1."""
    if isinstance(targets, Samples):
        return np.log(columns["counts"].astype(np.float64) / targets.draws).astype(np.float32)
    logp = -columns["levels"].astype(np.float64) * STEP
    log_tail = columns["log_tail"].astype(np.float64)
    if targets.renormalized:
        log_tail = np.full_like(log_tail, -np.inf)
    # The bound keeps log(0) out of rows whose tail rounds to the whole mass.
    log_kept = np.log(-np.expm1(np.minimum(log_tail, -1e-12)))
    scale = log_kept - np.log(_row_sums(np.exp(logp), columns["sizes"]))
    return (logp + np.repeat(scale, columns["sizes"])).astype(np.float32)


def log_z_name(temperature: float) -> str:
    """Return the column name of log Z_T."""
    return f"log_z_{temperature:g}"


def entropy_name(temperature: float) -> str:
    """Return the column name of H_T, which is `entropy` at temperature 1."""
    return "entropy" if temperature == 1.0 else f"entropy_{temperature:g}"


def draw(logp_nV: Tensor, keys_n: np.ndarray, num_draws: int) -> Tensor:
    """Draw (n, N) int64 independent samples from each row by inverting its CDF in float64."""
    cdf_nV = logp_nV.to(torch.float64, copy=True).exp_().cumsum_(1)
    total_n1 = cdf_nV[:, -1:]
    uniform_nN = torch.from_numpy(_uniforms(keys_n, num_draws)).to(logp_nV.device)
    # Strictly below the total, or a draw could land past the last token.
    below_n1 = torch.nextafter(total_n1, torch.zeros_like(total_n1))
    level_nN = torch.minimum(uniform_nN * total_n1, below_n1)
    # right=True skips tokens of zero mass, whose CDF equals that of the token before.
    return torch.searchsorted(cdf_nV, level_nN, right=True)


def row_keys(seed: int, document_n: np.ndarray, offset_n: np.ndarray) -> np.ndarray:
    """Return (n,) uint64 keys of the tokens at `offset_n` of documents with hashes `document_n`."""
    # Nothing else enters, so draws do not depend on batching, sharding or the order of the build.
    key_n = _mix(document_n.astype(np.uint64) ^ _mix(np.array([seed], np.uint64)))
    return _mix(key_n + _mix(offset_n.astype(np.uint64)))


def id_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Return the narrowest type that holds every token id, none of them reserved."""
    # A fixed uint16 gave 45 % of a vocabulary of 119,547 the wrong id, and a sentinel of -1 is a
    # valid token at V = 131,072: huggingface/transformers#2825, NVIDIA/Megatron-LM#5019.
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def _row_sums(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    # `reduceat` returns the next row's first value for an empty row, not 0; no row is empty.
    return np.add.reduceat(values, starts_of(sizes)[:-1]) if len(sizes) else values[:0]


def _levels(logp_E: Tensor) -> np.ndarray:
    return (-logp_E.double() / STEP).round().clamp(0, MAX_LEVEL).cpu().numpy().astype(np.uint16)


def _float16(name: str, values_n: Tensor) -> np.ndarray:
    exact = values_n.double().cpu().numpy()
    if num_nan := int(np.isnan(exact).sum()):
        raise ValueError(f"{name}: is NaN for {num_nan} rows; must be a number")
    largest = float(np.finfo(np.float16).max)
    return np.clip(exact, -largest, largest).astype(np.float16)


def _uniforms(keys_n: np.ndarray, num_draws: int) -> np.ndarray:
    """Return (n, N) float64 in [0, 1), a pure function of the keys."""
    steps = np.arange(1, num_draws + 1, dtype=np.uint64)
    bits = _mix(keys_n[:, None] + steps[None, :] * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    """Apply a bijection of uint64 whose values look random (SplitMix64).

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
