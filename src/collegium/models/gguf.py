"""GGUF files as models: converted once to a Hugging Face folder in float32.

transformers takes from ten seconds to a minute to read the tokenizer and to dequantize the weights
of a small model, and a run loads a teacher several times. In float32 the values of the file are
exact, and everything that holds for a folder holds for a converted file.
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from collegium.console import say
from collegium.errors import ModelError, first_line
from collegium.storage.files import USER_CACHE, sha256_of, user_cache

SUFFIX = ".gguf"
MAGIC = b"GGUF"
BYTES_PER_FILE_BYTE = 8
"""Space that a conversion needs at most, of float32 values from a file of 4 bits per value."""


def is_gguf(path: str) -> bool:
    """Whether a path names a GGUF file rather than a folder or a hub id."""
    return path.lower().endswith(SUFFIX)


def converted(file: Path, *, where: str) -> Path:
    """Return the folder of a converted GGUF file, which is converted if there is none yet.

    The folder is `$COLLEGIUM_CACHE/gguf/NAME-DIGEST`, and depends on the content of the file only.
    It may be deleted at any time.

    Raises:
        ModelError: the package gguf is missing, the file is damaged, of a type that transformers
            does not read or without tokenizer, or the disk is full.
    """
    stat = file.stat()
    return _converted(file, where, (stat.st_size, stat.st_mtime_ns))


@lru_cache(maxsize=64)
def _converted(file: Path, where: str, _version: tuple[int, int]) -> Path:
    root = user_cache() / "gguf"
    folder = root / f"{file.stem}-{sha256_of(file)[:12]}"
    if folder.is_dir():
        return folder
    _check_file(file, where)
    root.mkdir(parents=True, exist_ok=True)
    needed, free = BYTES_PER_FILE_BYTE * file.stat().st_size, shutil.disk_usage(root).free
    if free < needed:
        raise ModelError(
            f"{where}: {file} takes up to {needed / 1e9:.1f} GB when converted, and {root} has "
            f"{free / 1e9:.1f} GB free; free some space, or set {USER_CACHE} to another folder"
        )
    say(f"{where}: converting {file.name} once, to {folder}")
    with tempfile.TemporaryDirectory(dir=root, prefix=".tmp-") as temporary:
        _convert(file, Path(temporary) / "model", where)
        try:
            (Path(temporary) / "model").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def _check_file(file: Path, where: str) -> None:
    with file.open("rb") as binary:
        head = binary.read(8)
    if len(head) < 8 or head[:4] != MAGIC:
        raise ModelError(f"{where}: {file} is not a GGUF file; copy it again")
    (version,) = struct.unpack("<I", head[4:])
    if version not in (2, 3):
        raise ModelError(f"{where}: {file} has GGUF version {version}; must be 2 or 3; convert it")
    if find_spec("gguf") is None:
        raise ModelError(
            f"{where}: GGUF files need the package gguf; pip install 'collegium[gguf]'"
        )


def _convert(file: Path, folder: Path, where: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(file.parent.absolute()), file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=name,
            dtype=torch.float32,
            # Otherwise the model is one of quantized weights, which cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # Damaged files and unknown types raise errors of any type.
    except Exception as error:
        raise ModelError(
            f"{where}: {file} cannot be converted ({first_line(error)}); must be a causal language "
            "model whose type transformers reads from GGUF; copy it again, or use the original "
            "model"
        ) from error
