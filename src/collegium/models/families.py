"""Models whose outputs for a document depend on other documents of its window or batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collegium.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig

# Types without position_ids, with recurrent or convolutional layers, or whose attention mask does
# not depend on position_ids. tests/models/test_families.py compares both lists with all types.
MIXING_TYPES = frozenset(
    [
        "afmoe",
        "bamba",
        "bart",
        "bert-generation",
        "bigbird_pegasus",
        "biogpt",
        "blenderbot",
        "blenderbot-small",
        "bloom",
        "deepseek_v4",
        "falcon",
        "falcon_h1",
        "falcon_mamba",
        "gpt_oss",
        "granitemoehybrid",
        "inkling2_text",
        "inkling_text",
        "jamba",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mamba2",
        "marian",
        "mbart",
        "minimax",
        "moss_transcribe_diarize",
        "mpt",
        "mvp",
        "nemotron_h",
        "olmo_hybrid",
        "openai-gpt",
        "opt",
        "pegasus",
        "plbart",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "recurrent_gemma",
        "reformer",
        "rwkv",
        "trocr",
        "whisper",
        "xglm",
        "xlm",
        "xlstm",
        "zamba",
        "zamba2",
        "zaya",
    ]
)
"""Model types that let the documents of a packed window see each other, as of transformers 5.23."""

RECURRENT = frozenset(["linear_attention", "conv", "mamba", "recurrent"])
"""Layer types of a config that carry a state over the start of a document."""

_HEAD = "computes its logits in an unsupported way (its head is no linear layer)"
_NOT_CAUSAL = "lets tokens attend to later ones"
UNSUPPORTED_TYPES = {
    **dict.fromkeys(
        [
            "bert",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "modernbert-decoder",
            "prophetnet",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ],
        _HEAD,
    ),
    **dict.fromkeys(["cpmant", "xlnet"], _NOT_CAUSAL),
}
"""Model types that cannot be used, and why, as of transformers 5.23."""


def check_windows(
    config: PretrainedConfig, *, packed: bool, max_length: int | None, where: str
) -> None:
    """Raise ModelError if documents would change each other's outputs, by the type of the model.

    Args:
        config: config of the model.
        packed: whether a window may hold several documents.
        max_length: length of the longest document, None if it is not known.
        where: path of the model in the recipe.
    """
    for model_type in sorted(_types(config) & UNSUPPORTED_TYPES.keys()):
        reason = UNSUPPORTED_TYPES[model_type]
        raise ModelError(f"{where}: {model_type} {reason}; use another model family")
    if packed and mixes_documents(config):
        raise mixing_error(config.model_type, where=where)
    limit = rope_limit(config)
    if limit is not None and (max_length is None or max_length > limit):
        raise ModelError(
            f"{where}: {config.model_type} rotates all documents of a batch by other frequencies "
            f"once one is longer than {limit} tokens (its rope type depends on the length); "
            f"must not be longer; set `data.max_length` to at most {limit}"
        )


def rope_limit(config: PretrainedConfig) -> int | None:
    """Return the longest document that is rotated like a shorter one, None without a limit."""
    return min(_rope_switches(config.get_text_config()), default=None)


def mixes_documents(config: PretrainedConfig) -> bool:
    """Whether documents of a packed window see each other, by the type of the model."""
    layers = getattr(config.get_text_config(), "layer_types", None) or ()
    return not (_types(config).isdisjoint(MIXING_TYPES) and RECURRENT.isdisjoint(layers))


def _types(config: PretrainedConfig) -> set[str]:
    return {config.model_type, config.get_text_config().model_type}


def mixing_error(model_type: str, *, where: str, reason: str = "") -> ModelError:
    """Return the error for a model that cannot score packed windows."""
    return ModelError(
        f"{where}: {model_type} lets packed documents attend to each other{reason}; must separate "
        "documents by position_ids, or get one per window; set `data.packing: false`, or use "
        "another attention or model family"
    )


def _rope_switches(config: PretrainedConfig) -> Iterator[int]:
    """Yield the lengths beyond which rotary frequencies change for all positions of a call."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in parameters.values() if isinstance(part, dict)]  # by layer type
    for rope in [parameters, *parts]:
        kind = str(rope.get("rope_type"))
        if kind == "longrope":
            yield int(rope["original_max_position_embeddings"])
        elif "dynamic" in kind:
            yield int(config.max_position_embeddings)
