"""Invalid model folders, from the command line: rows 34 to 56 of the catalog."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bad_input_bench import Bench

CODE = Path("zoo/code")
CONFIG = CODE / "config.json"
WEIGHTS = CODE / "model.safetensors"
INDEX = CODE / "model.safetensors.index.json"
HERE = "teachers.code"
# Version of transformers, reason of safetensors.
VOLATILE = r"transformers \d\S*|(?<=bytes; )[^)]*"

Damage = Callable[[], object]


def config(**changes: object) -> Damage:
    def damage() -> None:
        CONFIG.write_text(json.dumps({**json.loads(CONFIG.read_text()), **changes}))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object], folder: Path = CODE) -> Damage:
    def damage() -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return damage


def shards(*names: str) -> Damage:
    def damage() -> None:
        weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
        INDEX.write_text(json.dumps({"weight_map": weight_map}))
        WEIGHTS.rename(CODE / "model-00001-of-00004.safetensors")

    return damage


def removed(*names: str) -> Damage:
    def damage() -> None:
        for name in names:
            (CODE / name).unlink()

    return damage


def both(*damages: Damage) -> Damage:
    return lambda: [damage() for damage in damages]


def swapped_ids() -> None:
    path = CODE / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = value["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(value), encoding="utf-8")


CASES: dict[str, Damage] = {
    "34 missing": lambda: shutil.move(CODE, "zoo/c0de"),
    "34 a file": both(lambda: shutil.rmtree(CODE), lambda: CODE.write_text("")),
    "35 no config": removed("config.json"),
    "35 truncated": lambda: CONFIG.write_text('{"model_type": '),
    "35 empty object": lambda: CONFIG.write_text("{}"),
    "35 values that build no model": config(num_attention_heads=0),
    "36 misspelled": config(model_type="qwen33"),
    "36 unknown": config(model_type="foo9zzzz"),
    "36 of another kind": config(model_type="t5"),
    "37 no weights": removed("model.safetensors"),
    "38 pickle": lambda: shutil.move(WEIGHTS, CODE / "pytorch_model.bin"),
    "39 git-lfs pointer": lambda: WEIGHTS.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    ),
    "40 truncated": lambda: WEIGHTS.write_bytes(
        struct.pack("<Q", 64)
        + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(64)
        + b"1234"
    ),
    "41 shard missing": shards(
        "model-00001-of-00004.safetensors", "model-00003-of-00004.safetensors"
    ),
    "42 shard above": shards("../../etc/x"),
    "42 absolute shard": shards("/etc/x"),
    "43 missing tensor": tensors(lambda t: t.pop("model.layers.1.mlp.down_proj.weight")),
    "44 unexpected tensor": tensors(lambda t: t.update({"foo.bar": torch.zeros(2)})),
    "45 wrong shape": tensors(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
    "46 fewer layers": config(num_hidden_layers=1, layer_types=None),
    "47 nan": tensors(lambda t: t["model.layers.0.self_attn.q_proj.weight"].fill_(torch.nan)),
    "47 one infinity": tensors(lambda t: t["lm_head.weight"][5, 7].fill_(-torch.inf)),
    "48 int8": tensors(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
    "48 bool": tensors(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.bool)})),
    "50 custom code": both(
        config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}, model_type="x"),
        lambda: (CODE / "modeling_x.py").write_text("open('ran', 'w')"),
    ),
    "51 adapter": both(
        removed("config.json", "model.safetensors"),
        lambda: (CODE / "adapter_config.json").write_text('{"base_model_name_or_path": "org/m"}'),
    ),
    "52 no tokenizer": removed("tokenizer.json", "tokenizer_config.json"),
    "53 token without a row": both(
        config(vocab_size=300),
        tensors(
            lambda t: t.update(
                {
                    name: t[name][:300].clone()
                    for name in ("lm_head.weight", "model.embed_tokens.weight")
                }
            )
        ),
    ),
    "54 other ids": swapped_ids,
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_teacher(case: str, bench: Bench) -> None:
    CASES[case]()
    bench.refused(HERE, volatile=VOLATILE)


@pytest.mark.parametrize(
    "case", ["34 missing", "39 git-lfs pointer", "46 fewer layers", "47 nan", "54 other ids"]
)
def test_check_gives_the_same_message(case: str, bench: Bench) -> None:
    CASES[case]()
    assert bench.refused(HERE, command="check") == bench.refused(HERE)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[:2] in ("43", "44", "45", "46", "47")]
)
def test_bad_student(case: str, bench: Bench) -> None:
    """A student from a folder is checked like a teacher."""
    CASES[case]()
    bench.refused(
        "student", "student={model: zoo/code}", "teachers={scripture: {model: zoo/scripture}}"
    )


def test_53_token_of_the_student_without_a_row(bench: Bench) -> None:
    CASES["53 token without a row"]()
    bench.refused(
        "student", "student={model: zoo/code}", "teachers={scripture: {model: zoo/scripture}}"
    )


def test_40_the_last_byte_of_the_weights_is_missing(bench: Bench) -> None:
    WEIGHTS.write_bytes(WEIGHTS.read_bytes()[:-1])
    bench.refused(f"{HERE}: zoo/code/model.safetensors", volatile=VOLATILE)


def test_49_a_matrix_of_zeros_is_a_warning(bench: Bench) -> None:
    tensors(lambda t: t["lm_head.weight"].zero_())()
    assert bench.accepted()[-1] == f"warning: {HERE}: lm_head.weight is all zeros"


@pytest.mark.parametrize("key", ["_attn_implementation", "_attn_implementation_internal"])
def test_51_a_kernel_named_by_the_config_is_ignored(key: str, bench: Bench) -> None:
    config(**{key: "a/b"})()
    assert bench.accepted()[-1] == (
        f"warning: {HERE}: config.json tries to choose an attention kernel, `a/b`; ignored"
    )


def test_42_a_link_to_a_file_elsewhere_is_followed(bench: Bench) -> None:
    shutil.move(WEIGHTS, "outside.safetensors")
    WEIGHTS.symlink_to(Path("outside.safetensors").absolute())
    bench.accepted()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
            "has an auto_map; ignored, since transformers has its own class for `qwen3`",
        ),
        (
            config(quantization_config={"quant_method": "modelopt"}),
            "has a quantization_config (modelopt), but the weights are not quantized; ignored",
        ),
        (config(dtype="float16"), "says float16, but the weights are float32, which is used"),
        (
            config(tie_word_embeddings=True),
            "says tie_word_embeddings, but the weights have a head of their own, which is used; a "
            "student is saved with `tie_word_embeddings: false`",
        ),
    ],
    ids=["auto_map", "quantization", "dtype", "tied"],
)
def test_51_statements_of_the_config_that_are_not_followed(
    damage: Damage, said: str, bench: Bench
) -> None:
    damage()
    assert bench.accepted()[-1] == f"warning: {HERE}: config.json {said}"


def test_50_no_code_of_the_folder_is_executed(bench: Bench) -> None:
    CASES["50 custom code"]()
    bench.invoke("run", "run.yaml")
    assert not Path("ran").exists()


def test_55_padded_embeddings_are_noted(bench: Bench) -> None:
    def pad(weights: dict[str, torch.Tensor]) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            weights[name] = torch.cat([weights[name], torch.ones(112, 32)])

    tensors(pad)()
    config(vocab_size=512)()
    assert bench.accepted()[2] == (
        f"{HERE}: vocabulary compatible; {HERE}: all 400 token ids of the student map to the same "
        "bytes; 0 extra ids and 112 head rows are dropped"
    )


def test_56_no_stop_token(bench: Bench) -> None:
    bench.edit("zoo/scripture/tokenizer_config.json", lambda value: value.pop("eos_token"))
    bench.refused("student")


def test_52_a_damaged_tokenizer(bench: Bench) -> None:
    (CODE / "tokenizer.json").write_text('{"model": ')
    # The reason is that of the tokenizers library; `.` does not match a second line.
    bench.refused(HERE, volatile=r"(?<=zoo/code; ).*")


def test_the_bench_detects_loading(bench: Bench) -> None:
    """The run that all these tests break is valid, and loading a model fails it."""
    assert bench.accepted()[0] == "vocabulary: 400 tokens"
    result = bench.invoke("run", "run.yaml")
    assert isinstance(result.exception, AssertionError)
    assert str(result.exception) == "a weight was loaded"
