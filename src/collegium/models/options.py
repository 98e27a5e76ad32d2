"""A pretrained model in a recipe: its options, and what a run asks of it before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from collegium.options import option, plain

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

DType = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about the architecture of a model."""

    num_parameters: int
    tap_widths: Mapping[str, int]
    """Width of each hidden state that can be tapped, in order of depth."""


@option
class ModelOptions:
    """Location and loading options of one pretrained model, independent of other models."""

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

    WITHOUT_EFFECT: ClassVar = frozenset(
        {"model", "tokenizer", "device", "offload", "trust_remote_code"}
    )
    """Options that do not change the outputs; `model` is identified by a digest of its weights."""

    @property
    def tokenizer_path(self) -> str:
        """Path of the tokenizer: `tokenizer`, defaulting to `model`."""
        return self.tokenizer or self.model

    def paths(self) -> dict[str, str]:
        """Return the folders or hub ids that are read, by the name of their option."""
        paths = {"model": self.model, "tokenizer": self.tokenizer}
        return {name: path for name, path in paths.items() if path is not None}

    def check(self, where: str) -> None:
        """Check device, attention and files without reading weights or fetching a hub id.

        Raises:
            ModelError: the folder, a file in it, or the device cannot be used, or the names and
                shapes of the tensors do not match the config.
        """
        from collegium.models.folder import check_model_folder
        from collegium.models.loading import check_weights

        check_model_folder(self, where=where)
        check_weights(self, where=where)

    def warnings(self, where: str) -> list[str]:
        """Read the files once, and return warnings about settings and values.

        Raises:
            ModelError: a weight is not finite.
        """
        from collegium.models.folder import ignored_settings
        from collegium.models.loading import scan_folder

        return [*ignored_settings(self, where=where), *scan_folder(self, where=where)]

    def identity(self) -> dict[str, Any]:
        """Return everything that the outputs depend on, as plain data."""
        from collegium.models.folder import weights_digest

        # By exclusion: a new option changes the identity unless it is listed as without effect.
        names = [f.name for f in fields(self) if f.name not in self.WITHOUT_EFFECT]
        options = {name: plain(getattr(self, name)) for name in names}
        return {"weights": weights_digest(self.model), **options}

    def load_config(self, where: str) -> PretrainedConfig:
        """Load the config.

        Raises:
            ModelError: it cannot be loaded.
        """
        from collegium.models.config import load_config

        return load_config(self, where=where)

    def load_tokenizer(self, where: str) -> PreTrainedTokenizerFast:
        """Load the tokenizer.

        Raises:
            ModelError: there is no fast tokenizer.
        """
        from collegium.models.loading import load_tokenizer

        # `revision` belongs to the repository of the model, not to that of another tokenizer.
        revision = self.revision if self.tokenizer_path == self.model else None
        return load_tokenizer(self.tokenizer_path, revision=revision, where=where)

    def head_rows(self, where: str) -> int:
        """Return the number of head rows that the config declares.

        Raises:
            ModelError: the config cannot be loaded, or has no vocabulary size.
        """
        from collegium.models.config import head_rows

        return head_rows(self, where=where)

    def max_length(self, where: str) -> int | None:
        """Return the largest number of positions, None if the config sets no limit.

        Raises:
            ModelError: the config cannot be loaded.
        """
        from collegium.models.config import position_limit

        return position_limit(self.load_config(where))

    @property
    def needs_loading(self) -> bool:
        """Whether `facts` loads the weights: remote code may not build without them."""
        return self.trust_remote_code

    def facts(self, where: str) -> ModelFacts:
        """Return facts about the architecture.

        Raises:
            ModelError: the config builds no model, or the weights cannot be loaded.
        """
        from collegium.models.loading import empty_model, load_model, model_facts

        if self.needs_loading:
            return model_facts(load_model(self, where=where).model)
        return model_facts(empty_model(self.load_config(where), where))
