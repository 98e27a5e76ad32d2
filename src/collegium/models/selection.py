"""Options that select a model, for a teacher or for the student."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from collegium.options import option

DType = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
WITHOUT_EFFECT = frozenset({"model", "tokenizer", "device", "offload", "trust_remote_code"})
"""Teacher options that do not change its outputs; `model` is replaced by a digest."""


@option
class ModelOptions:
    """Location and loading options of one model, independent of those of other models."""

    # Inheriting quantization or dtype from the student is a known trap (huggingface/trl#6720).
    model: Annotated[str, Field(min_length=1)]
    """A Hugging Face model folder, or a hub id `owner/name`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """Folder of the tokenizer if it differs from `model`."""
    dtype: DType = "auto"
    """Data type of the weights. `auto` keeps the type of the checkpoint."""
    device: Device = "auto"
    """`auto` is the first CUDA device, else MPS, else the CPU."""
    attention: Attention = "auto"
    """`auto` is `sdpa` if the model supports it, else `eager`."""
    trust_remote_code: bool = False
    """Run the Python files shipped with the model; review them first."""

    @property
    def tokenizer_path(self) -> str:
        """Path of the tokenizer: `tokenizer`, defaulting to `model`."""
        return self.tokenizer or self.model


@option
class TeacherOptions(ModelOptions):
    """One teacher: a model of its own, with its own number type and device."""

    offload: bool = False
    """Keep the teacher on the CPU between its turns: slower, but one teacher at a time on the GPU."""
    logit_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on its logits: makes a teacher more (above 1) or less confident than it is, for stress
    tests."""

    def identity(self) -> dict[str, Any]:
        """Return the options that its outputs depend on; its weights are identified by digest."""
        # By exclusion: a new option that is forgotten here makes caches stale, never wrong.
        return {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name not in WITHOUT_EFFECT
        }


@option
class StudentOptions:
    """Options of the student: `model` for pretrained weights, or `config` and `tokenizer`."""

    model: str | None = None
    """A Hugging Face model folder, or a hub id `owner/name`."""
    config: dict[str, Any] | None = None
    """A transformers config with `model_type`. `vocab_size` defaults to the tokenizer's."""
    tokenizer: str | None = None
    """Folder of the tokenizer, required with `config`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of the trained weights."""
    device: Device = "auto"
    """`auto` is the first CUDA device, else MPS, else the CPU."""
    attention: Attention = "auto"
    """`auto` is `sdpa` if the model supports it, else `eager`."""
    trust_remote_code: bool = False
    """Run the Python files shipped with the model; review them first."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass to save memory."""

    @model_validator(mode="after")
    def _check_source(self) -> StudentOptions:
        if (self.model is None) == (self.config is None):
            raise ValueError(
                "got both or neither of `model` and `config`; must be exactly one: "
                "`model` for pretrained weights, `config` for a new student"
            )
        if self.config is not None and self.tokenizer is None:
            raise ValueError("got `config` without `tokenizer`; must name a tokenizer folder")
        return self
