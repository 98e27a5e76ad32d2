"""Every way a model folder can be invalid, and the error that the user sees."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from collegium.errors import ModelError
from collegium.models.folder import check_model_folder, weights_digest, weights_size
from collegium.models.loading import scan_folder
from collegium.models.options import ModelOptions
from refusals import refused
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
    model_options = ModelOptions(model=str(folder), **options)  # type: ignore[arg-type]
    check_model_folder(model_options, where=HERE)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def shard(folder: Path, names: dict[str, str]) -> None:
    """Write an index of shards, which takes precedence over the single weight file."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def rejects(folder: Path, *, volatile: str = "", **options: object) -> None:
    with refused(ModelError, HERE, volatile=volatile):
        check(folder, **options)


def test_a_valid_folder_passes(folder: Path) -> None:
    check(folder)


def test_a_hub_id_passes() -> None:
    check(Path("someone/some-model-1.5B"))


def test_missing_path_lists_its_parent(folder: Path) -> None:
    rejects(folder.parent / "n")
    # Lists the current folder.
    rejects(Path("./nowhere"), volatile=r"(?<=contains: ).*")


def test_missing_path_in_an_existing_folder_is_not_a_hub_id(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    rejects(Path("m/final"))


def test_path_is_a_file(folder: Path) -> None:
    rejects(folder / "model.safetensors")


def test_config_missing(folder: Path) -> None:
    (folder / "config.json").unlink()
    rejects(folder)


def test_config_truncated(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')
    rejects(folder)
    (folder / "config.json").write_text('{"model_type": "lla')
    rejects(folder)
    (folder / "config.json").write_text('{"a": 1,\n "b" 2}')
    rejects(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    rejects(folder)
    (folder / "config.json").write_text("[]")
    rejects(folder)


def test_config_without_model_type(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    rejects(folder)


def test_unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="lama")
    # The version is that of the machine, and the suggestion depends on it.
    rejects(folder, volatile=r"transformers \d\S+|(?<=mean )`\w+`")
    edit_config(folder, model_type="zzzz9999")
    rejects(folder, volatile=r"transformers \d\S+")


def test_a_model_that_does_not_predict_the_next_token(folder: Path) -> None:
    edit_config(folder, model_type="t5")
    rejects(folder)


def test_kernels_in_a_config_are_reported(folder: Path) -> None:
    options = ModelOptions(model=str(folder))
    assert scan_folder(options, where=HERE) == []
    assert scan_folder(ModelOptions(model="some/model"), where=HERE) == []
    edit_config(folder, _attn_implementation_internal="a/b")
    assert scan_folder(options, where=HERE) == [
        f"{HERE}: config.json tries to choose an attention kernel, `a/b`; ignored"
    ]


def test_attention_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = "transformers.utils.import_utils.is_flash_attn_2_available"
    monkeypatch.setattr(target, lambda: False)
    rejects(folder, attention="flash_attention_2")
    monkeypatch.setattr(target, lambda: True)
    check(folder, attention="flash_attention_2")


def test_an_impossible_path_is_missing() -> None:
    # The message lists the current folder.
    for path in ("~nosuchuser/m", "a" * 5000, "a\0b"):
        rejects(Path(path), volatile=r"(?<=contains: ).*|a{9,}|\0")


def test_custom_code_is_refused_unless_trusted(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"}, model_type="xx")
    (folder / "modeling_x.py").write_text("raise SystemExit('ran')")
    rejects(folder)
    check(folder, trust_remote_code=True)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    rejects(folder)


def test_only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    rejects(folder)


def test_only_an_adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    rejects(folder)


def test_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    rejects(folder)


REASON = r"(?<=bytes; )[^)]*"  # of the safetensors library


def test_truncated_and_lengthened_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for cut in (data[:-1], data + b"x", data[:200]):
        file.write_bytes(cut)
        rejects(folder, volatile=REASON)


@pytest.mark.parametrize(
    "data",
    [b"", b"abc", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 0) + b"x" * 50],
    ids=["empty", "short", "huge header", "no header"],
)
def test_not_a_safetensors_file(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    rejects(folder, volatile=REASON)


@pytest.mark.parametrize(
    "text",
    [b"{]", b"[]", b'{"a": 1}', b'{"a": {}}', b'{"a": {"data_offsets": 3}}'],
    ids=["no JSON", "list", "number", "no offsets", "bad offsets"],
)
def test_damaged_header(folder: Path, text: bytes) -> None:
    data = struct.pack("<Q", len(text)) + text
    (folder / "model.safetensors").write_bytes(data)
    rejects(folder, volatile=REASON)


def test_shard_missing(folder: Path) -> None:
    shard(folder, {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"})
    rejects(folder)


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/passwd", "a/../../b"])
def test_shard_outside(folder: Path, name: str) -> None:
    shard(folder, {"a": name})
    rejects(folder, volatile=r"(?<=, at )\S+(?=;)")


def test_link_out_of_the_folder(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    rejects(folder)


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
    rejects(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool], ids=str)
def test_weights_that_are_not_floats(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    rejects(folder)


def test_tokenizer_missing(folder: Path, original: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    rejects(folder)
    check(folder, tokenizer=str(original))


def test_no_such_device(folder: Path) -> None:
    count = torch.cuda.device_count()
    rejects(folder, device=f"cuda:{count}", volatile=r"cuda:\d+|(?<=CUDA devices: )\d+")


@pytest.mark.parametrize(
    "options", [{"device": "gpu"}, {"dtype": "int8"}, {"model": ""}, {"revison": "main"}]
)
def test_options_are_strict(options: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        ModelOptions(**{"model": "m", **options})  # type: ignore[arg-type]


def test_digest_distinguishes_weights(folder: Path, original: Path) -> None:
    assert weights_digest(str(folder)) == weights_digest(str(original))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert weights_digest(str(folder)) != weights_digest(str(original))
    assert weights_digest("someone/a") != weights_digest("someone/b")
    assert weights_size(str(folder)) == weights_size(str(original)) > 0 == weights_size("someone/a")
