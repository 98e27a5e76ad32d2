"""Folders of transformers whose linear layers are quantized by torchao, for the CPU and others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from collegium.errors import ExportError, first_line
from collegium.export.fake_quantization import WeightGrid
from collegium.export.format import Format, copy_files, quiet
from collegium.options import torch

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig

GROUP_SIZE = 32
"""Weights that share a scale in 4 bits."""


@dataclass(frozen=True, kw_only=True)
class TorchAo(Format):
    """Weights of the linear layers in 8 bits by row, or 4 bits by group. Activations stay float.

    Embedding and head stay float32. torchao 0.18 packs two 4-bit values into a byte for CUDA and
    XPU only. On the CPU each takes a byte, so `torchao-int4` is no smaller than `torchao-int8`.
    """

    packages = ("torchao",)
    bits: Literal[4, 8]

    @property
    def grid(self) -> WeightGrid:
        return WeightGrid(bits=self.bits, group_size=GROUP_SIZE if self.bits == 4 else None)

    def write(self, student: Path, target: Path) -> None:
        from transformers import AutoModelForCausalLM, TorchAoConfig

        copy_files(student, target, weights=False)
        settings: Any = TorchAoConfig(self._config())
        # torchao and transformers raise errors of any type for layers that they cannot convert.
        try:
            with quiet():
                model: Any = AutoModelForCausalLM.from_pretrained(
                    student, quantization_config=settings, dtype=torch.float32, device_map="cpu"
                )
                model.save_pretrained(target)
        except Exception as error:
            raise ExportError(
                f"{student}: cannot be quantized to {self.bits} bits ({first_line(error)[:300]}); "
                "choose another format"
            ) from error

    def _config(self) -> AOBaseConfig:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

        if self.bits == 8:
            return Int8WeightOnlyConfig(version=2)
        return IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, "int4"),  # noqa: B009  (unknown to type checkers)
            granularity=PerGroup(GROUP_SIZE),
        )
