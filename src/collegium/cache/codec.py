"""Dense distributions to sparse targets and back: random draws, or the top k with their tail.

Shapes: n rows, V vocabulary, N draws per row, k kept tokens per row, E stored entries of all rows together.

Errors. Draws: the target t = counts / N has E[t] = p exactly and Var[t_i] = p_i (1 - p_i) / N; what is stored is exact.
Top k: the tail is that of the distribution to float32; each kept log-probability is within `STEP` of the true one, since
it is rounded to multiples of `STEP` and the kept ones are then scaled, by less than half a step, to sum to 1 - tail.
Levels, the log-probabilities of drawn tokens, are within `STEP` / 2, down to `-MAX_LEVEL * STEP`.
Scalars are float16: within 2^-11 of their value, below what bfloat16 teachers leave of it, at half the bytes of float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from collegium.types import STRICT, SparseRows

STEP = 1 / 64
"""Nats between two log-probabilities that top k tells apart; logits of 16 in bfloat16 lie eight times as far apart."""
MAX_LEVEL = 2**16 - 1
MAX_DRAWS = 2**16 - 1
SCALARS = ("entropy", "label_logp", "max_logp", "disagreement")
"""Per row of a fused target, in nats: H(P), log P(label), max log P, and how far the teachers are apart."""
_FLOAT16_MAX = float(np.finfo(np.float16).max)


@plain_dataclass(frozen=True, slots=True)
class EncodedRows:
    """The targets of n rows as they are stored."""

    sizes: np.ndarray
    """(n,) uint8 or uint16: entries of each row."""
    ids: np.ndarray
    """(E,) uint16 or uint32: tokens, each once in a row."""
    values: np.ndarray
    """(E,) counts as uint8 or uint16; or, for top k, levels: steps of `STEP` below 0, as uint16."""
    log_tail: np.ndarray | None
    """(n,) float32: log of the mass of all other tokens; None for draws."""
    scalars: Mapping[str, np.ndarray]
    """(n,) float16 each, by name; which ones, the layout of the cache says."""
    levels: np.ndarray | None = None
    """(E,) uint16: -log P(token) of each drawn token in steps of `STEP`; None where nobody will ask."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Samples:
    """Independent draws from the distribution, as tokens with counts; unbiased.

    t_i = count_i / N. Serves forward KL and cross-entropy alone, at temperature 1.

    Source: Anshumann et al. 2025, arXiv 2503.16870.
    """

    draws: Annotated[int, Field(ge=1, le=MAX_DRAWS)] = 50
    """Draws per token of text."""

    def encode(self, logp_nV: Tensor, keys_n: np.ndarray) -> tuple[np.ndarray, ...]:
        """(n, V) log-probabilities, (n,) uint64 keys -> sizes, ids, counts; equal keys give equal draws."""
        drawn_nN = draw(logp_nV, keys_n, self.draws).sort(dim=1).values
        is_first_nN = torch.ones_like(drawn_nN, dtype=torch.bool)
        is_first_nN[:, 1:] = drawn_nN[:, 1:] != drawn_nN[:, :-1]
        at = is_first_nN.flatten().nonzero().squeeze(1)
        end = at.new_tensor([drawn_nN.numel()])
        counts = torch.cat([at, end]).diff()
        dtype = uint_for(self.draws)
        return (
            is_first_nN.sum(1).cpu().numpy().astype(dtype),
            drawn_nN.flatten()[at].cpu().numpy(),
            counts.cpu().numpy().astype(dtype),
        )

    def decode(self, encoded: EncodedRows) -> np.ndarray:
        """(E,) float32: log(count / N)."""
        return np.log(encoded.values.astype(np.float64) / self.draws).astype(np.float32)

    def problem(self, encoded: EncodedRows) -> str | None:
        """What is wrong with stored rows, if anything is."""
        totals = row_sums(encoded.values.astype(np.int64), encoded.sizes)
        if (encoded.values == 0).any() or (totals != self.draws).any():
            return f"counts of a row do not add up to {self.draws}"
        return None

    def num_entries(self, vocab_size: int) -> int:
        """Entries per row to expect, for an estimate: 9 of 24 draws differ on English text, and 15 of 50."""
        return min(vocab_size, max(1, round(self.draws**0.7)))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TopK:
    """The k most likely tokens, and all others as one bucket with its exact mass."""

    k: Annotated[int, Field(ge=1, le=MAX_DRAWS)] = 50
    """Tokens kept per token of text."""
    renormalized: bool = False
    """Teach the kept tokens alone, as if the others had no mass: biased, and here to be measured against."""

    def encode(self, logp_nV: Tensor) -> tuple[np.ndarray, ...]:
        """(n, V) log-probabilities -> sizes, ids, levels and tail."""
        num_kept = min(self.k, logp_nV.shape[1])
        top = logp_nV.topk(num_kept, dim=1)
        rest_nV = logp_nV.scatter(1, top.indices, -torch.inf)
        log_tail_n = rest_nV.logsumexp(1).clamp(max=0.0)
        level_nk = (-top.values.double() / STEP).round().clamp(0, MAX_LEVEL)
        return (
            np.full(len(logp_nV), num_kept, uint_for(self.k)),
            top.indices.flatten().cpu().numpy(),
            level_nk.flatten().cpu().numpy().astype(np.uint16),
            log_tail_n.float().cpu().numpy(),
        )

    def decode(self, encoded: EncodedRows) -> np.ndarray:
        """(E,) float32 log-probabilities that sum, with the tail, to 1."""
        assert encoded.log_tail is not None
        sizes = encoded.sizes.astype(np.int64)
        logp = -encoded.values.astype(np.float64) * STEP
        log_tail = (
            np.full(len(sizes), -np.inf)
            if self.renormalized
            else encoded.log_tail.astype(np.float64)
        )
        log_kept = np.log(-np.expm1(np.minimum(log_tail, -1e-12)))
        scale = log_kept - np.log(row_sums(np.exp(logp), encoded.sizes))
        return (logp + np.repeat(scale, sizes)).astype(np.float32)

    def problem(self, encoded: EncodedRows) -> str | None:
        """What is wrong with stored rows, if anything is."""
        tail = encoded.log_tail
        if tail is None or np.isnan(tail).any() or (tail > 0).any():
            return "a tail is no log-probability"
        return None

    def num_entries(self, vocab_size: int) -> int:
        """Entries per row."""
        return min(self.k, vocab_size)


