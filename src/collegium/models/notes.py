"""Warnings about statements of a config that do not hold for the weights next to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import safe_open

from collegium.models.folder import is_native, resolve_folder
from collegium.models.weights import CONFIG, main_dtype, quantization_of, read_headers
from collegium.options import torch

if TYPE_CHECKING:
    from pathlib import Path

    from collegium.models.options import ModelOptions

KERNEL_KEYS = ("_attn_implementation", "_attn_implementation_internal", "attn_implementation")


def config_notes(options: ModelOptions, *, where: str) -> list[str]:
    """Return a line per statement of config.json that is not followed, none for hub ids."""
    folder = resolve_folder(options.model, where=where)
    if folder is None:
        return []
    config, place = options.raw_config(where), f"{where}: {CONFIG}"
    # Such a name can refer to a kernel on the hub, which is third-party code.
    lines = [
        f"{place} tries to choose an attention kernel, `{config[key]}`; ignored"
        for key in KERNEL_KEYS
        if config.get(key)
    ]
    if config.get("auto_map") and is_native(config.get("model_type")):
        lines.append(
            f"{place} has an auto_map; ignored, since transformers has its own class for "
            f"`{config['model_type']}`"
        )
    quantization = config.get("quantization_config")
    if quantization and not quantization_of(folder, where=where):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else "unknown"
        lines.append(
            f"{place} has a quantization_config ({method}), but the weights are not quantized; "
            "ignored"
        )
    said, saved = _said_dtype(config), main_dtype(read_headers(folder, where=where))
    if options.dtype == "auto" and said not in (None, saved):
        lines.append(f"{place} says {said}, but the weights are {saved}, which is used")
    if _has_untied_head(options, folder, where):
        lines.append(
            f"{place} says tie_word_embeddings, but the weights have a head of their own, which is "
            "used; a student is saved with `tie_word_embeddings: false`"
        )
    return lines


def _said_dtype(config: dict[str, object]) -> object:
    text = config.get("text_config")
    parts = [config, text if isinstance(text, dict) else {}]
    keys = ("dtype", "torch_dtype")
    return next((part[key] for part in parts for key in keys if part.get(key)), None)


def _has_untied_head(options: ModelOptions, folder: Path, where: str) -> bool:
    if options.runs_code(where):
        return False
    config = options.load_config(where)
    text = config.get_text_config()
    if not (config.tie_word_embeddings and text.tie_word_embeddings):
        return False
    # Names differ between families, so the embedding and the head are found by their shape.
    shape = (text.vocab_size, text.hidden_size)
    entries = read_headers(folder, where=where)
    first = None
    for name, entry in entries.items():
        if entry.shape != shape:
            continue
        with safe_open(entry.file, framework="pt") as file:
            tensor = file.get_tensor(name)
        if first is not None and not torch.equal(first, tensor):
            return True
        first = tensor
    return False
