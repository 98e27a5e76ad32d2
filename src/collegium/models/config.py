"""What a model's config says, for folders and hub ids alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collegium.errors import ModelError
from collegium.models.folder import ModelOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def load_config(options: ModelOptions, *, where: str) -> PretrainedConfig:
    """Load the config alone.

    Raises:
        ModelError: it cannot be had.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except Exception as error:  # whatever the values of a file can do to a constructor
        raise ModelError(
            f"{where}: the config of {options.model} cannot be loaded ({first_line(error)}); give a model "
            "folder, or check the hub id and the network"
        ) from error


def first_line(error: Exception) -> str:
    """The first sentence of a library's error, with its kind where the text alone says little."""
    text = " ".join(str(error).split("\n\n")[0].split())
    return text if " " in text else f"{type(error).__name__}: {text}"


def head_rows(options: ModelOptions, *, where: str) -> int:
    """Rows of the model's head according to its config; no weight is loaded.

    Raises:
        ModelError: the config cannot be had, or names no vocabulary size.
    """
    rows = load_config(options, where=where).get_text_config().vocab_size
    if not isinstance(rows, int):
        raise ModelError(f"{where}: the config of {options.model} has no vocab_size; copy it again")
    return rows


def position_limit(config: PretrainedConfig) -> int | None:
    """Tokens of the longest text that the model was made for; None where its config names no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
