"""Validation of model folders before weights are loaded. Files are untrusted and never executed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from collegium.errors import ModelError, nearest
from collegium.models.quantized import require_packages
from collegium.models.weights import (
    CONFIG,
    local_folder,
    quantization_of,
    read_headers,
    read_json,
    refuse_adapter,
)
from collegium.options import torch
from collegium.storage.files import listing

if TYPE_CHECKING:
    from collegium.models.options import ModelOptions

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
HUB_ID = re.compile(r"^[\w.\-]+/[\w.\-]+$")


def check_model_folder(options: ModelOptions, *, where: str) -> None:
    """Check device, attention and files of a model without loading weights or fetching a hub id."""
    check_device(options.device, options.attention, where=where)
    folder = resolve_folder(options.model, where=where)
    if folder is not None:
        refuse_adapter(folder, where=where)
        config = read_json(folder / CONFIG, where=where)
        model_type = config.get("model_type")
        if not config.get("auto_map"):
            check_model_type(model_type, where=f"{where}: {folder / CONFIG}: model_type")
        elif not is_native(model_type) and not options.trust_remote_code:
            files = ", ".join(sorted(p.name for p in folder.glob("*.py"))) or "elsewhere"
            raise ModelError(
                f"{where}: {folder} requires custom Python code ({files}); refused; "
                f"review it, then set `trust_remote_code: true`"
            )
        read_headers(folder, where=where)
        require_packages(quantization_of(folder, where=where), where=f"{where}: {folder}")
    if folder is not None or options.tokenizer is not None:
        check_tokenizer_folder(options.tokenizer_path, where=where)


def check_device(device: str, attention: str, *, where: str) -> None:
    """Check that the device exists and the attention implementation is installed."""
    if device.startswith("cuda"):
        number, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
        if number >= count:
            raise ModelError(
                f"{where}.device: got {device}; must be a device of this machine (CUDA devices: "
                f"{count}); set `device: cpu`"
            )
    if device == "mps" and not torch.backends.mps.is_available():
        raise ModelError(f"{where}.device: got mps, which is not available; set `device: cpu`")
    if attention == "flash_attention_2":
        from transformers.utils.import_utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            raise ModelError(
                f"{where}.attention: got {attention}, but the package flash-attn is not installed "
                "or finds no CUDA device; must be installed; set `attention: auto`"
            )


def is_native(model_type: object) -> bool:
    """Whether transformers has its own causal language model of this type."""
    # Only the name table: importing the model classes would take a second longer.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return isinstance(model_type, str) and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def check_model_type(model_type: object, *, where: str) -> None:
    """Check that transformers has a causal language model of this type."""
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if is_native(model_type):
        return
    hint = ""
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING:
        hint = "; this type does not predict the next token"
    elif model_type is not None:
        hint = f"; transformers {__version__} does not know this type"
        # There are hundreds of model types: suggest the nearest name, never the whole list.
        close = nearest(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        is_close = close.startswith("; did")
        hint += close if is_close else "; is it custom code or from a newer release?"
    raise ModelError(
        f"{where}: got {model_type!r}; must be a causal language model of transformers, such as "
        f"`llama` or `qwen3`{hint}"
    )


def check_tokenizer_folder(path: str, *, where: str) -> None:
    """Raise ModelError if a folder is missing or has no tokenizer. A no-op for hub ids."""
    folder = resolve_folder(path, where=where)
    if folder is not None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{where}: got {folder}, without a tokenizer; must contain tokenizer.json or "
            f"tokenizer.model (found: {listing(folder)}); set `tokenizer:`"
        )


def resolve_folder(path: str, *, where: str) -> Path | None:
    """Return the folder at `path`, or None for a hub id. Raises ModelError if it is neither.

    The folder of a GGUF file is that of its conversion.
    """
    # Unknown users and overlong names are just missing to `os.path`; `pathlib` raises.
    folder = Path(os.path.expanduser(path))
    if (local := local_folder(path, where=where)) is not None:
        return local
    if os.path.isfile(folder):
        raise ModelError(
            f"{where}: got {path}, which is a file; must be the folder that contains {CONFIG}, or "
            "a GGUF file"
        )
    if HUB_ID.match(path) and not path.startswith(".") and not os.path.isdir(folder.parent):
        return None
    parent = next(p for p in folder.parents if os.path.isdir(p))
    raise ModelError(
        f"{where}: got {path}, which does not exist; must be a model folder or a hub id "
        f"`owner/name`; {parent} contains: {listing(parent)}"
    )
