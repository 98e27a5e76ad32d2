"""The student of a recipe: pretrained weights, or a config with a tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from collegium.errors import ModelError
from collegium.models.options import Attention, Device, ModelFacts, ModelOptions
from collegium.options import OneOf, option

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# torch and transformers are imported inside the methods: decoding a recipe does not wait for them.

TrainedDType = Literal["float32", "bfloat16", "float16"]


class StudentOptions(ABC):
    """One kind of student: its options, and everything that a run asks of it."""

    device: str
    gradient_checkpointing: bool

    @abstractmethod
    def paths(self) -> dict[str, str]:
        """Return the folders or hub ids that are read, by the name of their option."""

    @abstractmethod
    def check(self, where: str) -> None:
        """Validate the student without loading weights.

        Raises:
            ModelError: the folder, config, tokenizer or device cannot be used.
        """

    def warnings(self, where: str) -> list[str]:
        """Read files that are about to be used once, and return warnings about them.

        Raises:
            ModelError: they cannot be used.
        """
        return []

    def content(self) -> dict[str, str]:
        """Return digests of the files that the initial weights come from."""
        return {}

    @abstractmethod
    def load_tokenizer(self, where: str) -> PreTrainedTokenizerFast:
        """Load the tokenizer, which defines the vocabulary of the run.

        Raises:
            ModelError: there is no fast tokenizer, or it has no end-of-text token.
        """

    @abstractmethod
    def max_length(self, where: str) -> int | None:
        """Return the largest number of positions, None if the config sets no limit.

        Raises:
            ModelError: the config cannot be loaded.
        """

    @property
    def needs_loading(self) -> bool:
        """Whether `facts` loads the weights."""
        return False

    @abstractmethod
    def facts(self, where: str) -> ModelFacts:
        """Return facts about the architecture.

        Raises:
            ModelError: the config builds no model.
        """

    @abstractmethod
    def _initial_model(
        self, tokenizer: PreTrainedTokenizerFast, *, seed: int, where: str
    ) -> PreTrainedModel:
        """Load or initialize the model on its device."""

    def build(self, *, seed: int, where: str) -> PreTrainedModel:
        """Return the untrained student, with the tokenizer's end-of-text token as a stop token.

        Raises:
            ModelError: the model cannot be loaded, or has fewer rows than the tokenizer has ids.
        """
        from collegium.models.forward import head_layer, input_layer
        from collegium.models.loading import enable_checkpointing

        tokenizer = self.load_tokenizer(where)
        model = self._initial_model(tokenizer, seed=seed, where=where)
        # Embeddings are never resized: vocabulary surgery breaks exports (ggml-org/llama.cpp#6111).
        rows = min(input_layer(model).num_embeddings, head_layer(model).out_features)
        _check_rows(rows, tokenizer, where=where)
        _set_stop_token(model, tokenizer)
        if self.gradient_checkpointing:
            enable_checkpointing(model)
        return model


@option
class PretrainedStudent(ModelOptions, StudentOptions):
    """A student that starts from pretrained weights."""

    dtype: TrainedDType = "float32"
    """Data type of the trained weights."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass to save memory."""

    def check(self, where: str) -> None:
        super().check(where)
        _check_rows(self.head_rows(where), self.load_tokenizer(where), where=where)

    def content(self) -> dict[str, str]:
        from collegium.models.folder import weights_digest

        return {"student": weights_digest(self.model)}

    def load_tokenizer(self, where: str) -> PreTrainedTokenizerFast:
        return _with_eos(super().load_tokenizer(where), self.tokenizer_path, where)

    def _initial_model(
        self, tokenizer: PreTrainedTokenizerFast, *, seed: int, where: str
    ) -> PreTrainedModel:
        from collegium.models.loading import load_model

        return load_model(self, where=where)


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
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass to save memory."""

    def paths(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer}

    def check(self, where: str) -> None:
        from collegium.models.folder import check_attention, check_device, check_tokenizer_folder

        check_device(self.device, where=where)
        check_attention(self.attention, where=where)
        check_tokenizer_folder(self.tokenizer, where=where)
        self._full_config(self.load_tokenizer(where), where)

    def load_tokenizer(self, where: str) -> PreTrainedTokenizerFast:
        from collegium.models.loading import load_tokenizer

        return _with_eos(load_tokenizer(self.tokenizer, where=where), self.tokenizer, where)

    def max_length(self, where: str) -> int | None:
        from collegium.models.config import position_limit

        return position_limit(self._build_config(where))

    def facts(self, where: str) -> ModelFacts:
        from collegium.models.loading import empty_model, model_facts

        return model_facts(empty_model(self._build_config(where), where))

    def _build_config(self, where: str) -> PretrainedConfig:
        from collegium.models.loading import make_config

        return make_config(self._full_config(self.load_tokenizer(where), where))

    def _initial_model(
        self, tokenizer: PreTrainedTokenizerFast, *, seed: int, where: str
    ) -> PreTrainedModel:
        import torch

        from collegium.models.loading import build_model, choose_device, vocab_size_of

        model = build_model(
            self._full_config(tokenizer, where),
            vocab_size=vocab_size_of(tokenizer),
            seed=seed,
            attention=self.attention,
        )
        # `PreTrainedModel.to` refuses a change of type for some models.
        torch.nn.Module.to(model, choose_device(self.device), getattr(torch, self.dtype))
        return model

    def _full_config(self, tokenizer: PreTrainedTokenizerFast, where: str) -> dict[str, Any]:
        """Return the config, with special ids of the tokenizer where it has none."""
        from collegium.models.loading import check_config, vocab_size_of

        # All three are set: the defaults of a model type are ids of its usual vocabulary.
        config = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": None, **self.config}
        if config.get("eos_token_id") is None:
            config["eos_token_id"] = tokenizer.eos_token_id
        try:
            return check_config(config, vocab_size=vocab_size_of(tokenizer))
        except ModelError as error:
            raise ModelError(f"{where}.{error}") from error


AnyStudent = Annotated[
    StudentOptions, OneOf({"model": PretrainedStudent, "config": FreshStudent}, key=None)
]
"""A student of any kind, told apart by the key `model` or `config`."""


def _with_eos(tokenizer: PreTrainedTokenizerFast, path: str, where: str) -> PreTrainedTokenizerFast:
    if tokenizer.eos_token_id is None:
        from collegium.data.encode import eos_candidates

        raise ModelError(
            f"{where}: the tokenizer of {path} has no eos token, so a student cannot learn to "
            f"stop; must define one; set `eos_token` in its tokenizer_config.json "
            f"(candidates: {eos_candidates(tokenizer)})"
        )
    return tokenizer


def _check_rows(rows: int, tokenizer: PreTrainedTokenizerFast, *, where: str) -> None:
    vocab = tokenizer.get_vocab()
    token = max(vocab, key=vocab.__getitem__)
    if vocab[token] >= rows:
        raise ModelError(
            f"{where}: token `{token}` has id {vocab[token]}, the model has {rows} rows; must have "
            f"a row for every id; use the model's own tokenizer"
        )


def _set_stop_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    # Keep the stop tokens of the model, and add the one that is trained: without it generation with
    # the exported student does not end.
    config = model.generation_config
    if config is None:
        return
    eos: Any = config.eos_token_id
    stops: list[Any] = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    if tokenizer.eos_token_id not in stops:
        stops.append(tokenizer.eos_token_id)
    config.eos_token_id = stops[0] if len(stops) == 1 else stops
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
