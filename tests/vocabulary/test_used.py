"""Texts of the corpus keep their tokens, and all other texts still have an encoding."""

from __future__ import annotations

import json
import pydoc_data.topics
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tiny
from collegium.errors import VocabularyError
from collegium.vocabulary.used import check_can_be_cut, cut_tokenizer, kept_ids
from refusals import refused

TOPICS = list(pydoc_data.topics.topics.values())
CORPUS = TOPICS[:6]
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]


@cache
def byte_level(*, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE like that of GPT-2, trained on real text, with a frame and a template."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, initial_alphabet=alphabet)


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """A BPE like that of Llama 2: words are not split, and rare characters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    replace = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    return _trained(tokenizer, special_tokens=[*SPECIAL, *fallback])


def _trained(tokenizer: Tokenizer, **options: object) -> PreTrainedTokenizerFast:
    options = {"special_tokens": SPECIAL, **options}
    trainer = trainers.BpeTrainer(vocab_size=1500, show_progress=False, **options)
    tokenizer.train_from_iterator(TOPICS[:30], trainer)
    # Bytes have ids of their own, but are no special tokens, which decoding skips.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][: len(SPECIAL)]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    frame = [("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>"))]
    tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=frame)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    # Beyond the vocabulary of the model, as in Qwen and Llama 3.
    fast.add_special_tokens({"pad_token": "<|pad|>"})
    fast.add_tokens(["<tool>"])
    fast.chat_template = tiny.CHAT_TEMPLATE
    return fast


KINDS = [byte_level, lambda: byte_level(ignore_merges=True), byte_fallback]


def _ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [np.array(ids, np.int64) for ids in encoded]


def _cut(
    tokenizer: PreTrainedTokenizerFast, corpus: list[str]
) -> tuple[np.ndarray, PreTrainedTokenizerFast]:
    kept_U = kept_ids(tokenizer, {*np.concatenate(_ids(tokenizer, corpus)).tolist()})
    return kept_U, cut_tokenizer(tokenizer, kept_U, where="student.vocabulary")


@pytest.mark.parametrize("kind", range(3))
@settings(max_examples=6, deadline=None)
@given(numbers=st.sets(st.integers(0, 60), min_size=1, max_size=4), part=st.integers(1, 40))
def test_the_corpus_has_the_same_tokens(kind: int, numbers: set[int], part: int) -> None:
    tokenizer = KINDS[kind]()
    corpus = [TOPICS[n][: part * 100] for n in sorted(numbers)]
    kept_U, smaller = _cut(tokenizer, corpus)
    assert len(kept_U) < len(tokenizer)
    pairs = zip(_ids(tokenizer, corpus), _ids(smaller, corpus), strict=True)
    assert all(np.array_equal(whole, kept_U[ours]) for whole, ours in pairs)


@cache
def _pair(kind: int) -> tuple[PreTrainedTokenizerFast, np.ndarray, PreTrainedTokenizerFast]:
    tokenizer = KINDS[kind]()
    return tokenizer, *_cut(tokenizer, CORPUS)


@pytest.mark.parametrize("kind", range(3))
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=40) | st.sampled_from([topic[:500] for topic in TOPICS[30:60]]))
def test_every_text_is_encoded_without_loss(kind: int, text: str) -> None:
    whole, _, smaller = _pair(kind)
    lengths = []
    for tokenizer in (whole, smaller):
        (ids,) = _ids(tokenizer, [text])
        # The space sign of SentencePiece is a space by its design.
        expected = text if kind < 2 else text.replace("▁", " ")
        assert tokenizer.backend_tokenizer.decode(ids.tolist()) == expected
        lengths.append(len(ids))
    assert lengths[0] <= lengths[1]


@pytest.mark.parametrize("kind", range(3))
def test_special_tokens_frame_and_template_are_kept(kind: int) -> None:
    whole, kept_U, smaller = _pair(kind)
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(smaller, role) == getattr(whole, role)
    names = {token.content: token for token in whole.added_tokens_decoder.values()}
    assert {t.content: t for t in smaller.added_tokens_decoder.values()} == names
    for text in ("def", "<|user|>print<tool>"):
        assert kept_U[smaller(text)["input_ids"]].tolist() == whole(text)["input_ids"]
    chat = [{"role": "user", "content": "def"}, {"role": "assistant", "content": "return"}]
    rendered = smaller.apply_chat_template(chat, tokenize=False)
    assert rendered == whole.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize("kind", range(3))
def test_it_is_saved_as_a_plain_tokenizer(kind: int, tmp_path: Path) -> None:
    _, kept_U, smaller = _pair(kind)
    smaller.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == smaller.get_vocab()
    assert sorted(loaded.get_vocab().values()) == list(range(len(kept_U)))
    texts = [*TOPICS[:3], *TOPICS[40:43], *tiny.TEXT]
    assert loaded(texts)["input_ids"] == smaller(texts)["input_ids"]
    assert loaded.chat_template == smaller.chat_template


@pytest.mark.parametrize("kind", range(3))
def test_keeping_every_token_is_the_identity(kind: int) -> None:
    tokenizer = KINDS[kind]()
    kept_U = kept_ids(tokenizer, {*range(len(tokenizer))})
    assert kept_U.tolist() == list(range(len(tokenizer)))
    same = cut_tokenizer(tokenizer, kept_U, where="student.vocabulary")
    assert same.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_only_the_way_to_used_tokens_is_kept() -> None:
    tokenizer = byte_level()
    kept_U = kept_ids(tokenizer, _ids(tokenizer, ["statement"])[0].tolist())
    names = set(tokenizer.convert_ids_to_tokens(kept_U.tolist()))
    longer = {name for name in names if len(name) > 1} - {*tokenizer.added_tokens_encoder}
    assert "statement" in longer
    assert all(name in "statement" for name in longer)
    assert len(longer) <= len("statement") - 1


REFUSED = {
    "words": models.WordLevel({"a": 0}, unk_token="a"),
    "unigram": models.Unigram([("a", 0.0)], unk_id=0),
    "characters": models.BPE({"a": 0}, []),
    "suffixes": models.BPE({"a": 0}, [], end_of_word_suffix="</w>", byte_fallback=True),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_tokenizers_are_refused(kind: str) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(REFUSED[kind]))
    with refused(VocabularyError, "student.vocabulary: "):
        check_can_be_cut(tokenizer, where="student.vocabulary")
