"""A pretrained model in a recipe: its options, and what a run asks of it before it is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from collegium.errors import ModelError, first_line
from collegium.models import folder, identity, loading, lora, notes
from collegium.models.families import check_windows
from collegium.models.gguf import is_gguf
from collegium.models.loading import ModelFacts
from collegium.models.weights import (
    COMPACT,
    CONFIG,
    QUANTIZED_PACKAGES,
    quantization_of,
    read_json,
    weight_files,
)
from collegium.options import option, plain, torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DType = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]


class ModelSource(ABC):
    """A Hugging Face model that a run can load or build, and its files.

    All methods raise ModelError for a model, file, tokenizer or device that cannot be used.
    """

    @abstractmethod
    def paths(self) -> dict[str, str]:
        """Return the folders or hub ids that are read, by the name of their option."""

    @abstractmethod
    def check(self, where: str) -> None:
        """Check device, attention, config, tokenizer, and names and shapes of the tensors.

        No weights are read, and no hub id is fetched.
        """

    def warnings(self, where: str) -> list[str]:
        """Read the weights once, check that they are finite, and return warnings about them."""
        return []

    @abstractmethod
    def load_config(self, where: str) -> PretrainedConfig:
        """Load or build only the config."""

    @abstractmethod
    def load_tokenizer(self, where: str) -> PreTrainedTokenizerFast:
        """Load the fast tokenizer, which has an end-of-text token if it is a student's."""

    def max_length(self, where: str) -> int | None:
        """Return the largest number of positions, None if the config sets no limit."""
        limit = getattr(self.load_config(where).get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def check_windows(self, where: str, *, packed: bool, max_length: int) -> None:
        """Check that documents of a window or batch do not change each other's outputs.

        `packed` is whether a window may hold several documents.
        """
        config = self.load_config(where)
        check_windows(config, packed=packed, max_length=max_length, where=where)

    @property
    def needs_loading(self) -> bool:
        """Whether `facts` loads the weights."""
        return False

    def facts(self, where: str) -> ModelFacts:
        """Return facts about the architecture."""
        return loading.model_facts(loading.empty_model(self.load_config(where), where))


@option
class ModelOptions(ModelSource):
    """Location and loading options of one pretrained model, independent of other models."""

    # Inheriting quantization or dtype from the student is a known trap (huggingface/trl#6720).
    model: Annotated[str, Field(min_length=1)]
    """A Hugging Face model folder, or a hub id `owner/name`. Of a teacher also a GGUF file, which
    is converted once to a folder in float32."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: str | None = None
    """A folder or hub id of a LoRA adapter of this model, in the format of PEFT."""
    tokenizer: str | None = None
    """Folder of the tokenizer if it differs from `model`."""
    dtype: DType = "auto"
    """Data type of the weights. `auto` keeps the type of the files, whatever config.json says."""
    device: Device = "auto"
    """`auto` is the first CUDA device, else MPS, else the CPU."""
    attention: Attention = "auto"
    """`auto` is `sdpa` if the model supports it, else `eager`."""
    trust_remote_code: bool = False
    """Run the Python files shipped with the model, unless transformers has its own class for this
    type; review them first."""

    WITHOUT_EFFECT: ClassVar = {
        *("model", "revision", "adapter", "tokenizer", "trust_remote_code"),
        *("device", "offload", "shard"),
    }
    """Options that do not change the outputs. Model and adapter are identified by content."""

    @property
    def tokenizer_path(self) -> str:
        """Path of the tokenizer: `tokenizer`, defaulting to `model`."""
        return self.tokenizer or self.model

    def paths(self) -> dict[str, str]:
        paths = {"model": self.model, "adapter": self.adapter, "tokenizer": self.tokenizer}
        return {name: path for name, path in paths.items() if path is not None}

    def check(self, where: str) -> None:
        folder.check_model_folder(self, where=where)
        model = loading.check_weights(self, where=where)
        if model is not None:
            self.check_model(model, where)
            if self.adapter is not None and self._has_adapter_folder(where):
                lora.attach_adapter(model, self.adapter, name="check", where=f"{where}.adapter")

    def check_model(self, model: PreTrainedModel, where: str) -> None:
        """Check the model of a folder, which has names and shapes but no values."""

    def _has_adapter_folder(self, where: str) -> bool:
        # As for models, a check fetches no hub id.
        path = f"{where}.adapter"
        return (
            self.adapter is not None and folder.resolve_folder(self.adapter, where=path) is not None
        )

    def warnings(self, where: str) -> list[str]:
        if self.adapter is not None and self._has_adapter_folder(where):
            lora.read_adapter(self.adapter, where=f"{where}.adapter")
        return notes.config_notes(self, where=where) + loading.scan_folder(self, where=where)

    def identity(self) -> dict[str, Any]:
        """Return everything that the outputs depend on, as plain data."""
        # By exclusion: a new option changes the identity unless it is listed as without effect.
        names = [f.name for f in fields(self) if f.name not in self.WITHOUT_EFFECT]
        options = {name: plain(getattr(self, name)) for name in names}
        # Without options that are not set, so that a new one leaves older caches valid.
        set_ones = {name: value for name, value in options.items() if value is not None}
        return {**identity.model_identity(self), **set_ones}

    def commit(self, where: str) -> str | None:
        """Return the commit that `revision` of a hub id means now, None for a folder."""
        if folder.resolve_folder(self.model, where=where) is not None:
            return None
        return identity.resolve_commit(self.model, self.revision, where=where)

    def runs_code(self, where: str) -> bool:
        """Whether the Python files of the model are run: trusted, and needed for its type."""
        if not self.trust_remote_code:
            return False
        return not folder.is_native(self.raw_config(where).get("model_type"))

    def raw_config(self, where: str) -> dict[str, Any]:
        """Return config.json as it is written."""
        path = folder.resolve_folder(self.model, where=where)
        if path is not None:
            return read_json(path / CONFIG, where=where)
        return read_json(identity.hub_config(self.model, self.revision, where=where), where=where)

    def load_config(self, where: str) -> PretrainedConfig:
        from transformers import AutoConfig

        options = {"revision": self.commit(where), "trust_remote_code": self.runs_code(where)}
        source = str(folder.resolve_folder(self.model, where=where) or self.model)
        try:
            config = AutoConfig.from_pretrained(source, **options)
        # Bad values in the file make config constructors raise errors of any type.
        except Exception as error:
            raise ModelError(
                f"{where}: the config of {self.model} cannot be loaded "
                f"({first_line(error)}); give a model folder, or check the hub id and the "
                "network"
            ) from error
        loading.drop_quantization(config, where=where)
        return config

    def load_tokenizer(self, where: str) -> PreTrainedTokenizerFast:
        # `revision` belongs to the repository of the model, not to that of another tokenizer.
        revision = self.commit(where) if self.tokenizer_path == self.model else None
        return loading.load_tokenizer(self.tokenizer_path, revision=revision, where=where)

    def num_bytes(self, model: PreTrainedModel, device: torch.device, where: str) -> int:
        """Return the bytes of the loaded weights of `model`, which has their shapes and types."""
        path = folder.resolve_folder(self.model, where=where)
        method = None if path is None else quantization_of(path, where=where)
        if path is not None and method in COMPACT:
            return sum(file.stat().st_size for file in weight_files(path, where=where))
        return sum(parameter.nbytes for parameter in model.parameters())

    def weight_form(self, where: str) -> str | None:
        """Return how quantized weights are loaded and the packages for it, None for floats."""
        path = folder.resolve_folder(self.model, where=where)
        method = None if path is None else quantization_of(path, where=where)
        if method is not None:
            return f"quantized in its files, loaded by {' and '.join(QUANTIZED_PACKAGES[method])}"
        return "converted from GGUF by gguf" if is_gguf(self.model) else None

    def head_rows(self, where: str) -> int:
        """Return the number of head rows that the config declares, without loading weights."""
        rows = self.load_config(where).get_text_config().vocab_size
        if not isinstance(rows, int):
            raise ModelError(
                f"{where}: the config of {self.model} has no vocab_size; copy it again"
            )
        return rows

    @property
    def needs_loading(self) -> bool:
        # Remote code may not build without its weights.
        return self.runs_code(self.model)

    def facts(self, where: str) -> ModelFacts:
        if self.needs_loading:
            return loading.model_facts(loading.load_model(self, where=where))
        return super().facts(where)
