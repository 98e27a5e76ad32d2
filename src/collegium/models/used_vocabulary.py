"""Models whose embedding and head have rows for some tokens only: students, and their teachers.

Shapes: V rows of the whole model, U kept ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from collegium.errors import ModelError
from collegium.models import loading, lora
from collegium.models.folder import resolve_folder
from collegium.models.forward import head_layer, input_layer
from collegium.models.lora import LoraOptions
from collegium.models.options import Attention, ModelFacts, ModelOptions
from collegium.models.probe import is_close
from collegium.models.student import StudentOptions
from collegium.options import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerFast as Tokenizer

CHECKED_TOKENS = 16
ID_KEYS = ("_token_id", "suppress_tokens")
"""Ends of the keys of a config that hold token ids."""


@dataclass(frozen=True, eq=False)
class UsedVocabulary:
    """The kept tokens, and the tokenizer that numbers them from 0."""

    kept_U: np.ndarray
    """(U,) int64: ascending ids of the whole vocabulary."""
    tokenizer: Tokenizer

    def new_ids(self) -> np.ndarray:
        """Return the new id by old id, (V,) int64 up to the last kept one, -1 where it is cut."""
        ids_V = np.full(int(self.kept_U[-1]) + 1, -1, np.int64)
        ids_V[self.kept_U] = np.arange(len(self.kept_U))
        return ids_V


def cut_config(config: PretrainedConfig, kept_U: np.ndarray) -> PretrainedConfig:
    """Return the config of the model with the kept rows only."""
    config = copy.deepcopy(config)
    _shrink(config, kept_U)
    return config


def cut_vocabulary(model: PreTrainedModel, kept_U: np.ndarray, *, where: str) -> None:
    """Cut all other rows out of the embedding and the head of a model, in place.

    Its logits are those of the whole model at the kept tokens, so its distribution is
    Q(v) = P(v) / (1 - m), with m the probability of the tokens that are cut.

    Raises:
        ModelError: other parts of the model depend on the token ids.
    """
    embedding, head = input_layer(model), head_layer(model)
    rows_U = torch.from_numpy(kept_U).to(embedding.weight.device)
    was_training = model.training
    ids_T = torch.arange(min(CHECKED_TOKENS, len(kept_U)), device=rows_U.device)
    expected = _logits(model, rows_U[ids_T])[..., rows_U.to(head.weight.device)]
    is_tied = head.weight is embedding.weight
    embedding.weight = _rows(embedding.weight, rows_U)
    head.weight = embedding.weight if is_tied else _rows(head.weight, rows_U)
    if head.bias is not None:
        head.bias = _rows(head.bias, rows_U)
    embedding.num_embeddings = head.out_features = len(kept_U)
    if embedding.padding_idx is not None:
        embedding.padding_idx = _renumbered(embedding.padding_idx, _places(kept_U))
    _shrink(model.config, kept_U)
    if model.generation_config is not None:
        _renumber(model.generation_config, kept_U)
    actual = _logits(model, ids_T)
    model.train(was_training)
    if not is_close(actual, expected, model.dtype, factor=8):
        raise ModelError(
            f"{where}: {model.config.model_type} uses token ids outside of its embedding and head; "
            "must use them there only; keep every token with `student.vocabulary: all`"
        )


def check_adapter(options: ModelOptions, kept_U: np.ndarray, *, where: str) -> None:
    """Check that the adapter of a folder leaves embedding and head as they are.

    Raises:
        ModelError: its tensors have a row per token of the whole vocabulary.
    """
    if options.adapter is None or resolve_folder(options.adapter, where=where) is None:
        return
    smaller = loading.empty_model(cut_config(options.load_config(where), kept_U), where)
    try:
        lora.attach_adapter(smaller, options.adapter, name="check", where=where)
    except ModelError as error:
        raise ModelError(
            f"{where}: {options.adapter} adapts the embedding or the head; must adapt other layers "
            "with `student.vocabulary: used`; merge it into its base model first"
        ) from error


@dataclass(frozen=True)
class UsedStudent(StudentOptions):
    """A student with the tokens that its corpus uses."""

    whole: StudentOptions
    """The same student with all tokens."""
    used: Callable[[], UsedVocabulary]
    """Reads the corpus on the first call."""

    @property
    def device(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.whole.device

    @property
    def attention(self) -> Attention:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.whole.attention

    @property
    def gradient_checkpointing(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.whole.gradient_checkpointing

    @property
    def lora(self) -> LoraOptions | None:
        return self.whole.lora

    @property
    def dtype(self) -> str:
        """Data type of the trained weights."""
        return getattr(self.whole, "dtype", "float32")

    def paths(self) -> dict[str, str]:
        return self.whole.paths()

    def check(self, where: str) -> None:
        self.whole.check(where)

    def warnings(self, where: str) -> list[str]:
        return self.whole.warnings(where)

    def content(self) -> dict[str, str]:
        # The kept tokens follow from the tokenizer and the text, which have identities.
        return self.whole.content()

    @property
    def needs_importance(self) -> bool:
        return self.whole.needs_importance

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return self.whole.origins()

    def max_length(self, where: str) -> int | None:
        return self.whole.max_length(where)

    def check_windows(self, where: str, *, packed: bool, max_length: int) -> None:
        self.whole.check_windows(where, packed=packed, max_length=max_length)

    @property
    def needs_loading(self) -> bool:
        return self.whole.needs_loading

    def facts(self, where: str) -> ModelFacts:
        if self.needs_loading:
            return loading.model_facts(self._initial_model(seed=0, where=where))
        return super().facts(where)

    def load_config(self, where: str) -> PretrainedConfig:
        return cut_config(self.whole.load_config(where), self.used().kept_U)

    def load_tokenizer(self, where: str) -> Tokenizer:
        return self.used().tokenizer

    def _initial_model(self, *, seed: int, where: str) -> PreTrainedModel:
        model = self.whole._initial_model(seed=seed, where=where)
        cut_vocabulary(model, self.used().kept_U, where=where)
        return model


def _logits(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    with torch.no_grad():  # not a decorator: importing the module must not load torch
        return model.eval()(input_ids=ids_T[None], use_cache=False).logits


def _rows(parameter: Tensor, rows_U: Tensor) -> Any:
    rows = parameter.detach()[rows_U.to(parameter.device)]
    return torch.nn.Parameter(rows, requires_grad=parameter.requires_grad)


def _places(kept_U: np.ndarray) -> dict[int, int]:
    return {old: new for new, old in enumerate(kept_U.tolist())}


def _shrink(config: PretrainedConfig, kept_U: np.ndarray) -> None:
    """Set the number of rows and renumber the token ids of a config in place."""
    parts = {id(part): part for part in (config, config.get_text_config())}  # may be one object
    for part in parts.values():
        if hasattr(part, "vocab_size"):
            part.vocab_size = len(kept_U)
        _renumber(part, kept_U)


def _renumber(config: Any, kept_U: np.ndarray) -> None:
    """Renumber the token ids of a config or generation config in place."""
    places = _places(kept_U)
    for key, value in list(vars(config).items()):
        if key.endswith(ID_KEYS):
            setattr(config, key, _renumbered(value, places))


def _renumbered(value: Any, places: Mapping[int, int]) -> Any:
    """Return the new id or ids. Those that are cut are None, or left out of a list."""
    if isinstance(value, list | tuple):
        return [places[old] for old in value if old in places]
    return places.get(value) if isinstance(value, int) else value
