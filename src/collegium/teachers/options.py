"""Teachers of a recipe: the methods of every kind, and the kind that runs in this process.

A new kind is a class with these methods in a module of its own, and one line of `kinds.TEACHERS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from collegium.distributions import LIVE, Capabilities
from collegium.models.options import ModelOptions
from collegium.options import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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

    @property
    def needs_loading(self) -> bool:
        """Whether `facts` loads the weights."""
        return False

    def facts(self, where: str) -> ModelFacts | None:
        """Return facts about its architecture, None without hidden states, or raise ModelError."""
        return None

    @abstractmethod
    def load(self, name: str, *, vocab_size: int, where: str) -> Teacher:
        """Load the teacher. Raises ModelError if it cannot be loaded, or answers wrongly."""


@option
class LocalOptions(ModelOptions, TeacherOptions):
    """A frozen Hugging Face model in this process, with its own data type and device."""

    offload: bool = False
    """Keep the teacher on the CPU between its turns: slower, but holds one on the GPU."""
    logit_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on its logits: makes a teacher more (above 1) or less confident than it is, for stress
    tests."""

    def load(self, name: str, *, vocab_size: int, where: str) -> Teacher:
        from collegium.teachers.local import LocalTeacher

        teacher = LocalTeacher.load(name, self, vocab_size=vocab_size, where=where)
        teacher.probe(where)
        return teacher