Targets = Samples | TopK
TARGETS: dict[str, type[Samples] | type[TopK]] = {"samples": Samples, "top_k": TopK}
"""The names that a recipe knows."""


def encode_rows(
    targets: Targets,
    logp_nV: Tensor,
    keys_n: np.ndarray,
    *,
    scalars: Mapping[str, Tensor],
    with_levels: bool = False,
) -> EncodedRows:
    """Encode the targets of n rows.

    Args:
        targets: how.
        logp_nV: (n, V) normalized log-probabilities.
        keys_n: (n,) uint64 from `row_keys`; read by draws alone.
        scalars: (n,) nats, by name.
        with_levels: also keep the log-probabilities of drawn tokens; top k has them anyway.

    Raises:
        ValueError: a scalar is not a number.
    """
    levels = None
    if isinstance(targets, Samples):
        sizes, ids, values = targets.encode(logp_nV, keys_n)
        log_tail = None
        if with_levels:
            levels = _levels(logp_nV, sizes, ids)
    else:
        sizes, ids, values, log_tail = targets.encode(logp_nV)
    return EncodedRows(
        sizes=sizes,
        ids=ids.astype(id_dtype(logp_nV.shape[1])),
        values=values,
        log_tail=log_tail,
        scalars={name: _float16(name, values_n) for name, values_n in scalars.items()},
        levels=levels,
    )


def join_encoded(parts: Sequence[EncodedRows]) -> EncodedRows:
    """Rows one after the other; at least one part."""
    tails = [part.log_tail for part in parts if part.log_tail is not None]
    levels = [part.levels for part in parts if part.levels is not None]
    names = parts[0].scalars
    return EncodedRows(
        sizes=np.concatenate([part.sizes for part in parts]),
        ids=np.concatenate([part.ids for part in parts]),
        values=np.concatenate([part.values for part in parts]),
        log_tail=np.concatenate(tails) if tails else None,
        scalars={name: np.concatenate([part.scalars[name] for part in parts]) for name in names},
        levels=np.concatenate(levels) if levels else None,
    )


