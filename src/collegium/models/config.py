"""Model configs, from folders and hub ids."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collegium.errors import ModelError
from collegium.models.options import ModelOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def load_config(options: ModelOptions, *, where: str) -> PretrainedConfig:
    """Load only the config of a model.

    Raises:
        ModelError: it cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    # Bad values in the file make config constructors raise errors of any type.
    except Exception as error:
        raise ModelError(
            f"{where}: the config of {options.model} cannot be loaded ({first_line(error)}); "
            "give a model folder, or check the hub id and the network"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first paragraph of an error as one line, with its class if it is one word."""
    text = " ".join(str(error).split("\n\n")[0].split())
    return text if " " in text else f"{type(error).__name__}: {text}"


def head_rows(options: ModelOptions, *, where: str) -> int:
    """Return the number of head rows that the config declares, without loading weights.

    Raises:
        ModelError: the config cannot be loaded, or has no vocabulary size.
    """
    rows = load_config(options, where=where).get_text_config().vocab_size
    if not isinstance(rows, int):
        raise ModelError(f"{where}: the config of {options.model} has no vocab_size; copy it again")
    return rows


def position_limit(config: PretrainedConfig) -> int | None:
    """Return the maximum sequence length in tokens, or None if the config sets no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
