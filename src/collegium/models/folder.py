"""What a model folder tells before a weight is loaded: its files are data, read with care and never run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from collegium.errors import ModelError, nearest
from collegium.types import STRICT

DType = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 100_000_000
KERNEL_KEYS = ("_attn_implementation", "_attn_implementation_internal", "attn_implementation")
LFS_MAGIC = b"version https://git-lfs"
HUB_ID = re.compile(r"^[\w.\-]+/[\w.\-]+$")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelOptions:
    """Where a model is and how it is loaded; nothing is inherited from another model."""

    model: Annotated[str, Field(min_length=1)]
    """A Hugging Face model folder, or a hub id `owner/name`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer: str | None = None
    """Folder of the tokenizer, where it is not the model's own."""
    dtype: DType = "auto"
    """Number type of the weights; `auto` keeps the one they were saved in."""
    device: Device = "auto"
    """`auto` is the first CUDA device, else Apple's, else the CPU."""
    attention: Attention = "auto"
    """`auto` is `sdpa` where the model has it, else `eager`."""
    trust_remote_code: bool = False
    """Run the Python files that come with the model; review them first."""

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer is: `tokenizer`, else the model itself."""
        return self.tokenizer or self.model


def check_model_folder(options: ModelOptions, *, where: str) -> None:
    """Check everything that can be known about a model without loading a weight; a hub id passes.

    Raises:
        ModelError: the folder, a file in it, or the device cannot be used.
    """
    check_device(options.device, where=where)
    check_attention(options.attention, where=where)
    folder = resolve_folder(options.model, where=where)
    if folder is not None:
        config = _read_json(folder / CONFIG, where=where)
        _check_model_type(config, folder, options.trust_remote_code, where=where)
        for shard in shards(folder, where=where):
            _check_dtypes(read_header(shard, where=where), shard, where=where)
    if folder is not None or options.tokenizer is not None:
        check_tokenizer_folder(options.tokenizer_path, where=where)


def ignored_settings(options: ModelOptions, *, where: str) -> list[str]:
    """What a config asks for and does not get: kernels of its own choice, which are code from elsewhere."""
    folder = resolve_folder(options.model, where=where)
    config = {} if folder is None else _read_json(folder / CONFIG, where=where)
    return [
        f"{where}: {CONFIG} tries to choose an attention kernel, `{config[key]}`; ignored"
        for key in KERNEL_KEYS
        if config.get(key)
    ]


def check_device(device: str, *, where: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ModelError: no such device.
    """
    if device.startswith("cuda"):
        number, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
        if number >= count:
            raise ModelError(
                f"{where}.device: got {device}, and {count} CUDA devices were found; "
                f"must be a device of this machine; set `device: cpu`"
            )
    if device == "mps" and not torch.backends.mps.is_available():
        raise ModelError(f"{where}.device: got mps, which is not available; set `device: cpu`")


def check_attention(attention: str, *, where: str) -> None:
    """Refuse an implementation of attention that is not installed.

    Raises:
        ModelError: the package is missing.
    """
    if attention == "flash_attention_2":
        from transformers.utils.import_utils import is_flash_attn_2_available

        if not is_flash_attn_2_available():
            raise ModelError(
                f"{where}.attention: got {attention}, and the package flash-attn is not installed or "
                "finds no CUDA device; must be installed; set `attention: auto`"
            )


def check_tokenizer_folder(path: str, *, where: str) -> None:
    """Refuse a folder without tokenizer files; a hub id passes.

    Raises:
        ModelError: the folder does not exist or holds no tokenizer.
    """
    folder = resolve_folder(path, where=where)
    if folder is not None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{where}: got {folder}, without a tokenizer; must hold tokenizer.json or "
            f"tokenizer.model (found: {_listing(folder)}); set `tokenizer:`"
        )


def resolve_folder(path: str, *, where: str) -> Path | None:
    """The existing folder at `path`, or None for a hub id.

    Raises:
        ModelError: a file, or neither an existing path nor shaped like a hub id.
    """
    folder = Path(os.path.expanduser(path))
    if os.path.isdir(folder):
        return folder
    if os.path.isfile(folder):
        raise ModelError(
            f"{where}: got {path}, which is a file; must be the folder that holds {CONFIG}"
        )
    if HUB_ID.match(path) and not path.startswith(".") and not os.path.isdir(folder.parent):
        return None
    parent = next((p for p in folder.parents if os.path.isdir(p)), Path("."))
    raise ModelError(
        f"{where}: got {path}, which does not exist; must be a model folder or a hub id "
        f"`owner/name`; in {parent} there are: {_listing(parent)}"
    )


