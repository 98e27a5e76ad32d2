"""The student of a recipe, and its kinds that need no teacher: pretrained, or from a config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from collegium.errors import ModelError
from collegium.models import folder, forward, loading, lora, saving
from collegium.models.gguf import is_gguf
from collegium.models.identity import model_identity
from collegium.models.lora import LoraOptions
from collegium.models.options import Attention, Device, ModelOptions, ModelSource
from collegium.models.weights import CONFIG, quantization_of
from collegium.options import option, torch
from collegium.storage.files import fingerprint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerFast as Tokenizer

    from collegium.types import Batch

TrainedDType = Literal["float32", "bfloat16", "float16"]
Vocabulary = Literal["all", "used"]

Calibration = Callable[[], "Iterable[Batch]"]
"""Opens batches of the calibration split, on which importances are measured."""


class StudentKind(ABC):
    """One kind of student in a recipe, by its options."""

    device: str
    vocabulary: Vocabulary

    def problems(self, teachers: Mapping[str, object]) -> Iterator[str]:
        """Yield `key: problem` for options that do not fit the teachers of the recipe."""
        return iter(())

    def paths(self) -> dict[str, str]:
        """Return the folders or hub ids that its options name."""
        return {}

    @abstractmethod
    def bind(self, teachers: Mapping[str, object], calibration: Calibration) -> StudentOptions:
        """Return the student, which may start from one of the teachers."""


class StudentOptions(ModelSource, StudentKind):
    """A student: everything that a run asks of it."""

    attention: Attention
    gradient_checkpointing: bool
    vocabulary: Vocabulary = "all"

    @property
    def lora(self) -> LoraOptions | None:
        """Options of the adapters that are trained instead of the weights."""
        return None

    def content(self) -> dict[str, str]:
        """Return digests of the files that the initial model comes from."""
        return {}

    def bind(self, teachers: Mapping[str, object], calibration: Calibration) -> StudentOptions:
        return self

    @property
    def needs_importance(self) -> bool:
        """Whether `origins` loads the weights, to measure importances."""
        return False

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        """Return the tap of a teacher that each tap of the student is a copy of, by teacher."""
        return {}

    @abstractmethod
    def _initial_model(self, *, seed: int, where: str) -> PreTrainedModel:
        """Load or initialize the model on its device."""

    def build(self, *, seed: int, where: str, stops: Iterable[int] = ()) -> PreTrainedModel:
        """Return the untrained student. Generation stops at the eos token and at `stops`.

        Raises:
            ModelError: the model cannot be loaded, or has fewer rows than the tokenizer has ids.
        """
        tokenizer = self.load_tokenizer(where)
        model = self._initial_model(seed=seed, where=where)
        # Embeddings are never resized: vocabulary surgery breaks exports (ggml-org/llama.cpp#6111).
        inputs, head = forward.input_layer(model), forward.head_layer(model)
        rows = min(inputs.num_embeddings, head.out_features)
        check_rows(rows, tokenizer, where=where)
        saving.repair_generation(model.generation_config)
        _set_stop_tokens(model, tokenizer, stops)
        # Trainers switch it at the top, where composite configs lack it.
        if not hasattr(model.config, "use_cache"):
            model.config.use_cache = getattr(model.config.get_text_config(), "use_cache", True)
        if self.lora is not None:
            lora.add_lora(model, self.lora, seed=seed, where=where)
        if self.gradient_checkpointing:
            loading.enable_checkpointing(model)
        return model


@option
class PretrainedStudent(ModelOptions, StudentOptions):
    """A student that starts from pretrained weights."""

    dtype: TrainedDType = "float32"
    """Data type of the trained weights."""
    lora: LoraOptions | None = None  # pyright: ignore[reportIncompatibleMethodOverride]
    """Train low-rank adapters only."""
    vocabulary: Vocabulary = "all"
    """`used` cuts the tokens that the corpus never uses out of embedding, head and tokenizer."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass to save memory."""

    def check(self, where: str) -> None:
        require_floats(self, where=where)
        saving.check_generation_file(self, where=where)
        super().check(where)
        check_rows(self.head_rows(where), self.load_tokenizer(where), where=where)

    def check_model(self, model: PreTrainedModel, where: str) -> None:
        saving.check_saving(model, where=where)
        if self.lora is not None:
            lora.add_lora(model, self.lora, seed=0, where=where)

    def warnings(self, where: str) -> list[str]:
        return saving.generation_notes(self, where=where) + super().warnings(where)

    def content(self) -> dict[str, str]:
        # The options are part of the recipe.
        return {"student": fingerprint(model_identity(self))}

    def load_tokenizer(self, where: str) -> Tokenizer:
        return with_eos(super().load_tokenizer(where), self.tokenizer_path, where)

    def _initial_model(self, *, seed: int, where: str) -> PreTrainedModel:
        return loading.load_model(self, where=where)


