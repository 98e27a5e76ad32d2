"""Weight files of a model folder: selection, headers and digests. No file is executed.

The files are those that transformers would read. A folder from which it could read two different
models is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from collegium.errors import ModelError
from collegium.models.gguf import converted, is_gguf
from collegium.options import torch
from collegium.storage.files import listing

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
FLOATS = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Data types of safetensors and their names in torch, the widest range first."""
TABLES = ("I64",)
"""Further types that a file may hold: lookup tables, such as the experts of a token."""
QUANTIZED_PACKAGES = {
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "gptq": ("gptqmodel", "optimum"),
}
"""Methods by which the weights of a folder may be quantized, and the packages that load them."""
COMPACT = ("bitsandbytes", "gptq")
"""Those that stay quantized in memory. The others are turned into floats on load."""
_METHODS = "bitsandbytes, compressed-tensors or gptq"
LFS_MAGIC = b"version https://git-lfs"


class TensorEntry(NamedTuple):
    """A tensor in the header of a weight file."""

    file: Path
    dtype: str
    """A key of `FLOATS`, one of `TABLES`, or any type in a folder of quantized weights."""
    shape: tuple[int, ...]


def refuse_adapter(folder: Path, *, where: str) -> None:
    """Raise ModelError if a folder holds an adapter, with or without the weights of a model."""
    if not (folder / ADAPTER).is_file():
        return
    base = read_json(folder / ADAPTER, where=where).get("base_model_name_or_path")
    merge = (
        f"merge it into its base model{f' {base}' if base else ''} with "
        "`PeftModel.from_pretrained(base, folder).merge_and_unload()`, and save the result and the "
        "tokenizer to a new folder"
    )
    if (folder / CONFIG).is_file() and any(folder.glob("model*.safetensors")):
        raise ModelError(
            f"{where}: {folder} contains a model and an adapter ({ADAPTER}), which transformers "
            f"would add to the model; must contain one of them; delete {ADAPTER} if it "
            f"is merged already, else {merge}"
        )
    raise ModelError(f"{where}: {folder} contains an adapter, not a model; {merge}")


def weight_files(folder: Path, *, where: str) -> list[Path]:
    """Return the files that transformers reads, or raise ModelError if they are not clear."""
    refuse_adapter(folder, where=where)
    chosen = read_json(folder / CONFIG, where=where).get("transformers_weights")
    if chosen is not None:
        return _inside(folder, [str(chosen)], CONFIG, where)
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():
        # transformers prefers the single file. An index without its shards is left over from an
        # earlier save and harmless.
        listed = _shards(folder, where=where) if index.is_file() else []
        others = [path.name for path in listed if path != single and path.is_file()]
        if others:
            raise ModelError(
                f"{where}: {folder} contains {WEIGHTS}, and {INDEX} with {others[0]}; must contain "
                "one set of weights; delete the older one"
            )
        return [single]
    if not index.is_file():
        _refuse_without_weights(folder, where=where)
    for path in (paths := _shards(folder, where=where)):
        if not path.is_file():
            raise ModelError(
                f"{where}: {INDEX} lists {path.name}, which is not in {folder}; copy it again"
            )
    return paths


def _shards(folder: Path, *, where: str) -> list[Path]:
    names = dict.fromkeys(_weight_map(folder, where=where).values())
    return _inside(folder, list(names), INDEX, where)


def _weight_map(folder: Path, *, where: str) -> dict[str, str]:
    weight_map = read_json(folder / INDEX, where=where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{where}: {folder / INDEX} has no `weight_map`; copy it again")
    return {name: str(file) for name, file in weight_map.items()}


def _inside(folder: Path, names: list[str], source: str, where: str) -> list[Path]:
    # A file that came with the folder must not name files elsewhere. Links are followed: they were
    # made on this machine, by a user or by the cache of the hub.
    for name in names:
        if os.path.isabs(name) or os.path.normpath(name).startswith(".."):
            raise ModelError(
                f"{where}: {source} lists {name}, which is outside the model folder; refused"
            )
    return [folder / name for name in names]


def _refuse_without_weights(folder: Path, *, where: str) -> None:
    for name in (WEIGHTS, INDEX):
        if (folder / name).is_symlink():
            raise ModelError(
                f"{where}: {folder / name} is a link to {(folder / name).resolve()}, which is not "
                "a file; copy the file, or link it again"
            )
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES):
        raise ModelError(
            f"{where}: {folder / pickles[0]} is a pickle, which can run code, and is refused; "
            f"must be *.safetensors; save the model again with `save_pretrained`"
        )
    raise ModelError(f"{where}: no {WEIGHTS} in {folder} (found: {listing(folder)})")


