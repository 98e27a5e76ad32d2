"""Teachers of a recipe: the methods of every kind, and the kind that runs in this process.

A new kind is a class with these methods in a module of its own, and one line of `kinds.TEACHERS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from collegium.distributions import LIVE, Capabilities
from collegium.errors import ModelError
from collegium.models import folder
from collegium.models.options import ModelOptions
from collegium.models.quantized import (
    Quantization,
    no_layers_error,
    quantized_bytes,
    quantized_layers,
    require_torchao,
)
from collegium.models.used_vocabulary import check_adapter
from collegium.models.weights import quantization_of
from collegium.options import option, torch

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from collegium.distributions import Teacher
    from collegium.models.options import ModelFacts


class TeacherOptions(ABC):
    """One kind of teacher: its options, and everything that a run asks of it."""

    @property
    def capabilities(self) -> Capabilities:
        """The operations that its answers support."""
        return LIVE

    def paths(self) -> dict[str, str]:
        """Return the folders or hub ids that are read, by the name of their option."""
        return {}

    @abstractmethod
    def check(self, where: str) -> None:
        """Check options and files without reading weights. Raises ModelError if they are bad."""

    def warnings(self, where: str) -> list[str]:
        """Read files that are about to be used once, and return warnings, or raise ModelError."""
        return []

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return everything that its answers depend on, as plain data. Caches are keyed by it."""

    @abstractmethod
    def load_tokenizer(self, where: str) -> PreTrainedTokenizerFast:
        """Load the tokenizer, to compare vocabularies. Raises ModelError if there is none."""

    @abstractmethod
    def head_rows(self, where: str) -> int:
        """Return the number of tokens that share its probability, or raise ModelError."""

    def max_length(self, where: str) -> int | None:
        """Return the largest number of positions, None without a limit, or raise ModelError."""
        return None

    def check_windows(self, where: str, *, packed: bool, max_length: int) -> None:
        """Raise ModelError if documents of a window or batch would change each other's answers.

        `packed` is whether a window may hold several documents.
        """
        del where, packed, max_length

    def check_used(self, kept_U: np.ndarray, where: str) -> None:
        """Raise ModelError if it cannot answer for some of its tokens only, of ids (U,)."""
        del kept_U, where

    @property
    def needs_loading(self) -> bool:
        """Whether `facts` loads the weights."""
        return False

    def facts(self, where: str) -> ModelFacts | None:
        """Return facts about its architecture, None without hidden states, or raise ModelError."""
        return None

    @abstractmethod
    def load(
        self, name: str, *, vocab_size: int, kept_U: np.ndarray | None = None, where: str
    ) -> Teacher:
        """Load the teacher. Raises ModelError if it cannot be loaded, or answers wrongly.

        `vocab_size` is that of the student. `kept_U` are the ids of its tokens in the vocabulary of
        the teacher, (U,), None if the student has all tokens.
        """


@option
class LocalOptions(ModelOptions, TeacherOptions):
    """A frozen Hugging Face model in this process, with its own data type and device."""

    offload: bool = False
    """Keep the teacher on the CPU between its turns: slower, but holds one on the GPU."""
    shard: bool = False
    """Keep a share of its layers in each of several processes that train, and gather a layer while
    it runs. Before, the teacher is on the CPU between its turns. No effect in one process."""
    quantize: Quantization | None = None
    """Round the linear layers on load: `int8` or `int4`. Embeddings and head keep their type."""
    logit_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on its logits: makes a teacher more (above 1) or less confident than it is, for stress
    tests."""

    def check(self, where: str) -> None:
        excluded = {"adapter": self.adapter, "quantize": self.quantize, "offload": self.offload}
        for key, value in excluded.items() if self.shard else ():
            if value:
                raise ModelError(
                    f"{where}.shard: got true with `{key}`; must be that of a plain model; "
                    f"remove `{key}` or `shard`"
                )
        super().check(where)
        if self.quantize is not None:
            require_torchao(f"{where}.quantize")
        path = folder.resolve_folder(self.model, where=where)
        method = None if path is None else quantization_of(path, where=where)
        given = {"quantize": self.quantize, "offload": self.offload, "shard": self.shard}
        for key, value in given.items() if method else ():
            if value:
                raise ModelError(
                    f"{where}.{key}: got {str(value).lower()} with weights that are quantized by "
                    f"{method}; must be omitted; use the original model, or remove `{key}`"
                )

    def check_model(self, model: PreTrainedModel, where: str) -> None:
        if self.quantize is not None and not quantized_layers(model, self.quantize):
            raise no_layers_error(model, self.quantize, where=f"{where}.quantize")

    def weight_form(self, where: str) -> str | None:
        if self.quantize is not None:
            return f"rounded to {self.quantize} by torchao"
        return super().weight_form(where)

    def num_bytes(self, model: PreTrainedModel, device: torch.device, where: str) -> int:
        if self.quantize is not None:
            return quantized_bytes(model, self.quantize, device)
        return super().num_bytes(model, device, where)

    def check_used(self, kept_U: np.ndarray, where: str) -> None:
        check_adapter(self, kept_U, where=f"{where}.adapter")

    def load(
        self, name: str, *, vocab_size: int, kept_U: np.ndarray | None = None, where: str
    ) -> Teacher:
        from collegium.teachers.local import LocalTeacher

        return LocalTeacher.load(name, self, vocab_size=vocab_size, kept_U=kept_U, where=where)