def split_encoded(rows: EncodedRows, counts: Sequence[int]) -> list[EncodedRows]:
    """Rows cut into runs of `counts` rows each, which add up to all of them."""
    row_at = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    entry_at = np.concatenate([[0], np.cumsum(rows.sizes.astype(np.int64))])
    found = []
    for start, stop in pairwise(row_at.tolist()):
        entries = slice(int(entry_at[start]), int(entry_at[stop]))
        found.append(
            EncodedRows(
                sizes=rows.sizes[start:stop],
                ids=rows.ids[entries],
                values=rows.values[entries],
                log_tail=None if rows.log_tail is None else rows.log_tail[start:stop],
                scalars={name: values_n[start:stop] for name, values_n in rows.scalars.items()},
                levels=None if rows.levels is None else rows.levels[entries],
            )
        )
    return found


def decode_rows(targets: Targets, encoded: EncodedRows, vocab_size: int) -> SparseRows:
    """Stored rows as distributions.

    Raises:
        ValueError: the rows are not what `encode_rows` writes.
    """
    sizes = encoded.sizes.astype(np.int64)
    if sizes.sum() != len(encoded.ids) or len(encoded.ids) != len(encoded.values):
        raise ValueError("entries do not match the sizes of the rows")
    if (sizes < 1).any() or (encoded.ids.size and int(encoded.ids.max()) >= vocab_size):
        raise ValueError(f"an empty row, or a token not below {vocab_size}")
    if encoded.levels is not None and len(encoded.levels) != len(encoded.ids):
        raise ValueError("levels do not match the entries")
    if problem := targets.problem(encoded):
        raise ValueError(problem)
    tail = None
    if encoded.log_tail is not None and not (isinstance(targets, TopK) and targets.renormalized):
        tail = torch.from_numpy(encoded.log_tail.copy())
    return SparseRows(
        starts=torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)])),
        ids=torch.from_numpy(encoded.ids.astype(np.int64)),
        logp=torch.from_numpy(targets.decode(encoded)),
        log_tail=tail,
        vocab_size=vocab_size,
    )


def draw(logp_nV: Tensor, keys_n: np.ndarray, num_draws: int) -> Tensor:
    """(n, N) int64 independent draws from each row, by inverting the distribution function in float64."""
    cdf_nV = logp_nV.to(torch.float64, copy=True).exp_().cumsum_(1)
    total_n1 = cdf_nV[:, -1:]
    uniform_nN = torch.from_numpy(_uniforms(keys_n, num_draws)).to(logp_nV.device)
    # Strictly below the total, or a draw could land behind the last token.
    level_nN = torch.minimum(
        uniform_nN * total_n1, torch.nextafter(total_n1, torch.zeros_like(total_n1))
    )
    return torch.searchsorted(cdf_nV, level_nN, right=True)


def row_keys(seed: int, document_n: np.ndarray, offset_n: np.ndarray) -> np.ndarray:
    """(n,) uint64 keys of the tokens at `offset_n` of the documents with the hashes `document_n`."""
    with np.errstate(over="ignore"):
        key_n = _mix(document_n.astype(np.uint64) ^ _mix(np.array([seed], np.uint64)))
        return _mix(key_n + _mix(offset_n.astype(np.uint64)))


def id_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The narrowest type that holds every token of the vocabulary, none of them reserved."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def uint_for(largest: int) -> type[np.unsignedinteger]:
    """uint8 or uint16, whichever holds `largest`."""
    return np.uint8 if largest < 2**8 else np.uint16


def row_sums(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(E,) values summed over the entries of each of n rows; no row may be empty."""
    sizes = sizes.astype(np.int64)
    return np.add.reduceat(values, np.cumsum(sizes) - sizes) if len(sizes) else values[:0]


def _levels(logp_nV: Tensor, sizes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(E,) log-probabilities of the entries of n rows, in steps."""
    rows = torch.arange(len(logp_nV)).repeat_interleave(torch.from_numpy(sizes.astype(np.int64)))
    logp_E = logp_nV[rows.to(logp_nV.device), torch.from_numpy(ids).to(logp_nV.device)]
    return (-logp_E.double() / STEP).round().clamp(0, MAX_LEVEL).cpu().numpy().astype(np.uint16)


def _float16(name: str, values_n: Tensor) -> np.ndarray:
    found = values_n.double().cpu().numpy()
    if np.isnan(found).any():
        raise ValueError(f"{name}: is NaN for {int(np.isnan(found).sum())} rows; must be a number")
    return np.clip(found, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)


def _uniforms(keys_n: np.ndarray, num_draws: int) -> np.ndarray:
    """(n, N) float64 in [0, 1), a function of the keys alone."""
    steps = np.arange(1, num_draws + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = _mix(keys_n[:, None] + steps[None, :] * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose values look random.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014 (SplitMix64).
    """
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
