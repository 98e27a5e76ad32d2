"""GGUF files: every family reads back in transformers, with tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

import tiny
from collegium.errors import ExportError
from collegium.export import foreign
from collegium.export.formats import FORMATS
from collegium.export.gguf_file import FAMILIES, FILE, Gguf, _permuted, _sorted_qkv
from collegium.export.gguf_tokenizer import _scores, tokenizer_kind
from refusals import refused

GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 8},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gpt_neox": {},
}
TEXT = "To be 12 café,\n naïve 数 <|user|>hi<|end|>"


def saved_student(folder: Path, model_type: str) -> Path:
    """Save a tiny model whose attention is far from uniform, so that every layout matters."""
    model = tiny.tiny_model(model_type=model_type, **CONFIGS[model_type])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3 * (parameter.dim() == 1), 0.2)
    model.save_pretrained(folder)
    tiny.tiny_tokenizer(400, True).save_pretrained(folder)
    return folder


def logits_of(source: dict[str, str], ids: np.ndarray) -> np.ndarray:
    return foreign.load(source, 1).logits(ids)[0]


def form(name: str) -> Gguf:
    chosen = FORMATS[name]
    assert isinstance(chosen, Gguf)
    return chosen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", CONFIGS)
def test_transformers_reads_every_family_as_the_student(model_type: str, tmp_path: Path) -> None:
    student, target = saved_student(tmp_path / "student", model_type), tmp_path / "export"
    ids = np.random.default_rng(0).integers(5, 390, (2, 40))
    expected = logits_of({"loader": "transformers", "folder": str(student)}, ids)
    # Rows of 32 are one block of 8 bits, with an error of 1/254 of its largest value.
    for name, share in (("gguf-f16", 0.005), ("gguf-q8_0", 0.2)):
        (target / name).mkdir(parents=True)
        form(name).write(student, target / name)
        logits = logits_of(form(name).source(target / name), ids)
        assert np.abs(logits - expected).mean() < share * expected.std()
    ours = tiny.tiny_tokenizer(400, True)
    theirs, is_known = foreign._gguf_tokenizer(str(target / "gguf-f16" / FILE))
    assert is_known
    assert theirs(TEXT)["input_ids"] == ours(TEXT)["input_ids"]
    assert theirs.decode(ours(TEXT)["input_ids"]) == ours.decode(ours(TEXT)["input_ids"])
    assert (theirs.chat_template, theirs.eos_token) == (ours.chat_template, ours.eos_token)


def test_a_config_that_the_file_contradicts_is_refused(tmp_path: Path) -> None:
    student = saved_student(tmp_path / "student", "llama")
    (tmp_path / "export").mkdir()
    form("gguf-f16").write(student, tmp_path / "export")
    config = AutoConfig.from_pretrained(student)
    config.num_hidden_layers = 3
    config.save_pretrained(tmp_path / "export")
    with pytest.raises(ValueError, match="num_hidden_layers is 2, and 3 in"):
        foreign._read_gguf(str(tmp_path / "export"), FILE)


def test_permuted_rows_are_pairs_of_the_two_halves() -> None:
    # Row (h, j) of llama.cpp is row (h, j % 2, j // 2) of transformers.
    heads, width = 2, 6
    config = AutoConfig.for_model("llama", num_attention_heads=heads, num_key_value_heads=1)
    rows = np.arange(heads * width)[:, None]
    expected = [h * width + j % 2 * width // 2 + j // 2 for h in range(heads) for j in range(width)]
    assert _permuted("blk.0.attn_q.weight", rows, config)[:, 0].tolist() == expected
    assert _permuted("blk.0.attn_v.weight", rows, config) is rows


def test_fused_rows_are_sorted_by_query_key_and_value() -> None:
    config = AutoConfig.for_model("gpt_neox", num_attention_heads=2)
    rows = np.array([f"{part}{h}{j}" for h in range(2) for part in "qkv" for j in range(2)])
    expected = [f"{part}{h}{j}" for part in "qkv" for h in range(2) for j in range(2)]
    assert _sorted_qkv("blk.0.attn_qkv.bias", rows, config).tolist() == expected


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gpt2", {}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}),
        ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 256}),
        ("llama", {"mlp_bias": True}),
    ],
    ids=["family", "rope", "scale", "bias"],
)
def test_a_student_that_no_file_holds_is_refused(model_type: str, settings: dict) -> None:
    config = AutoConfig.for_model(model_type, **settings)
    with refused(ExportError, "export.to"):
        FORMATS["gguf-f16"].check(config, tiny.tiny_tokenizer(), "export.to")


def byte_tokenizer(*steps: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_splitting_rules_have_the_names_of_llama_cpp() -> None:
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizer_kind(tiny.tiny_tokenizer(), "x") == ("gpt2", "gpt-2")
    assert tokenizer_kind(byte_tokenizer(digits, byte_level), "x") == ("gpt2", "smollm")
    for other in (
        byte_tokenizer(pre_tokenizers.Whitespace(), byte_level),
        byte_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    ):
        with refused(ExportError, "tokenizer"):
            tokenizer_kind(other, "tokenizer")


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer as SentencePiece makes them: marked spaces, and bytes for the rest."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny.TEXT[:2] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.filterwarnings("ignore")
def test_a_sentencepiece_tokenizer_is_rebuilt(tmp_path: Path) -> None:
    student, ours = saved_student(tmp_path / "student", "llama"), sentencepiece_tokenizer()
    ours.save_pretrained(student)
    (tmp_path / "export").mkdir()
    form("gguf-f16").write(student, tmp_path / "export")
    theirs, _ = foreign._gguf_tokenizer(str(tmp_path / "export" / FILE))
    for text in ("To be, or not", "the word  was é数"):
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert len(ids) > 2


def test_scores_fall_with_the_rank_of_the_merge() -> None:
    assert _scores(["a", "ab", "abc"], ["a b", "ab c"]) == [-2.0, 0.0, -1.0]


def test_every_family_is_tested() -> None:
    assert {*CONFIGS} == {*FAMILIES}
