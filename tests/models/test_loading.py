"""Loaded weights match their config one to one and are finite."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from collegium.errors import ModelError
from collegium.models.loading import (
    build_model,
    cast_model,
    check_weights,
    count_parameters,
    load_model,
    load_tokenizer,
    make_config,
    model_facts,
    scan_folder,
    scan_weights,
    vocab_size_of,
)
from collegium.models.options import ModelOptions
from collegium.models.probe import probe
from refusals import refused
from tiny import save_tiny, tiny_model, tiny_tokenizer

HERE = "teachers[0]"
Check = Callable[..., object]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("original") / "m")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "m")
    return tmp_path / "m"


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(params=[load_model, check_weights], ids=["load_model", "check_weights"])
def check(request: pytest.FixtureRequest) -> Check:
    return request.param


def rejects(check: Check, folder: Path, where: str = HERE) -> None:
    with refused(ModelError, where):
        check(ModelOptions(model=str(folder), device="cpu"), where=HERE)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_round_trip(tmp_path: Path, model_type: str, tied: bool) -> None:
    folder = save_tiny(tmp_path / "m", model_type=model_type, tie_word_embeddings=tied)
    options = ModelOptions(model=str(folder), device="cpu")
    check_weights(options, where=HERE)
    model = load_model(options, where=HERE)
    assert not model.training
    expected = tiny_model(
        len(tiny_tokenizer()), model_type=model_type, tie_word_embeddings=tied
    ).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0)
    probe(model, vocab_size=len(tiny_tokenizer()), where=HERE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(folder: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    options = ModelOptions(model=str(folder), dtype=name, device="cpu")  # type: ignore[arg-type]
    model = load_model(options, where=HERE)
    assert {p.dtype for p in model.parameters()} == {dtype}
    probe(model, vocab_size=300, where=HERE)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("said", ["float16", "float32", None])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_keeps_the_dtype_of_the_files(
    tmp_path: Path, saved: torch.dtype, said: str | None
) -> None:
    tiny_model(96).to(saved).save_pretrained(tmp_path)
    edit_config(tmp_path, dtype=said, torch_dtype=None)
    model = load_model(ModelOptions(model=str(tmp_path), device="cpu"), where=HERE)
    assert {p.dtype for p in model.parameters()} == {saved}
    assert model.config.dtype == saved


def test_a_value_that_a_cast_makes_infinite(folder: Path) -> None:
    change(folder, lambda t: t["model.norm.weight"].__setitem__(3, 1e6))
    options = ModelOptions(model=str(folder), device="cpu", dtype="float16")
    with refused(ModelError, f"{HERE}: model.norm.weight"):
        load_model(options, where=HERE)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_folder_never_replaces_a_class_of_transformers(
    folder: Path, trusted: bool
) -> None:
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    edit_config(folder, auto_map=names)
    (folder / "code.py").write_text("raise SystemExit('ran')")
    options = ModelOptions(model=str(folder), device="cpu", trust_remote_code=trusted)
    assert not options.needs_loading
    options.check(HERE)
    assert type(load_model(options, where=HERE)).__module__.startswith("transformers.")


@pytest.mark.parametrize("method", ["bitsandbytes", "compressed-tensors", "modelopt", "gptq"])
def test_a_quantization_config_beside_plain_weights_is_dropped(folder: Path, method: str) -> None:
    edit_config(folder, quantization_config={"quant_method": method, "load_in_4bit": True})
    options = ModelOptions(model=str(folder), device="cpu")
    options.check(HERE)
    model = load_model(options, where=HERE)
    model.save_pretrained(folder / "again")
    assert "quantization_config" not in json.loads((folder / "again" / "config.json").read_text())


def test_quantization_that_is_part_of_the_model(folder: Path, check: Check) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitnet"})
    rejects(check, folder, f"{HERE}: config.json: quantization_config")


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gpt2"])
def test_the_config_of_an_untied_model_says_so(tmp_path: Path, model_type: str) -> None:
    """transformers keeps a head that differs from the embedding, and a config that denies it."""
    tiny_model(model_type=model_type, tie_word_embeddings=False).save_pretrained(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    model = load_model(ModelOptions(model=str(tmp_path), device="cpu"), where=HERE)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert not model.config.tie_word_embeddings
    tied = save_tiny(tmp_path / "tied", model_type=model_type, tie_word_embeddings=True)
    assert load_model(ModelOptions(model=str(tied)), where=HERE).config.tie_word_embeddings


WRAPPER = {
    "text_config": {
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8},
        **{"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
    },
    "vision_config": {
        **{"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2},
        **{"out_hidden_size": 32, "patch_size": 4, "num_position_embeddings": 16},
    },
    **{"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3},
    "vision_end_token_id": 4,
}


def test_text_model_of_a_multimodal_folder(tmp_path: Path) -> None:
    """Names of the multimodal class are renamed, and its other towers dropped."""
    config = AutoConfig.for_model("qwen3_5", **WRAPPER)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    options = ModelOptions(model=str(tmp_path), device="cpu")
    check_weights(options, where=HERE)
    assert load_model(options, where=HERE).get_input_embeddings().weight.shape == (96, 32)


def test_missing_tensor(folder: Path, check: Check) -> None:
    change(folder, lambda t: t.pop("model.layers.1.mlp.down_proj.weight"))
    rejects(check, folder)


def test_unexpected_tensor(folder: Path, check: Check) -> None:
    change(folder, lambda t: t.update({"foo.bar": torch.zeros(2)}))
    rejects(check, folder)


def test_wrong_shape(folder: Path, check: Check) -> None:
    change(folder, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    rejects(check, folder)


def test_fewer_layers_in_the_config(folder: Path, check: Check) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    rejects(check, folder)


def test_files_are_scanned_without_a_model(folder: Path) -> None:
    options = ModelOptions(model=str(folder))
    assert scan_folder(options, where=HERE) == []
    assert scan_folder(ModelOptions(model="someone/model"), where=HERE) == []
    change(folder, lambda t: t["lm_head.weight"].zero_())
    assert scan_folder(options, where=HERE) == [f"{HERE}: lm_head.weight is all zeros"]
    change(folder, lambda t: t["model.norm.weight"].__setitem__(3, float("inf")))
    rejects(scan_folder, folder, f"{HERE}: model.norm.weight")


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": "x"},
        {"hidden_size": -4},
        {"vocab_size": 2**70},
        {"rope_parameters": {"rope_type": "none"}},
        {"hidden_act": "nope"},
    ],
    ids=str,
)
def test_a_config_that_does_not_build_a_model(folder: Path, values: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    # The message quotes an error of transformers, which differs between versions.
    with pytest.raises(ModelError) as caught:
        check_weights(ModelOptions(model=str(folder)), where=HERE)
    assert str(caught.value).startswith(HERE)
    assert "\n" not in str(caught.value)


def test_non_finite_weight_that_attention_would_hide(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    change(folder, lambda t: t[name].fill_(float("nan")))
    rejects(load_model, folder, f"{HERE}: {name}")


def test_scan_finds_one_infinite_value() -> None:
    model = tiny_model(96)
    assert scan_weights(model.named_parameters(), where=HERE) == []
    model.lm_head.weight.data[5, 7] = float("-inf")
    with refused(ModelError, f"{HERE}: lm_head.weight"):
        scan_weights(model.named_parameters(), where=HERE)


def test_all_zero_head_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder, lambda t: t["lm_head.weight"].zero_())
    with caplog.at_level(logging.WARNING, logger="collegium"):
        load_model(ModelOptions(model=str(folder), device="cpu"), where=HERE)
    assert [record.getMessage() for record in caplog.records] == [
        "teachers[0]: lm_head.weight is all zeros"
    ]


def test_config_cannot_choose_an_attention_kernel(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key in ("_attn_implementation", "_attn_implementation_internal", "attn_implementation"):
        config[key] = "someone/kernel"
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(ModelOptions(model=str(folder), device="cpu"), where=HERE)
    assert model.config._attn_implementation == "sdpa"


def test_pickles_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    # The message quotes an error of transformers, which differs between versions.
    with refused(ModelError, HERE, volatile=r"(?<=cannot be loaded \()[^)]*"):
        load_model(ModelOptions(model=str(folder), device="cpu"), where=HERE)


def test_load_tokenizer(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder), where=HERE)
    assert tokenizer("café").input_ids == tiny_tokenizer()("café").input_ids
    empty = tmp_path / "empty"
    empty.mkdir()
    # The messages quote errors of transformers, which differ between versions.
    with refused(ModelError, HERE, volatile=f"(?<={empty.name}; ).*"):
        load_tokenizer(str(empty), where=HERE)
    (empty / "tokenizer.json").write_text('{"model": ')
    # `.` does not match a newline: the message is a single line.
    with refused(ModelError, HERE, volatile=f"(?<={empty.name}; ).*"):
        load_tokenizer(str(empty), where=HERE)
    with refused(ModelError, HERE):
        load_tokenizer(str(tmp_path / "none"), where=HERE)


def test_vocab_size_counts_holes_and_added_tokens() -> None:
    class Holes:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 9}

    assert vocab_size_of(Holes()) == 10
    assert vocab_size_of(tiny_tokenizer()) == len(tiny_tokenizer())


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_is_the_one_that_loads(
    tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    model = cast_model(tiny_model(96, model_type=model_type), dtype)
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelOptions(model=str(tmp_path), device="cpu"), where=HERE)
    pairs = zip(_tensors(model), _tensors(loaded), strict=True)
    for (name, ours), (_, theirs) in pairs:
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name
    assert all(b.dtype == torch.float32 for n, b in model.named_buffers() if "inv_freq" in n)


def _tensors(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def test_build_depends_only_on_the_seed() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    models = [build_model(make_config(CONFIG, vocab_size=96), seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, again, other = (model.lm_head.weight for model in models)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (96, 32)
    assert first.dtype == torch.float32


def test_build_drops_special_tokens_outside_the_vocabulary() -> None:
    model = build_model(make_config({**CONFIG, "model_type": "phi3"}, vocab_size=96), seed=0)
    assert model.config.pad_token_id is None


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"hiden_size": 3}, "config.hiden_size"),
        ({"model_type": "lama"}, "config.model_type"),
        ({"model_type": None}, "config.model_type"),
        ({"model_type": "bert_generation_x"}, "config.model_type"),
        ({"vocab_size": 97}, "config.vocab_size"),
        ({"num_hidden_layers": "two"}, "config: llama"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "config: llama"),
    ],
    ids=str,
)
def test_build_refuses(change: dict[str, object], where: str) -> None:
    # Reasons of transformers and its nearest model type differ between versions.
    volatile = r"(?<=these values; ).*|(?<=qwen3`).*"
    with refused(ModelError, where, volatile=volatile):
        make_config({**CONFIG, **change}, vocab_size=96)


def test_aliases_of_keys_are_accepted() -> None:
    config = {"model_type": "gpt2", "hidden_size": 32, "num_hidden_layers": 2, "n_head": 4}
    model = build_model(make_config(config, vocab_size=96), seed=0)
    assert model.config.n_embd == 32


def test_tied_parameters_count_once() -> None:
    untied, tied = tiny_model(96), tiny_model(96, tie_word_embeddings=True)
    assert count_parameters(untied) - count_parameters(tied) == 96 * 32


def test_facts_do_not_depend_on_whether_weights_are_loaded(folder: Path) -> None:
    options = ModelOptions(model=str(folder), device="cpu")
    assert options.facts(HERE) == model_facts(load_model(options, where=HERE))
