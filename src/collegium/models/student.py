"""The student: loaded from a folder, or built from a config and a tokenizer."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from collegium.data.encode import eos_candidates
from collegium.errors import ModelError
from collegium.models.config import head_rows, load_config
from collegium.models.folder import (
    check_attention,
    check_device,
    check_model_folder,
    check_tokenizer_folder,
)
from collegium.models.forward import head_layer, input_layer
from collegium.models.loading import (
    build_model,
    check_config,
    check_weights,
    choose_device,
    enable_checkpointing,
    load_model,
    load_tokenizer,
    make_config,
    vocab_size_of,
)
from collegium.models.selection import ModelOptions, StudentOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_student(options: StudentOptions, *, where: str) -> None:
    """Validate the student without loading weights.

    Raises:
        ModelError: the folder, config, tokenizer or device cannot be used.
    """
    if options.model is not None:
        model = _model_options(options)
        check_model_folder(model, where=where)
        tokenizer = load_student_tokenizer(options, where=where)
        _check_rows(head_rows(model, where=where), tokenizer, where=where)
        check_weights(model, where=where)
        return
    check_device(options.device, where=where)
    check_attention(options.attention, where=where)
    check_tokenizer_folder(_tokenizer_path(options), where=where)
    tokenizer = load_student_tokenizer(options, where=where)
    _fresh_config(options, tokenizer, where=where)


def student_config(options: StudentOptions, *, where: str) -> PretrainedConfig:
    """Return the config of the student without loading weights.

    Raises:
        ModelError: the config or the tokenizer cannot be used.
    """
    if options.model is not None:
        return load_config(_model_options(options), where=where)
    tokenizer = load_student_tokenizer(options, where=where)
    return make_config(_fresh_config(options, tokenizer, where=where))


def load_student_tokenizer(options: StudentOptions, *, where: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer that defines the vocabulary of the run.

    Raises:
        ModelError: no fast tokenizer found, or it has no end-of-text token.
    """
    path = _tokenizer_path(options)
    # `revision` belongs to the repository of the model, not to that of another tokenizer.
    revision = options.revision if path == options.model else None
    tokenizer = load_tokenizer(path, revision=revision, where=where)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{where}: the tokenizer of {path} has no eos token, so a student cannot learn to "
            f"stop; must define one; set `eos_token` in its tokenizer_config.json "
            f"(candidates: {eos_candidates(tokenizer)})"
        )
    return tokenizer


def build_student(options: StudentOptions, *, seed: int, where: str) -> PreTrainedModel:
    """Load or build the student.

    Raises:
        ModelError: the model cannot be loaded, or has fewer rows than the tokenizer has ids.
    """
    tokenizer = load_student_tokenizer(options, where=where)
    if options.model is not None:
        model = load_model(_model_options(options), where=where).model
    else:
        model = build_model(
            _fresh_config(options, tokenizer, where=where),
            vocab_size=vocab_size_of(tokenizer),
            seed=seed,
            attention=options.attention,
        )
        nn.Module.to(model, choose_device(options.device), DTYPES[options.dtype])
    # Embeddings are never resized: vocabulary surgery breaks exports (ggml-org/llama.cpp#6111).
    rows = min(input_layer(model).num_embeddings, head_layer(model).out_features)
    _check_rows(rows, tokenizer, where=where)
    _set_stop_token(model, tokenizer)
    if options.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def _tokenizer_path(options: StudentOptions) -> str:
    return str(options.tokenizer or options.model)


def _model_options(options: StudentOptions) -> ModelOptions:
    fields = asdict(options)
    for name in ("config", "gradient_checkpointing"):
        del fields[name]
    return ModelOptions(**fields)


def _fresh_config(
    options: StudentOptions, tokenizer: PreTrainedTokenizerFast, *, where: str
) -> dict[str, Any]:
    """Return the config of a new student, with special ids of the tokenizer where it has none."""
    config = dict(options.config or {})
    # All three are set: the defaults of a model type are ids of its usual vocabulary.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config.setdefault(name, {"bos_token_id": tokenizer.bos_token_id}.get(name))
    config["eos_token_id"] = config["eos_token_id"] or tokenizer.eos_token_id
    try:
        return check_config(config, vocab_size=vocab_size_of(tokenizer))
    except ModelError as error:
        raise ModelError(f"{where}.{error}") from error


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
