"""Model folders that cannot be used, from the command line: rows 34 to 56 of the catalogue."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from bad_input_bench import Bench
from collegium.vocabulary.verdict import token_bytes

CODE = Path("zoo/code")
CONFIG = CODE / "config.json"
WEIGHTS = CODE / "model.safetensors"
INDEX = CODE / "model.safetensors.index.json"
HERE = "teachers.code"
FILES = (
    "config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json"
)

TOKENS = token_bytes(tiny.tiny_tokenizer())

Damage = Callable[[], object]


def config(**changes: object) -> Damage:
    def damage() -> None:
        CONFIG.write_text(json.dumps({**json.loads(CONFIG.read_text()), **changes}))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object], folder: Path = CODE) -> Damage:
    def damage() -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", {"format": "pt"})

    return damage


def shards(*names: str) -> Damage:
    weight_map = {f"tensor{i}": name for i, name in enumerate(names)}
    return lambda: INDEX.write_text(json.dumps({"weight_map": weight_map}))


def removed(*names: str) -> Damage:
    def damage() -> None:
        for name in names:
            (CODE / name).unlink()

    return damage


def both(*damages: Damage) -> Damage:
    return lambda: [damage() for damage in damages]


def linked_outside() -> None:
    shutil.move(WEIGHTS, "outside.safetensors")
    WEIGHTS.symlink_to(Path("outside.safetensors").absolute())


def swapped_ids() -> None:
    path = CODE / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = value["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(value), encoding="utf-8")


CASES: dict[str, tuple[Damage, str]] = {
    "34 missing": (
        lambda: shutil.move(CODE, "zoo/c0de"),
        f"{HERE}: got zoo/code, which does not exist; must be a model folder or a hub id "
        "`owner/name`; in zoo there are: c0de, code.jsonl, scripture, scripture.jsonl",
    ),
    "34 a file": (
        both(lambda: shutil.rmtree(CODE), lambda: CODE.write_text("")),
        f"{HERE}: got zoo/code, which is a file; must be the folder that holds config.json",
    ),
    "35 no config": (
        removed("config.json"),
        f"{HERE}: no config.json in zoo/code (found: {FILES.replace('config.json, ', '', 1)}); must be a "
        "Hugging Face model folder",
    ),
    "35 truncated": (
        lambda: CONFIG.write_text('{"model_type": '),
        f"{HERE}: zoo/code/config.json ends at byte 15 inside a value; must be JSON; copy it again",
    ),
    "35 empty object": (
        lambda: CONFIG.write_text("{}"),
        f"{HERE}: zoo/code/config.json has no `model_type`; must be a transformers config; copy it again",
    ),
    "35 values that make no model": (
        config(num_attention_heads=0),
        f"{HERE}: zoo/code/config.json: makes no qwen3 model (integer division or modulo by zero); must be a "
        "config that transformers can build; correct its values",
    ),
    "36 misspelled": (
        config(model_type="qwen33"),
        f"{HERE}: zoo/code/config.json has model_type `qwen33`, which transformers "
        f"{transformers.__version__} does not know; did you mean `qwen3`?",
    ),
    "36 unknown": (
        config(model_type="foo9zzzz"),
        f"{HERE}: zoo/code/config.json has model_type `foo9zzzz`, which transformers "
        f"{transformers.__version__} does not know; is it custom code, or of a newer release?",
    ),
    "36 of another kind": (
        config(model_type="t5"),
        f"{HERE}: zoo/code/config.json has model_type `t5`, which is no causal language model; must "
        "predict the next token; give another model",
    ),
    "37 no weights": (
        removed("model.safetensors"),
        f"{HERE}: no model.safetensors in zoo/code (found: {FILES.replace('model.safetensors, ', '')})",
    ),
    "38 pickle": (
        lambda: shutil.move(WEIGHTS, CODE / "pytorch_model.bin"),
        f"{HERE}: zoo/code/pytorch_model.bin is a pickle, which can run code, and is refused; must be "
        "*.safetensors; save the model again with `save_pretrained`",
    ),
    "39 git-lfs pointer": (
        lambda: WEIGHTS.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        f"{HERE}: zoo/code/model.safetensors is a git-lfs pointer, not weights; run `git lfs pull`",
    ),
    "40 truncated": (
        lambda: WEIGHTS.write_bytes(
            struct.pack("<Q", 64)
            + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'.ljust(64)
            + b"1234"
        ),
        f"{HERE}: zoo/code/model.safetensors has 76 bytes, its header needs 108; copy it again",
    ),
    "41 shard missing": (
        shards("model.safetensors", "model-00003-of-00004.safetensors"),
        f"{HERE}: model.safetensors.index.json names model-00003-of-00004.safetensors; it is not in "
        "zoo/code; copy it again",
    ),
    "42 shard above": (
        shards("../../etc/x"),
        f"{HERE}: `../../etc/x` in model.safetensors.index.json lies outside the model folder zoo/code; "
        "refused",
    ),
    "42 absolute shard": (
        shards("/etc/x"),
        f"{HERE}: `/etc/x` in model.safetensors.index.json lies outside the model folder zoo/code; refused",
    ),
    "42 link": (
        linked_outside,
        f"{HERE}: zoo/code/model.safetensors is a link out of the model folder, to OUTSIDE; refused",
    ),
    "43 missing tensor": (
        tensors(lambda t: t.pop("model.layers.1.mlp.down_proj.weight")),
        f"{HERE}: 1 tensors are missing: model.layers.1.mlp.down_proj.weight; must fit config.json one to "
        "one; copy the model again",
    ),
    "44 unexpected tensor": (
        tensors(lambda t: t.update({"foo.bar": torch.zeros(2)})),
        f"{HERE}: 1 tensors fit nothing in the model of config.json: foo.bar; use the config of these "
        "weights",
    ),
    "45 wrong shape": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(31)})),
        f"{HERE}: 1 tensors have another shape than config.json says: model.norm.weight is [31], must be "
        "[32]; use the config of these weights",
    ),
    "46 fewer layers": (
        config(num_hidden_layers=1, layer_types=None),
        f"{HERE}: the weights hold 2 layers (model.layers), config.json says 1; must be the same; use the "
        "config of these weights",
    ),
    "47 nan": (
        tensors(lambda t: t["model.layers.0.self_attn.q_proj.weight"].fill_(torch.nan)),
        f"{HERE}: model.layers.0.self_attn.q_proj.weight has 1024 non-finite values, first at [0, 0]; must "
        "be finite; save the model again from an earlier checkpoint",
    ),
    "47 one infinity": (
        tensors(lambda t: t["lm_head.weight"][5, 7].fill_(-torch.inf)),
        f"{HERE}: lm_head.weight has 1 non-finite values, first at [5, 7]; must be finite; save the model "
        "again from an earlier checkpoint",
    ),
    "48 int8": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})),
        f"{HERE}: model.norm.weight in zoo/code/model.safetensors is I8; must be one of F64, F32, F16, "
        "BF16; quantized weights are not supported",
    ),
    "48 bool": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.bool)})),
        f"{HERE}: model.norm.weight in zoo/code/model.safetensors is BOOL; must be one of F64, F32, F16, "
        "BF16; quantized weights are not supported",
    ),
    "50 custom code": (
        both(
            config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
            lambda: (CODE / "modeling_x.py").write_text("open('ran', 'w')"),
        ),
        f"{HERE}: zoo/code needs its own Python code (modeling_x.py); refused; review it, then set "
        "`trust_remote_code: true`",
    ),
    "52 no tokenizer": (
        removed("tokenizer.json", "tokenizer_config.json"),
        f"{HERE}: got zoo/code, without a tokenizer; must hold tokenizer.json or tokenizer.model (found: "
        "config.json, generation_config.json, model.safetensors); set `tokenizer:`",
    ),
    "53 token without a row": (
        both(
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
        f"{HERE}: token {TOKENS[300]!r} has id 300, the model has 300 rows; must have a row for every id; use the "
        "model's own tokenizer",
    ),
    "54 other ids": (
        swapped_ids,
        f"{HERE}: 2 token ids mean other bytes than in the student's tokenizer (id 398: {TOKENS[399]!r} "
        f"here, {TOKENS[398]!r} there); must be "
        "the same for all 400 ids; use a teacher with the student's tokenizer, or make the student with "
        "this one",
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_teacher(case: str, bench: Bench) -> None:
    damage, expected = CASES[case]
    damage()
    bench.refused(expected.replace("OUTSIDE", str(bench.root.resolve() / "outside.safetensors")))


@pytest.mark.parametrize(
    "case", ["34 missing", "39 git-lfs pointer", "46 fewer layers", "47 nan", "54 other ids"]
)
def test_check_says_the_same(case: str, bench: Bench) -> None:
    damage, expected = CASES[case]
    damage()
    bench.refused(expected, command="check")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[:2] in ("43", "44", "45", "46", "47")]
)
def test_bad_student(case: str, bench: Bench) -> None:
    """A student from a folder is checked as a teacher is."""
    damage, expected = CASES[case]
    damage()
    bench.refused(
        expected.replace(HERE, "student", 1),
        "student={model: zoo/code}",
        "teachers={scripture: {model: zoo/scripture}}",
    )


def test_53_token_of_the_student_without_a_row(bench: Bench) -> None:
    CASES["53 token without a row"][0]()
    bench.refused(
        f"student: token `{tiny.tiny_tokenizer().convert_ids_to_tokens(399)}` has id 399, the model has 300 "
        "rows; must have a row for every id; use the model's own tokenizer",
        "student={model: zoo/code}",
        "teachers={scripture: {model: zoo/scripture}}",
    )


def test_40_weights_of_the_length_of_their_header_are_read(bench: Bench) -> None:
    data = WEIGHTS.read_bytes()
    WEIGHTS.write_bytes(data[:-1])
    bench.refused(
        f"{HERE}: zoo/code/model.safetensors has {len(data) - 1:,} bytes, its header needs {len(data):,}; "
        "copy it again"
    )


def test_49_a_matrix_of_zeros_is_told(bench: Bench) -> None:
    tensors(lambda t: t["lm_head.weight"].zero_())()
    assert bench.accepted()[-1] == f"warning: {HERE}: lm_head.weight is all zeros"


@pytest.mark.parametrize("key", ["_attn_implementation", "_attn_implementation_internal"])
def test_51_a_kernel_of_the_configs_choice_is_ignored(key: str, bench: Bench) -> None:
    config(**{key: "a/b"})()
    assert bench.accepted()[-1] == (
        f"warning: {HERE}: config.json tries to choose an attention kernel, `a/b`; ignored"
    )


def test_50_nothing_of_the_folder_was_run(bench: Bench) -> None:
    CASES["50 custom code"][0]()
    bench.invoke("run", "run.yaml")
    assert not Path("ran").exists()


def test_55_padded_embeddings_are_noted(bench: Bench) -> None:
    def pad(held: dict[str, torch.Tensor]) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            held[name] = torch.cat([held[name], torch.ones(112, 32)])

    tensors(pad)()
    config(vocab_size=512)()
    assert bench.accepted()[2] == (
        f"{HERE}: vocabulary compatible; {HERE}: all 400 token ids of the student mean the same bytes; 0 "
        "further ids and 112 rows of the head are dropped"
    )


def test_56_no_stop_token(bench: Bench) -> None:
    bench.edit("zoo/scripture/tokenizer_config.json", lambda value: value.pop("eos_token"))
    bench.refused(
        "student: the tokenizer of zoo/scripture has no eos token, so a student could not learn to stop; must "
        "name one; set `eos_token` in its tokenizer_config.json (candidates: `<|end|>`)"
    )


def test_52_a_damaged_tokenizer(bench: Bench) -> None:
    (CODE / "tokenizer.json").write_text('{"model": ')
    result = bench.invoke("run", "run.yaml")
    assert result.stderr.startswith(f"error: {HERE}: no tokenizer can be loaded from zoo/code; ")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_the_bench_refuses_a_weight(bench: Bench) -> None:
    """The run that all these tests break would work, and loading is noticed."""
    assert bench.accepted()[0] == "vocabulary: 400 tokens"
    result = bench.invoke("run", "run.yaml")
    assert isinstance(result.exception, AssertionError)
    assert str(result.exception) == "a weight was loaded"
