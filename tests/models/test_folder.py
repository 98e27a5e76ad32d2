"""Every way a model folder can be wrong, and what the user reads."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from collegium.errors import ModelError
from collegium.models import ModelOptions, check_model_folder, weights_digest
from collegium.models.folder import ignored_settings, weights_size
from tiny import save_tiny

HERE = "teachers[0]"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("original") / "m")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "m")
    return tmp_path / "m"


def check(folder: Path, **options: object) -> None:
    check_model_folder(ModelOptions(model=str(folder), **options), where=HERE)  # type: ignore[arg-type]


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder: Path, names: dict[str, str]) -> None:
    """Replace the one file of weights by an index."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def refused(folder: Path, message: str, **options: object) -> None:
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        check(folder, **options)
    assert str(caught.value).startswith(HERE)


def test_a_good_folder_passes(folder: Path) -> None:
    check(folder)


def test_a_hub_id_passes() -> None:
    check(Path("someone/some-model-1.5B"))


def test_missing_path_lists_what_is_there(folder: Path) -> None:
    refused(
        folder.parent / "n",
        f"got {folder.parent / 'n'}, which does not exist; must be a model folder or a hub id "
        f"`owner/name`; in {folder.parent} there are: m",
    )
    refused(Path("./nowhere"), "got nowhere, which does not exist")


def test_missing_path_in_an_existing_folder_is_no_hub_id(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    refused(Path("m/final"), "got m/final, which does not exist")


def test_path_is_a_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    refused(file, f"got {file}, which is a file; must be the folder that holds config.json")


def test_config_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, f"no config.json in {folder} (found: ")


def test_config_truncated(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    refused(folder, f"{folder}/config.json ends at byte 15 inside a value; must be JSON")
    (folder / "config.json").write_text('{"model_type": "lla')
    refused(folder, "ends at byte 19 inside a value")
    (folder / "config.json").write_text('{"a": 1,\n "b" 2}')
    refused(folder, "config.json line 2, column 6: Expecting ':' delimiter")
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    refused(folder, "config.json is not UTF-8 text")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json holds list; must be a JSON object")


def test_config_without_model_type(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    refused(folder, f"{folder}/config.json has no `model_type`")


def test_unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="lama")
    refused(folder, "has model_type `lama`, which transformers ")
    refused(folder, "does not know; did you mean `")
    edit_config(folder, model_type="zzzz9999")
    refused(folder, "does not know; is it custom code, or of a newer release?")


def test_a_model_that_does_not_predict_the_next_token(folder: Path) -> None:
    edit_config(folder, model_type="t5")
    refused(
        folder,
        f"{folder}/config.json has model_type `t5`, which is no causal language model; must predict "
        f"the next token; give another model",
    )


def test_kernels_that_a_config_asks_for_are_told(folder: Path) -> None:
    options = ModelOptions(model=str(folder))
    assert ignored_settings(options, where=HERE) == []
    assert ignored_settings(ModelOptions(model="some/model"), where=HERE) == []
    edit_config(folder, _attn_implementation_internal="a/b")
    assert ignored_settings(options, where=HERE) == [
        f"{HERE}: config.json tries to choose an attention kernel, `a/b`; ignored"
    ]


def test_attention_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = "transformers.utils.import_utils.is_flash_attn_2_available"
    monkeypatch.setattr(found, lambda: False)
    refused(
        folder,
        ".attention: got flash_attention_2, and the package flash-attn is not installed or finds no "
        "CUDA device; must be installed; set `attention: auto`",
        attention="flash_attention_2",
    )
    monkeypatch.setattr(found, lambda: True)
    check(folder, attention="flash_attention_2")


def test_a_path_that_no_system_has_is_just_missing() -> None:
    for path in ("~nosuchuser/m", "a" * 5000, "a\0b"):
        with pytest.raises(ModelError, match="which does not exist"):
            check_model_folder(ModelOptions(model=path), where=HERE)


def test_custom_code_is_refused_unless_trusted(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"}, model_type="xx")
    (folder / "modeling_x.py").write_text("raise SystemExit('ran')")
    refused(
        folder,
        f"{folder} needs its own Python code (modeling_x.py); refused; review it, then set "
        f"`trust_remote_code: true`",
    )
    check(folder, trust_remote_code=True)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, f"no model.safetensors in {folder} (found: config.json, generation_config.json")


def test_only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    refused(folder, f"{folder}/pytorch_model.bin is a pickle, which can run code, and is refused")


def test_only_an_adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds an adapter, not a model; merge it")


def test_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    refused(folder, "model.safetensors is a git-lfs pointer, not weights; run `git lfs pull`")


def test_truncated_and_lengthened_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for cut in (data[:-1], data + b"x", data[:200]):
        file.write_bytes(cut)
        refused(folder, f"model.safetensors has {len(cut):,} bytes, its header needs ")


@pytest.mark.parametrize(
    "data",
    [b"", b"abc", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 0) + b"x" * 50],
)
def test_not_a_safetensors_file(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, "model.safetensors is not a safetensors file; copy it again")


@pytest.mark.parametrize(
    "text", [b"{]", b"[]", b'{"a": 1}', b'{"a": {}}', b'{"a": {"data_offsets": 3}}']
)
def test_damaged_header(folder: Path, text: bytes) -> None:
    data = struct.pack("<Q", len(text)) + text
    (folder / "model.safetensors").write_bytes(data)
    refused(folder, "model.safetensors has a damaged header; copy it again")


def test_shard_missing(folder: Path) -> None:
    shard(folder, {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"})
    refused(
        folder, "model.safetensors.index.json names model-00002-of-00002.safetensors; it is not"
    )


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/passwd", "a/../../b"])
def test_shard_outside(folder: Path, name: str) -> None:
    shard(folder, {"a": name})
    refused(folder, f"`{name}` in model.safetensors.index.json lies outside the model folder")


def test_link_out_of_the_folder(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    refused(folder, "is a link out of the model folder")


def test_layout_of_the_hub_cache_is_accepted(folder: Path) -> None:
    snapshot, blobs = folder.parent / "h" / "snapshots" / "abc", folder.parent / "h" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    (snapshot / "model.safetensors").rename(blobs / "123")
    (snapshot / "model.safetensors").symlink_to(blobs / "123")
    check(snapshot)


def test_index_without_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, "model.safetensors.index.json has no `weight_map`")


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.bool, "BOOL")])
def test_weights_that_are_no_floats(folder: Path, dtype: torch.dtype, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, f"is {name}; must be one of F64, F32, F16, BF16")


def test_tokenizer_missing(folder: Path, original: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(folder, f"got {folder}, without a tokenizer; must hold tokenizer.json")
    check(folder, tokenizer=str(original))


def test_no_such_device(folder: Path) -> None:
    count = torch.cuda.device_count()
    refused(
        folder,
        f".device: got cuda:{count}, and {count} CUDA devices were found; must be a device of this "
        f"machine; set `device: cpu`",
        device=f"cuda:{count}",
    )


@pytest.mark.parametrize(
    "options", [{"device": "gpu"}, {"dtype": "int8"}, {"model": ""}, {"revison": "main"}]
)
def test_options_are_strict(options: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        ModelOptions(**{"model": "m", **options})  # type: ignore[arg-type]


def test_digest_tells_weights_apart(folder: Path, original: Path) -> None:
    assert weights_digest(str(folder)) == weights_digest(str(original))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert weights_digest(str(folder)) != weights_digest(str(original))
    assert weights_digest("someone/a") != weights_digest("someone/b")
    assert weights_size(str(folder)) == weights_size(str(original)) > 0 == weights_size("someone/a")
