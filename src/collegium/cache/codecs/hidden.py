"""Codec of hidden states: a fitted projection with one byte per coefficient.

    c = B^T (x - mean)        B (D, R) with orthonormal columns, fitted on a first sample
    scale = max_r |c_r| / 127     codes_r = 128 + round(c_r / scale)
    x' = mean + B (scale * (codes - 128))

B spans the R principal directions of the sample, turned by a random rotation.
Encoded columns of each tap: `TAP.codes` (n, R) uint8, `TAP.scales` (n,) float32.

Shapes: n rows, M rows of the sample, D width of the hidden state, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from collegium.cache.shards import Columns, ListColumn, join_columns, starts_of

LEVELS = 127
"""Largest size of a code. Codes are symmetric around `OFFSET`."""
# Signed codes cost 1.4 bytes each on disk, because Parquet extends them to 32 bits and the bytes of
# the sign do not compress away. Unsigned ones cost 0.93, the entropy of normal coefficients.
OFFSET = 128


@dataclass(frozen=True, slots=True)
class Projection:
    """Affine map from hidden states to R coefficients, and back."""

    mean_D: np.ndarray
    """(D,) float32."""
    basis_DR: np.ndarray
    """(D, R) float32, orthonormal columns."""

    @classmethod
    def fit(cls, hidden_MD: np.ndarray, rank: int, *, seed: int) -> Projection:
        """Fit the R principal directions of a sample in float64, rotated at random by the seed.

        R is at most D. With fewer rows than R, some directions are arbitrary. They are kept for
        later rows.

        Source: Pearson 1901 for the directions, QuaRot (arXiv 2404.00456) for the rotation.
        """
        hidden_MD = hidden_MD.astype(np.float64)
        mean_D = hidden_MD.mean(0)
        centered_MD = hidden_MD - mean_D
        _, vectors_DD = np.linalg.eigh(centered_MD.T @ centered_MD)
        rank = min(rank, hidden_MD.shape[1])
        main_DR = vectors_DD[:, ::-1][:, :rank]
        # Principal coefficients differ by orders of magnitude, so one scale per row would round the
        # small ones to zero. A rotation makes all of them alike.
        noise_RR = np.random.default_rng(seed).standard_normal((rank, rank))
        rotation_RR, _ = np.linalg.qr(noise_RR)
        basis_DR = main_DR @ rotation_RR
        return cls(mean_D.astype(np.float32), np.ascontiguousarray(basis_DR, np.float32))

    def encode(self, hidden_nD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Encode (n, D) states as (n, R) uint8 codes and (n,) float32 scales.

        A coefficient has an error of at most scale / 2, so
        |x - x'| <= |x - mean - B c| + sqrt(R) scale / 2.
        """
        coefficient_nR = (hidden_nD.astype(np.float32) - self.mean_D) @ self.basis_DR
        scale_n = np.abs(coefficient_nR).max(1) / np.float32(LEVELS)
        # A state equal to the mean has scale 0 and codes without a size.
        safe_n1 = np.where(scale_n > 0, scale_n, np.float32(1.0))[:, None]
        codes_nR = np.rint(coefficient_nR / safe_n1).clip(-LEVELS, LEVELS) + OFFSET
        return codes_nR.astype(np.uint8), scale_n.astype(np.float32)

    def decode(self, codes_nR: np.ndarray, scale_n: np.ndarray) -> np.ndarray:
        """Decode (n, R) codes and (n,) scales, which broadcast over R, to (n, D) float32."""
        coefficient_nR = (codes_nR.astype(np.float32) - OFFSET) * scale_n[:, None]
        return coefficient_nR @ self.basis_DR.T + self.mean_D


@dataclass(frozen=True, slots=True)
class HiddenCodec:
    """Columns of a cache of hidden states, by tap."""

    shared: ClassVar[str] = ""
    entries: ClassVar[frozenset[str]] = frozenset()
    group_targets: ClassVar[int] = 1000

    projections: Mapping[str, Projection]

    @property
    def unread(self) -> frozenset[str]:
        return frozenset()

    @classmethod
    def load(cls, data: bytes) -> HiddenCodec:
        """Read the side file, or raise ValueError."""
        try:
            tensors = safetensors.numpy.load(data)
            # Sorted, because safetensors loads them in any order: a shard's bytes are reproducible.
            taps = sorted(n.removesuffix(".mean") for n in tensors if n.endswith(".mean"))
            pairs = {tap: (tensors[f"{tap}.mean"], tensors[f"{tap}.basis"]) for tap in taps}
        except (safetensors.SafetensorError, KeyError) as error:
            problem = f"layers: got no projections ({error}); must be in the side file"
            raise ValueError(problem) from error
        if not pairs or any(basis.shape[:-1] != mean.shape for mean, basis in pairs.values()):
            raise ValueError("layers: got other shapes; must be projections (D,) and (D, R)")
        return cls({tap: Projection(*pair) for tap, pair in pairs.items()})

    def dump(self) -> bytes:
        """Serialize the projections as safetensors. Equal numbers give equal bytes."""
        tensors = {}
        for tap in sorted(self.projections):
            tensors[f"{tap}.mean"] = self.projections[tap].mean_D
            tensors[f"{tap}.basis"] = self.projections[tap].basis_DR
        return safetensors.numpy.save(tensors)

    def encode(self, states: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Encode the (n, D) hidden states of each tap."""
        columns: dict[str, np.ndarray] = {}
        for tap, projection in self.projections.items():
            columns[f"{tap}.codes"], columns[f"{tap}.scales"] = projection.encode(states[tap])
        return columns

    def num_targets(self, columns: Columns) -> int:
        return len(columns[f"{next(iter(self.projections))}.scales"])

    def pack(self, pieces: Sequence[Columns]) -> dict[str, ListColumn]:
        row_at = starts_of([self.num_targets(piece) for piece in pieces])
        columns = join_columns(pieces).items()
        # Codes have R values per row, scales one.
        return {n: ListColumn(v.reshape(-1), row_at * v[:1].size) for n, v in columns}

    def unpack(self, columns: Columns, shared: np.ndarray | None) -> dict[str, np.ndarray]:
        num_rows = self.num_targets(columns)
        rows = {}
        for tap, projection in self.projections.items():
            codes_x, scale_n = columns[f"{tap}.codes"], columns[f"{tap}.scales"]
            rank = projection.basis_DR.shape[1]
            if len(scale_n) != num_rows or len(codes_x) != num_rows * rank:
                count = f"{len(codes_x)} values for {num_rows} targets"
                raise ValueError(f"column `{tap}.codes` has {count}")
            rows[f"{tap}.codes"], rows[f"{tap}.scales"] = codes_x.reshape(num_rows, rank), scale_n
        return rows

    def decode(self, columns: Columns) -> dict[str, Tensor]:
        """Return the (n, D) float32 hidden states of each tap."""
        states = {}
        for tap, projection in self.projections.items():
            hidden_nD = projection.decode(columns[f"{tap}.codes"], columns[f"{tap}.scales"])
            states[tap] = torch.from_numpy(hidden_nD)
        return states

    def bytes_per_target(self, sample: Sequence[Columns], num_targets: int) -> float:
        """Return an upper bound: one byte per coefficient, and four per scale."""
        return sum(projection.basis_DR.shape[1] + 4.0 for projection in self.projections.values())
