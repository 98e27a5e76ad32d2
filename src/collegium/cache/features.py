"""Compressed hidden states: a fitted projection with one byte per coefficient.

    c = B^T (x - mean)        B (D, R) with orthonormal columns, fitted on a first sample
    scale = max_r |c_r| / 127     codes_r = round(c_r / scale)     x' = mean + B (scale * codes)

B spans the R principal directions of the sample, turned by a random rotation.

Shapes: n rows, M rows of the sample, D width of the hidden state, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import safetensors.numpy
from pydantic import Field
from pydantic.dataclasses import dataclass as option_class

from collegium.types import STRICT

LEVELS = 127
"""Largest code. Codes are symmetric around 0."""


@option_class(frozen=True, kw_only=True, config=STRICT)
class FeatureCacheOptions:
    """Hidden states of the teachers, cached for feature terms."""

    rank: Annotated[int, Field(ge=1)] = 256
    """Coefficients of one byte per row, teacher and layer, at most the teacher's width."""
    fit_rows: Annotated[int, Field(ge=2)] = 4096
    """Rows, from the first windows, that the projection is fitted on."""


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

        Source: Pearson 1901 for the directions; the rotation as in QuaRot, arXiv 2404.00456.
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
        """Encode (n, D) states as (n, R) int8 codes and (n,) float32 scales.

        A coefficient has an error of at most scale / 2, so
        |x - x'| <= |x - mean - B c| + sqrt(R) scale / 2.
        """
        coefficient_nR = (hidden_nD.astype(np.float32) - self.mean_D) @ self.basis_DR
        scale_n = np.abs(coefficient_nR).max(1) / np.float32(LEVELS)
        # A state equal to the mean has scale 0 and codes 0.
        safe_n1 = np.where(scale_n > 0, scale_n, np.float32(1.0))[:, None]
        codes_nR = np.rint(coefficient_nR / safe_n1).clip(-LEVELS, LEVELS)
        return codes_nR.astype(np.int8), scale_n.astype(np.float32)

    def decode(self, codes_nR: np.ndarray, scale_n: np.ndarray) -> np.ndarray:
        """Decode (n, R) codes and (n,) scales to (n, D) float32."""
        coefficient_nR = codes_nR.astype(np.float32) * scale_n[:, None]
        return coefficient_nR @ self.basis_DR.T + self.mean_D


def projections_bytes(projections: Mapping[str, Projection]) -> bytes:
    """Serialize the projections of all taps as safetensors. Equal numbers give equal bytes."""
    tensors = {}
    for tap in sorted(projections):
        tensors[f"{tap}.mean"] = projections[tap].mean_D
        tensors[f"{tap}.basis"] = projections[tap].basis_DR
    return safetensors.numpy.save(tensors)


def read_projections(data: bytes) -> dict[str, Projection]:
    """Invert `projections_bytes`."""
    tensors = safetensors.numpy.load(data)
    taps = [name.removesuffix(".mean") for name in tensors if name.endswith(".mean")]
    return {tap: Projection(tensors[f"{tap}.mean"], tensors[f"{tap}.basis"]) for tap in taps}
