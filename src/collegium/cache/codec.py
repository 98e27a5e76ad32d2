"""Codecs between dense distributions and sparse targets: random draws, or top-k with its tail.

Shapes: n rows, V vocabulary, N draws per row, k kept tokens per row, E stored entries of all rows.

Error bounds:
    draws    t = counts / N has E[t] = p exactly and Var[t_i] = p_i (1 - p_i) / N. Storage is exact.
    top-k    The tail is exact to float32. A kept log-probability is within `STEP` of the true one:
             it is rounded to a multiple of `STEP`, then all kept ones are scaled, by less than half
             a step, to sum to 1 - tail.
    levels   Log-probabilities of drawn tokens are within `STEP` / 2, down to `-MAX_LEVEL * STEP`.
    scalars  float16, a relative error of 2^-11: below the precision of a bfloat16 teacher, at half
             the bytes of float32.
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

from collegium.distributions import NamedRows
from collegium.types import STRICT

# bfloat16 logits near 16 are spaced eight times as far apart.
STEP = 1 / 64
"""Quantization step of stored log-probabilities, in nats."""
MAX_LEVEL = 2**16 - 1
MAX_DRAWS = 2**16 - 1
SCALARS = ("entropy", "label_logp", "max_logp", "disagreement")
"""Per row of a fused target, in nats: H(P), log P(label), max log P, teacher disagreement."""
_FLOAT16_MAX = float(np.finfo(np.float16).max)


@plain_dataclass(frozen=True, slots=True)
class EncodedRows:
    """Stored form of the targets of n rows."""

    sizes: np.ndarray
    """(n,) uint8 or uint16: number of entries of each row."""
    ids: np.ndarray
    """(E,) uint16 or uint32: token ids, unique within a row."""
    values: np.ndarray
    """(E,) counts as uint8 or uint16. For top-k, levels: steps of `STEP` below 0, as uint16."""
    log_tail: np.ndarray | None
    """(n,) float32: log of the mass of all other tokens. None for draws."""
    scalars: Mapping[str, np.ndarray]
    """(n,) float16 each, by name. The layout of the cache lists the names."""
    levels: np.ndarray | None = None
    """(E,) uint16: -log P(token) of drawn tokens in `STEP`s. None for top-k and fused targets."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Samples:
    """Independent draws from the distribution, stored as tokens with counts. Unbiased.

    t_i = count_i / N. Supports only forward KL and cross-entropy, at temperature 1.

    Source: Anshumann et al. 2025, arXiv 2503.16870.
    """

    draws: Annotated[int, Field(ge=1, le=MAX_DRAWS)] = 50
    """Draws per token of text."""

    def encode(self, logp_nV: Tensor, keys_n: np.ndarray) -> tuple[np.ndarray, ...]:
        """Encode (n, V) log-probabilities with (n,) uint64 keys as sizes, ids and counts.

        Equal keys give equal draws.
        """
        drawn_nN = draw(logp_nV, keys_n, self.draws).sort(dim=1).values
        # Run-length encoding of the sorted draws, vectorized over all rows. The first draw of each
        # row starts a run, so no run crosses a row boundary.
        is_first_nN = torch.ones_like(drawn_nN, dtype=torch.bool)
        is_first_nN[:, 1:] = drawn_nN[:, 1:] != drawn_nN[:, :-1]
        run_starts = is_first_nN.flatten().nonzero().squeeze(1)
        end = run_starts.new_tensor([drawn_nN.numel()])
        counts = torch.cat([run_starts, end]).diff()
        dtype = uint_for(self.draws)
        return (
            is_first_nN.sum(1).cpu().numpy().astype(dtype),
            drawn_nN.flatten()[run_starts].cpu().numpy(),
            counts.cpu().numpy().astype(dtype),
        )

    def decode(self, encoded: EncodedRows) -> np.ndarray:
        """Return (E,) float32 log(count / N)."""
        return np.log(encoded.values.astype(np.float64) / self.draws).astype(np.float32)

    def find_problem(self, encoded: EncodedRows) -> str | None:
        """Describe the first inconsistency of stored rows, or return None."""
        totals = row_sums(encoded.values.astype(np.int64), encoded.sizes)
        if (encoded.values == 0).any() or (totals != self.draws).any():
            return f"counts of a row do not add up to {self.draws}"
        return None

    def num_entries(self, vocab_size: int) -> int:
        """Estimate the entries per row."""
        # Measured on English text: 9 of 24 draws are unique, and 15 of 50.
        return min(vocab_size, max(1, round(self.draws**0.7)))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TopK:
    """The k most likely tokens, with all others as one bucket of exact mass."""

    k: Annotated[int, Field(ge=1, le=MAX_DRAWS)] = 50
    """Tokens kept per token of text."""
    renormalized: bool = False
    """Drop the tail and renormalize the kept tokens. Biased: a baseline for comparisons."""

    def encode(self, logp_nV: Tensor) -> tuple[np.ndarray, ...]:
        """Encode (n, V) log-probabilities as sizes, ids, levels and log-tails."""
        num_kept = min(self.k, logp_nV.shape[1])
        top = logp_nV.topk(num_kept, dim=1)
        # Logsumexp over the rest, because 1 - sum(kept) loses a tail below the rounding error.
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
        """Return (E,) float32 log-probabilities that sum, with the tail, to 1."""
        assert encoded.log_tail is not None
        sizes = encoded.sizes.astype(np.int64)
        logp = -encoded.values.astype(np.float64) * STEP
        log_tail = (
            np.full(len(sizes), -np.inf)
            if self.renormalized
            else encoded.log_tail.astype(np.float64)
        )
        # The bound keeps log(0) out of rows whose tail rounds to the whole mass.
        log_kept = np.log(-np.expm1(np.minimum(log_tail, -1e-12)))
        scale = log_kept - np.log(row_sums(np.exp(logp), encoded.sizes))
        return (logp + np.repeat(scale, sizes)).astype(np.float32)

    def find_problem(self, encoded: EncodedRows) -> str | None:
        """Describe the first inconsistency of stored rows, or return None."""
        tail = encoded.log_tail
        if tail is None or np.isnan(tail).any() or (tail > 0).any():
            return "a tail is not a log-probability"
        return None

    def num_entries(self, vocab_size: int) -> int:
        """Return the entries per row."""
        return min(self.k, vocab_size)