@option
class FreshStudent(StudentOptions):
    """A student with random weights."""

    config: dict[str, Any]
    """A transformers config with `model_type`. `vocab_size` defaults to the tokenizer's."""
    tokenizer: Annotated[str, Field(min_length=1)]
    """Folder of the tokenizer."""
    dtype: TrainedDType = "float32"
    """Data type of the trained weights."""
    device: Device = "auto"
    """`auto` is the first CUDA device, else MPS, else the CPU."""
    attention: Attention = "auto"
    """`auto` is `sdpa` if the model supports it, else `eager`."""
    vocabulary: Vocabulary = "all"
    """`used` cuts the tokens that the corpus never uses out of embedding, head and tokenizer."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass to save memory."""

    def paths(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer}

    def check(self, where: str) -> None:
        folder.check_device(self.device, self.attention, where=where)
        folder.check_tokenizer_folder(self.tokenizer, where=where)
        model = loading.empty_model(self.load_config(where), where)
        saving.check_saving(model, where=f"{where}.config")

    def load_tokenizer(self, where: str) -> Tokenizer:
        tokenizer = loading.load_tokenizer(self.tokenizer, where=where)
        return with_eos(tokenizer, self.tokenizer, where)

    def load_config(self, where: str) -> PretrainedConfig:
        tokenizer = self.load_tokenizer(where)
        # All three are set: the defaults of a model type are ids of its usual vocabulary.
        config = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": None, **self.config}
        if config.get("eos_token_id") is None:
            config["eos_token_id"] = tokenizer.eos_token_id
        size = loading.vocab_size_of(tokenizer)
        return loading.make_config(config, vocab_size=size, where=f"{where}.config")

    def _initial_model(self, *, seed: int, where: str) -> PreTrainedModel:
        config = self.load_config(where)
        model = loading.build_model(config, seed=seed, attention=self.attention)
        if self.dtype != "float32":
            model = loading.cast_model(model, getattr(torch, self.dtype)).train()
        torch.nn.Module.to(model, loading.choose_device(self.device))
        return model


def require_floats(options: ModelOptions, *, where: str) -> None:
    """Raise ModelError if a student would start from quantized weights."""
    method = "GGUF" if is_gguf(options.model) else None
    path = None if method else folder.resolve_folder(options.model, where=where)
    if path is not None and (path / CONFIG).is_file():
        method = quantization_of(path, where=where)
    if method:
        raise ModelError(
            f"{where}: got {options.model}, whose weights are quantized ({method}); must be "
            "floats, since quantized models are frozen teachers only; start from the original model"
        )


def with_eos(tokenizer: Tokenizer, path: str, where: str) -> Tokenizer:
    """Return a tokenizer that has an eos token, or raise ModelError."""
    if tokenizer.eos_token_id is None:
        from collegium.data.encode import eos_candidates

        raise ModelError(
            f"{where}: the tokenizer of {path} has no eos token, so a student cannot learn to "
            f"stop; must define one; set `eos_token` in its tokenizer_config.json "
            f"(candidates: {eos_candidates(tokenizer)})"
        )
    return tokenizer


def check_rows(rows: int, tokenizer: Tokenizer, *, where: str) -> None:
    """Raise ModelError if a token has no row of the embedding and the head."""
    vocab = tokenizer.get_vocab()
    token = max(vocab, key=vocab.__getitem__)
    if vocab[token] >= rows:
        raise ModelError(
            f"{where}: token `{token}` has id {vocab[token]}, the model has {rows} rows; must have "
            f"a row for every id; use the model's own tokenizer"
        )


def _set_stop_tokens(model: PreTrainedModel, tokenizer: Tokenizer, stops: Iterable[int]) -> None:
    # Keep the stop tokens of the model, and add those that are trained: without them generation
    # with the exported student does not end.
    config = model.generation_config
    if config is None:
        return
    eos: Any = [] if config.eos_token_id is None else config.eos_token_id
    ids: list[Any] = [eos] if isinstance(eos, int) else list(eos)
    ids += [stop for stop in (tokenizer.eos_token_id, *stops) if stop not in ids]
    config.eos_token_id = ids[0] if len(ids) == 1 else ids
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