def read_header(path: Path, *, where: str) -> dict[str, dict[str, Any]]:
    """Names, dtypes and shapes of the tensors of a safetensors file, which must be as long as they need.

    Raises:
        ModelError: a git-lfs pointer, a damaged header, a truncated file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(LFS_MAGIC))
        if start == LFS_MAGIC:
            raise ModelError(
                f"{where}: {path} is a git-lfs pointer, not weights; run `git lfs pull`"
            )
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ModelError(f"{where}: {path} is not a safetensors file; copy it again")
        file.seek(8)
        text = file.read(length)
    if len(text) < length:
        raise _truncated(path, size, 8 + length, where=where)
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{where}: {path} has a damaged header; copy it again") from error
    if size != 8 + length + end:
        raise _truncated(path, size, 8 + length + end, where=where)
    return tensors


def read_headers(folder: Path, *, where: str) -> dict[str, dict[str, Any]]:
    """`read_header` over all shards of a model folder.

    Raises:
        ModelError: no weights, or a shard that cannot be used.
    """
    headers: dict[str, dict[str, Any]] = {}
    for shard in shards(folder, where=where):
        headers.update(read_header(shard, where=where))
    return headers


def weights_size(path: str) -> int:
    """Bytes of the safetensors files of a folder; 0 for a hub id."""
    folder = Path(os.path.expanduser(path))
    return sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))


def weights_digest(path: str) -> str:
    """SHA-256 over the safetensors files of a folder, which tells the same weights under two names.

    A hub id is not fetched; its digest is that of the name.
    """
    folder = Path(os.path.expanduser(path))
    digest = hashlib.sha256()
    if not folder.is_dir():
        digest.update(f"hub:{path}".encode())
        return digest.hexdigest()
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _read_json(path: Path, *, where: str) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(
            f"{where}: no {path.name} in {path.parent} (found: {_listing(path.parent)}); "
            f"must be a Hugging Face model folder"
        )
    data = path.read_bytes()
    try:
        value = json.loads(data.decode())
    except json.JSONDecodeError as error:
        rest = data.decode()[error.pos :].strip()
        fault = (
            f"line {error.lineno}, column {error.colno}: {error.msg}"
            if rest and not error.msg.startswith("Unterminated")
            else f"ends at byte {len(data)} inside a value"
        )
        raise ModelError(f"{where}: {path} {fault}; must be JSON; copy it again") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{where}: {path} is not UTF-8 text; copy it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{where}: {path} holds {type(value).__name__}; must be a JSON object")
    return value


def _check_model_type(
    config: Mapping[str, Any], folder: Path, trust_remote_code: bool, *, where: str
) -> None:
    if config.get("auto_map"):
        if trust_remote_code:
            return
        files = ", ".join(sorted(p.name for p in folder.glob("*.py"))) or "elsewhere"
        raise ModelError(
            f"{where}: {folder} needs its own Python code ({files}); refused; "
            f"review it, then set `trust_remote_code: true`"
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(
            f"{where}: {folder / CONFIG} has no `model_type`; must be a transformers config; "
            f"copy it again"
        )
    # the tables of names alone, which take a second less than the models themselves
    import transformers
    from transformers.models.auto.configuration_auto import (
        CONFIG_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in CONFIG_MAPPING_NAMES:
        raise ModelError(
            f"{where}: {folder / CONFIG} has model_type `{model_type}`, which transformers "
            f"{transformers.__version__} does not know{_did_you_mean(model_type, CONFIG_MAPPING_NAMES)}"
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{where}: {folder / CONFIG} has model_type `{model_type}`, which is no causal language "
            f"model; must predict the next token; give another model"
        )


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest name, without the list of all of them: there are hundreds."""
    hint = nearest(name, known)
    return hint if hint.startswith("; did") else "; is it custom code, or of a newer release?"


def shards(folder: Path, *, where: str) -> list[Path]:
    """The files that hold the weights, in the order of the index; each exists inside the folder."""
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX, where=where).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{where}: {folder / INDEX} has no `weight_map`; copy it again")
        names = list(dict.fromkeys(str(name) for name in weight_map.values()))
        return [_inside(folder, name, where=where) for name in names]
    if (folder / WEIGHTS).exists():
        return [_inside(folder, WEIGHTS, where=where)]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{where}: {folder} holds an adapter, not a model; merge it into its base model first"
        )
    if pickles:
        raise ModelError(
            f"{where}: {folder / pickles[0]} is a pickle, which can run code, and is refused; "
            f"must be *.safetensors; save the model again with `save_pretrained`"
        )
    raise ModelError(f"{where}: no {WEIGHTS} in {folder} (found: {_listing(folder)})")


def _inside(folder: Path, name: str, *, where: str) -> Path:
    path = folder / name
    # A cache of the hub links every file into a folder beside it; a link out of a plain folder is no
    # way to reach weights either, but it stays readable. Names that climb are refused.
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ModelError(
            f"{where}: `{name}` in {INDEX} lies outside the model folder {folder}; refused"
        )
    if not path.is_file():
        raise ModelError(f"{where}: {INDEX} names {name}; it is not in {folder}; copy it again")
    root = folder.resolve()
    allowed = (root, root.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise ModelError(
            f"{where}: {path} is a link out of the model folder, to {path.resolve()}; refused"
        )
    return path


def _check_dtypes(header: Mapping[str, Mapping[str, Any]], path: Path, *, where: str) -> None:
    for name, entry in header.items():
        if entry.get("dtype") not in FLOATS:
            raise ModelError(
                f"{where}: {name} in {path} is {entry.get('dtype')}; must be one of "
                f"{', '.join(FLOATS)}; quantized weights are not supported"
            )


def _truncated(path: Path, size: int, needed: int, *, where: str) -> ModelError:
    return ModelError(
        f"{where}: {path} has {size:,} bytes, its header needs {needed:,}; copy it again"
    )


def _listing(folder: Path, limit: int = 12) -> str:
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more