Targets = Samples | TopK
TARGETS: dict[str, type[Samples] | type[TopK]] = {"samples": Samples, "top_k": TopK}
"""Codecs by their names in recipes and manifests."""


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
        targets: the codec.
        logp_nV: (n, V) normalized log-probabilities.
        keys_n: (n,) uint64 from `row_keys`, ignored by top-k.
        scalars: (n,) nats, by name.
        with_levels: also keep the log-probabilities of drawn tokens (implied by top-k).

    Raises:
        ValueError: a scalar is NaN.
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
    """Concatenate rows of at least one part."""
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
    """Split rows into runs of `counts` rows each, which must add up to all of them."""
    row_at = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    entry_at = np.concatenate([[0], np.cumsum(rows.sizes.astype(np.int64))])
    parts = []
    for start, stop in pairwise(row_at.tolist()):
        entries = slice(int(entry_at[start]), int(entry_at[stop]))
        parts.append(
            EncodedRows(
                sizes=rows.sizes[start:stop],
                ids=rows.ids[entries],
                values=rows.values[entries],
                log_tail=None if rows.log_tail is None else rows.log_tail[start:stop],
                scalars={name: values_n[start:stop] for name, values_n in rows.scalars.items()},
                levels=None if rows.levels is None else rows.levels[entries],
            )
        )
    return parts