def read_headers(folder: Path, *, where: str) -> dict[str, TensorEntry]:
    """Return all tensors of a folder by name, reading only headers.

    Raises ModelError for a file that is incomplete or of an unsupported type, and for tensors that
    are not in the one file that the index names.
    """
    files = weight_files(folder, where=where)
    is_quantized = declared_quantization(folder, where=where) in QUANTIZED_PACKAGES
    entries: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file, where=where, any_type=is_quantized).items():
            if name in entries:
                raise ModelError(
                    f"{where}: {name} is in {entries[name].file.name} and in {file.name}; must be "
                    "in one file; copy the model again"
                )
            entries[name] = entry
    if files[0] == folder / WEIGHTS or not (folder / INDEX).is_file():
        return entries
    weight_map = _weight_map(folder, where=where)
    for name in sorted(weight_map.keys() | entries.keys()):
        actual = entries[name].file.relative_to(folder).as_posix() if name in entries else "no file"
        listed = weight_map.get(name)
        if listed is None or os.path.normpath(listed) != actual:
            raise ModelError(
                f"{where}: {INDEX} lists {name} in {listed or 'no file'}, but it is in {actual}; "
                "must list every tensor in its file; copy the model again"
            )
    return entries


def declared_quantization(folder: Path, *, where: str) -> str | None:
    """Return the method that config.json names, None without one. The weights may be floats."""
    settings = read_json(folder / CONFIG, where=where).get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return method if isinstance(method, str) else None


def quantization_of(folder: Path, *, where: str) -> str | None:
    """Return the method by which the weights of a folder are quantized, None for floats.

    A config that names a method beside float weights is left over, and ignored.
    """
    method = declared_quantization(folder, where=where)
    if method not in QUANTIZED_PACKAGES:
        return None
    types = {entry.dtype for entry in read_headers(folder, where=where).values()}
    return None if types <= {*FLOATS, *TABLES} else method


def read_header(path: Path, *, where: str, any_type: bool = False) -> dict[str, TensorEntry]:
    """Read the header of a complete safetensors file, of floats unless it may have `any_type`.

    Raises ModelError if the file is incomplete, or has other types.
    """
    try:
        # The header is validated on opening, including that the tensors cover the file exactly.
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            entries = {
                name: TensorEntry(path, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
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
    for name, entry in entries.items():
        if not any_type and entry.dtype not in FLOATS and entry.dtype not in TABLES:
            raise ModelError(
                f"{where}: {name} in {path} is {entry.dtype}; must be one of {', '.join(FLOATS)}; "
                f"quantized weights need a quantization_config of {_METHODS} in {CONFIG}"
            )
    return entries


def main_dtype(entries: Mapping[str, TensorEntry]) -> str:
    """Return the name of the data type that most values have; at a tie the one of wider range."""
    # A few tensors, such as norms or the bias of a router, may be wider than the model.
    count = Counter[str]()
    for entry in entries.values():
        count[entry.dtype] += prod(entry.shape)
    return FLOATS[max(FLOATS, key=lambda dtype: count[dtype])]


def local_folder(path: str, *, where: str) -> Path | None:
    """Return the folder at a path, that of a converted GGUF file, or None for a hub id."""
    folder = Path(os.path.expanduser(path))
    if is_gguf(path) and os.path.isfile(folder):
        return converted(folder, where=where)
    return folder if os.path.isdir(folder) else None


def weights_layout(path: str) -> frozenset[tuple[str, str, tuple[int, ...]]]:
    """Return names, types and shapes of a folder's tensors, empty for a hub id."""
    folder = local_folder(path, where=path)
    if folder is None:
        return frozenset()
    entries = read_headers(folder, where=path)
    return frozenset((name, entry.dtype, entry.shape) for name, entry in entries.items())


def weights_digest(path: str) -> str:
    """Return the SHA-256 of a folder's tensors: names, types, shapes and values.

    Copies of the same weights have the same digest, in any number of files. A hub id is not
    fetched: its digest is that of the name.
    """
    folder = local_folder(path, where=path)
    if folder is None:
        return hashlib.sha256(f"hub:{path}".encode()).hexdigest()
    stats = [(file, file.stat()) for file in weight_files(folder, where=path)]
    version = tuple((str(f), stat.st_size, stat.st_mtime_ns) for f, stat in stats)
    return _digest(folder, version)


def weights_sample(path: str) -> str:
    """Return the SHA-256 of the first row of each tensor, a small part of what models differ in."""
    folder, digest = local_folder(path, where=path), hashlib.sha256()
    if folder is None:
        return weights_digest(path)
    for name, entry in sorted(read_headers(folder, where=path).items()):
        with safe_open(entry.file, framework="pt") as file:
            values: Tensor = file.get_slice(name)[:1] if entry.shape else file.get_tensor(name)
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _digest(folder: Path, _version: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for name, entry in sorted(read_headers(folder, where=str(folder)).items()):
        # One tensor at a time, so a large model needs little memory.
        with safe_open(entry.file, framework="pt") as file:
            values: Tensor = file.get_tensor(name)
        digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
