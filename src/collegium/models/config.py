"""What a model's config says, for folders and hub ids alike."""

from __future__ import annotations

from collegium.errors import ModelError
from collegium.models.folder import ModelOptions


def head_rows(options: ModelOptions, *, where: str) -> int:
    """Rows of the model's head according to its config; no weight is loaded.

    Raises:
        ModelError: the config cannot be had, or names no vocabulary size.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            options.model, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{where}: the config of {options.model} cannot be loaded ({reason}); give a model folder, "
            "or check the hub id and the network"
        ) from error
    rows = config.get_text_config().vocab_size
    if not isinstance(rows, int):
        raise ModelError(f"{where}: the config of {options.model} has no vocab_size; copy it again")
    return rows
