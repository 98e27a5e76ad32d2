"""Validation of model folders before weights are loaded. Files are untrusted and never executed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from collegium.errors import ModelError, nearest
from collegium.options import torch
from collegium.storage.files import listing

if TYPE_CHECKING:
    from collegium.models.options import ModelOptions

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
FLOATS = ("F64", "F32", "F16", "BF16")
LFS_MAGIC = b"version https://git-lfs"
HUB_ID = re.compile(r"^[\w.\-]+/[\w.\-]+$")


def check_model_folder(options: ModelOptions, *, where: str) -> None:
    """Check device, attention and files of a model without loading weights or fetching a hub id."""
    check_device(options.device, options.attention, where=where)
    folder = resolve_folder(options.model, where=where)
    if folder is not None:
        config = read_json(folder / CONFIG, where=where)
        if not config.get("auto_map"):
            place = f"{where}: {folder / CONFIG}: model_type"
            check_model_type(config.get("model_type"), where=place)
        elif not options.trust_remote_code:
            files = ", ".join(sorted(p.name for p in folder.glob("*.py"))) or "elsewhere"
            raise ModelError(
                f"{where}: {folder} requires custom Python code ({files}); refused; "
                f"review it, then set `trust_remote_code: true`"
            )
        for shard in shards(folder, where=where):
            _check_header(shard, where=where)
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


def check_model_type(model_type: object, *, where: str) -> None:
    """Check that transformers has a causal language model of this type."""
    # Only the name tables: importing the model classes would take a second longer.
    from transformers import CONFIG_MAPPING, __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    hint = ""
    if model_type in CONFIG_MAPPING:
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
    """Return the folder at `path`, or None for a hub id. Raises ModelError if it is neither."""
    # Unknown users and overlong names are just missing to `os.path`; `pathlib` raises.
    folder = Path(os.path.expanduser(path))
    if os.path.isdir(folder):
        return folder
    if os.path.isfile(folder):
        raise ModelError(
            f"{where}: got {path}, which is a file; must be the folder that contains {CONFIG}"
        )
    if HUB_ID.match(path) and not path.startswith(".") and not os.path.isdir(folder.parent):
        return None
    parent = next(p for p in folder.parents if os.path.isdir(p))
    raise ModelError(
        f"{where}: got {path}, which does not exist; must be a model folder or a hub id "
        f"`owner/name`; {parent} contains: {listing(parent)}"
    )


def shards(folder: Path, *, where: str) -> list[Path]:
    """Return the weight files in index order, or raise ModelError if one is missing or unsafe."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, where=where).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{where}: {folder / INDEX} has no `weight_map`; copy it again")
        names = list(dict.fromkeys(str(name) for name in weight_map.values()))
    elif not (folder / WEIGHTS).exists():
        _refuse_without_weights(folder, where=where)
    root = folder.resolve()
    # The hub cache symlinks every file of a snapshot into the `blobs` folder next to it.
    allowed = (root, root.parent.parent / "blobs")
    for name in names:
        # The index is untrusted: absolute names, `..` and links could reach any file.
        path = (folder / name).resolve()
        if not any(path.is_relative_to(parent) for parent in allowed):
            raise ModelError(
                f"{where}: {folder / name} is outside the model folder, at {path}; refused"
            )
        if not path.is_file():
            raise ModelError(
                f"{where}: {INDEX} lists {name}, which is not in {folder}; copy it again"
            )
    return [folder / name for name in names]


def _refuse_without_weights(folder: Path, *, where: str) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{where}: {folder} contains an adapter, not a model; merge it into its base model "
            "first"
        )
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES):
        raise ModelError(
            f"{where}: {folder / pickles[0]} is a pickle, which can run code, and is refused; "
            f"must be *.safetensors; save the model again with `save_pretrained`"
        )
    raise ModelError(f"{where}: no {WEIGHTS} in {folder} (found: {listing(folder)})")


def _check_header(path: Path, *, where: str) -> None:
    """Check that a safetensors file is complete and holds floats, reading no tensor."""
    try:
        # The header is validated on opening, including that the tensors cover the file exactly.
        with safe_open(path, framework="np") as file:
            names = file.keys()
            dtypes = {name: file.get_slice(name).get_dtype() for name in names}
    except SafetensorError as error:
        with path.open("rb") as binary:
            if binary.read(len(LFS_MAGIC)) == LFS_MAGIC:
                raise ModelError(
                    f"{where}: {path} is a git-lfs pointer, not weights; run `git lfs pull`"
                ) from error
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise ModelError(
            f"{where}: {path} is truncated, damaged or not a safetensors file "
            f"({path.stat().st_size:,} bytes; {reason}); copy it again"
        ) from error
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise ModelError(
                f"{where}: {name} in {path} is {dtype}; must be one of {', '.join(FLOATS)}; "
                "quantized weights are not supported"
            )


def weights_size(path: str) -> int:
    """Return the total size of a folder's safetensors files in bytes, 0 for a hub id."""
    return sum(shard.stat().st_size for shard in _weight_files(path))


def weights_digest(path: str) -> str:
    """Return the SHA-256 of a folder's safetensors files, equal for copies of the same weights.

    A hub id is not fetched: its digest is that of the name.
    """
    is_folder = os.path.isdir(os.path.expanduser(path))
    digest = hashlib.sha256(b"" if is_folder else f"hub:{path}".encode())
    for shard in _weight_files(path):
        with shard.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _weight_files(path: str) -> list[Path]:
    return sorted(Path(os.path.expanduser(path)).glob("*.safetensors"))


def read_json(path: Path, *, where: str) -> dict[str, Any]:
    """Read a JSON object of a model folder."""
    if not path.is_file():
        raise ModelError(
            f"{where}: no {path.name} in {path.parent} (found: {listing(path.parent)}); "
            f"must be a Hugging Face model folder"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: {path} is not JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{where}: {path}: got {type(value).__name__}; must be a JSON object")
    return value
