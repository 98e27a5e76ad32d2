"""Every way a model folder can be invalid, and the error that the user sees."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from collegium.errors import ModelError
from collegium.models.folder import check_model_folder
from collegium.models.loading import load_model
from collegium.models.options import ModelOptions
from collegium.models.weights import main_dtype, read_headers, weights_digest, weights_layout
from refusals import refused
from tiny import save_tiny, tiny_model

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
    """Write an index of shards in the place of the single weight file."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.fixture
def shards(original: Path, folder: Path) -> Path:
    """The folder, saved by transformers in three shards with an index."""
    (folder / "model.safetensors").unlink()
    model = load_model(ModelOptions(model=str(original), device="cpu"), where=HERE)
    model.save_pretrained(folder, max_shard_size="70KB")
    assert len(list(folder.glob("model-*-of-00003.safetensors"))) == 3
    return folder


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


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
    assert options.warnings(HERE) == []
    assert ModelOptions(model="some/model").warnings(HERE) == []
    edit_config(folder, _attn_implementation_internal="a/b")
    assert options.warnings(HERE) == [
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


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}


@pytest.mark.parametrize("present", [(), ("config.json",), ("model.safetensors",)], ids=str)
def test_only_an_adapter(folder: Path, present: tuple[str, ...]) -> None:
    for name in {"config.json", "model.safetensors"} - {*present}:
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    rejects(folder)


def test_an_adapter_beside_a_model(folder: Path) -> None:
    """transformers would add it to the weights, although it may be merged into them already."""
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    rejects(folder)
    with refused(ModelError, HERE):
        load_model(ModelOptions(model=str(folder), device="cpu"), where=HERE)


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
    shard(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-2.safetensors"})
    rejects(folder)


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/passwd", "a/../../b"])
def test_shard_outside(folder: Path, name: str) -> None:
    shard(folder, {"a": name})
    rejects(folder)


def test_index_of_the_shards_that_transformers_saved(shards: Path) -> None:
    check(shards)


def test_tensor_in_two_shards(shards: Path) -> None:
    """transformers would load the copy in the last shard, whatever the index says."""
    first, last = (shards / f"model-0000{i}-of-00003.safetensors" for i in (1, 3))
    save_file({**load_file(last), **load_file(first)}, last, {"format": "pt"})
    rejects(shards)


@pytest.mark.parametrize(
    "edit",
    [
        lambda names: names.pop("model.norm.weight"),
        lambda names: names.update(other=names["model.norm.weight"]),
        lambda names: names.update({"model.norm.weight": "model-00001-of-00003.safetensors"}),
    ],
    ids=["tensor without entry", "entry without tensor", "other shard"],
)
def test_index_and_shards_disagree(shards: Path, edit: Callable[[dict[str, str]], object]) -> None:
    assert "-of" in read_headers(shards, where=HERE)["model.norm.weight"].file.name
    edit_index(shards, edit)
    rejects(shards)


def test_single_file_and_shards(shards: Path, original: Path) -> None:
    """transformers prefers the single file, which may be the older one."""
    shutil.copy(original / "model.safetensors", shards)
    rejects(shards)


def test_index_left_over_from_shards(folder: Path, shards: Path, original: Path) -> None:
    """`save_pretrained` of a single file removes the shards and leaves their index."""
    load_model(ModelOptions(model=str(original), device="cpu"), where=HERE).save_pretrained(shards)
    assert (folder / "model.safetensors.index.json").exists()
    check(folder)


def test_file_named_by_the_config(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    edit_config(folder, transformers_weights="other.safetensors")
    check(folder)
    load_model(ModelOptions(model=str(folder), device="cpu"), where=HERE)
    edit_config(folder, transformers_weights="../other.safetensors")
    rejects(folder)


@pytest.mark.parametrize("names", [("model.safetensors",), ("config.json",), ()], ids=str)
def test_links_into_a_store(folder: Path, names: tuple[str, ...]) -> None:
    store = folder.parent / "store"
    store.mkdir()
    for name in names or [path.name for path in folder.iterdir()]:
        (folder / name).rename(store / name)
        (folder / name).symlink_to(store / name)
    check(folder)


def test_broken_link(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "nowhere")
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


def test_digest_does_not_depend_on_the_files(shards: Path, original: Path) -> None:
    assert weights_layout(str(shards)) == weights_layout(str(original))
    assert weights_digest(str(shards)) == weights_digest(str(original))


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.update(other=t.pop("model.norm.weight")),
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.contiguous()}),
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"].view(torch.float16)}),
    ],
    ids=["name", "shape", "type"],
)
def test_digest_covers_names_shapes_and_types(
    folder: Path, original: Path, edit: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert weights_digest(str(folder)) != weights_digest(str(original))


def test_main_dtype_is_that_of_most_values(tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    model.model.norm.float()
    model.save_pretrained(tmp_path)
    assert main_dtype(read_headers(tmp_path, where=HERE)) == "bfloat16"