def decode_rows(targets: Targets, encoded: EncodedRows, vocab_size: int) -> NamedRows:
    """Decode stored rows to distributions.

    Raises:
        ValueError: `encode_rows` never writes such rows.
    """
    sizes = encoded.sizes.astype(np.int64)
    if sizes.sum() != len(encoded.ids) or len(encoded.ids) != len(encoded.values):
        raise ValueError("entries do not match the sizes of the rows")
    if (sizes < 1).any() or (encoded.ids.size and int(encoded.ids.max()) >= vocab_size):
        raise ValueError(f"an empty row, or a token not below {vocab_size}")
    if encoded.levels is not None and len(encoded.levels) != len(encoded.ids):
        raise ValueError("levels do not match the entries")
    if problem := targets.find_problem(encoded):
        raise ValueError(problem)
    tail = None
    if encoded.log_tail is not None and not (isinstance(targets, TopK) and targets.renormalized):
        tail = torch.from_numpy(encoded.log_tail.copy())
    return NamedRows(
        starts=torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)])),
        ids=torch.from_numpy(encoded.ids.astype(np.int64)),
        logp=torch.from_numpy(targets.decode(encoded)),
        log_tail=tail,
        vocab_size=vocab_size,
        is_sampled=isinstance(targets, Samples),
    )


def draw(logp_nV: Tensor, keys_n: np.ndarray, num_draws: int) -> Tensor:
    """Draw (n, N) int64 independent samples from each row by inverting its CDF in float64."""
    cdf_nV = logp_nV.to(torch.float64, copy=True).exp_().cumsum_(1)
    total_n1 = cdf_nV[:, -1:]
    uniform_nN = torch.from_numpy(_uniforms(keys_n, num_draws)).to(logp_nV.device)
    # Strictly below the total, or a draw could land past the last token.
    level_nN = torch.minimum(
        uniform_nN * total_n1, torch.nextafter(total_n1, torch.zeros_like(total_n1))
    )
    # right=True skips tokens of zero mass, whose CDF equals that of the token before.
    return torch.searchsorted(cdf_nV, level_nN, right=True)


def row_keys(seed: int, document_n: np.ndarray, offset_n: np.ndarray) -> np.ndarray:
    """Return (n,) uint64 keys of the tokens at `offset_n` of documents with hashes `document_n`."""
    # Nothing else enters, so draws do not depend on batching, sharding or the order of the build.
    with np.errstate(over="ignore"):
        key_n = _mix(document_n.astype(np.uint64) ^ _mix(np.array([seed], np.uint64)))
        return _mix(key_n + _mix(offset_n.astype(np.uint64)))


def id_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """Return the narrowest type that holds every token id, none of them reserved."""
    # A fixed uint16 gave 45 % of a vocabulary of 119,547 the wrong id, and a sentinel of -1 is a
    # valid token at V = 131,072: huggingface/transformers#2825, NVIDIA/Megatron-LM#5019.
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def uint_for(largest: int) -> type[np.unsignedinteger]:
    """Return uint8 or uint16, whichever is the narrowest that holds `largest`."""
    return np.uint8 if largest < 2**8 else np.uint16


def row_sums(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Sum (E,) values over the entries of each of n rows, none of them empty."""
    # `reduceat` returns the next row's first value for an empty row, not 0.
    sizes = sizes.astype(np.int64)
    return np.add.reduceat(values, np.cumsum(sizes) - sizes) if len(sizes) else values[:0]


def _levels(logp_nV: Tensor, sizes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return (E,) log-probabilities of the entries of n rows, in steps."""
    rows = torch.arange(len(logp_nV)).repeat_interleave(torch.from_numpy(sizes.astype(np.int64)))
    logp_E = logp_nV[rows.to(logp_nV.device), torch.from_numpy(ids).to(logp_nV.device)]
    return (-logp_E.double() / STEP).round().clamp(0, MAX_LEVEL).cpu().numpy().astype(np.uint16)


def _float16(name: str, values_n: Tensor) -> np.ndarray:
    exact = values_n.double().cpu().numpy()
    if np.isnan(exact).any():
        raise ValueError(f"{name}: is NaN for {int(np.isnan(exact).sum())} rows; must be a number")
    return np.clip(exact, -_FLOAT16_MAX, _FLOAT16_MAX).astype(np.float16)


def _uniforms(keys_n: np.ndarray, num_draws: int) -> np.ndarray:
    """Return (n, N) float64 in [0, 1), a pure function of the keys."""
    steps = np.arange(1, num_draws + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = _mix(keys_n[:, None] + steps[None, :] * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    """Apply a bijection of uint64 whose values look random (SplitMix64).

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    with np.errstate(over="ignore"):
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
