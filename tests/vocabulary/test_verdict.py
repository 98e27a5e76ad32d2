"""Vocabularies are judged by what the ids mean, never by size."""

import random
import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from collegium.errors import VocabularyError
from collegium.vocabulary.verdict import SPECIAL, compare, require_compatible, token_bytes


def from_backend(backend, **options):
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", **options)


def changed(vocabulary, *, specials=("<|end|>",), **options):
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in specials])
    return from_backend(backend, **options)


def headline_of(student, teacher, *, student_head=None, teacher_head=None):
    return compare(
        student,
        teacher,
        student_head_size=student_head,
        teacher_head_size=teacher_head,
        where="teachers.w1",
    )


BASE = {"<|end|>": 0, "a": 1, "b": 2, "Ġthe": 3, "ing": 4}


def test_bytes_of_a_byte_level_vocabulary():
    tokenizer = tiny.tiny_tokenizer()
    tokens = token_bytes(tokenizer)
    assert tokens[0] == SPECIAL + b"<|end|>"
    assert sum(token is not None and len(token) == 1 for token in tokens) == 256
    for text in tiny.TEXT:
        ids = tokenizer(text)["input_ids"]
        assert b"".join(tokens[i] for i in ids) == text.encode()


def test_bytes_of_pieces_and_words():
    vocabulary = {"<unk>": 0, "▁the": 1, "<0xE2>": 2, "é": 4, "<0xZZ>": 5, "<|end|>": 6}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    assert token_bytes(from_backend(backend)) == [
        b"<unk>",
        b" the",
        b"\xe2",
        None,
        "é".encode(),
        b"<0xZZ>",
        SPECIAL + b"<|end|>",
    ]
    words = Tokenizer(models.WordLevel(vocab={"the": 0, "▁a": 1}, unk_token="the"))
    assert token_bytes(from_backend(words))[:2] == [b"the", "▁a".encode()]


def test_identical():
    tokenizer = tiny.tiny_tokenizer()
    verdict = headline_of(tokenizer, tokenizer, student_head=400, teacher_head=400)
    assert (verdict.kind, verdict.vocab_size, verdict.num_differing) == ("identical", 400, 0)
    require_compatible(verdict)


def test_pad_rows_and_further_ids_are_compatible():
    student = changed(BASE)
    rows = headline_of(student, student, student_head=8, teacher_head=64)
    assert (rows.kind, rows.num_pad_rows) == ("compatible", 59)
    ids = headline_of(student, changed({**BASE, "more": 5, "yet": 6}))
    assert (ids.kind, ids.num_differing, ids.num_pad_rows) == ("compatible", 0, 0)
    assert "2 further ids" in ids.message
    require_compatible(ids)


def test_equal_size_is_not_equal_vocabulary():
    student = changed(BASE)
    teacher = changed({**BASE, "Ġthe": 4, "ing": 3})
    verdict = headline_of(student, teacher, student_head=5, teacher_head=5)
    assert verdict.kind == "different"
    assert verdict.differing == ((3, b" the", b"ing"), (4, b"ing", b" the"))
    with pytest.raises(VocabularyError) as caught:
        require_compatible(verdict)
    assert str(caught.value).startswith(
        "teachers.w1: 2 token ids mean other bytes than in the student's tokenizer "
        "(id 3: b'ing' here, b' the' there); must be the same"
    )


def test_a_special_token_is_not_its_text():
    student = changed(BASE)
    plain = {**BASE, "<|end|>": 0}
    backend = Tokenizer(models.BPE(vocab=plain, merges=[]))
    backend.decoder = decoders.ByteLevel()
    teacher = PreTrainedTokenizerFast(tokenizer_object=backend)
    verdict = headline_of(student, teacher)
    assert verdict.differing == ((0, SPECIAL + b"<|end|>", b"<|end|>"),)
    assert "(id 0: b'<|end|>' here, special `<|end|>` there)" in verdict.message
    assert "the eos id is None here and 0 in the student's tokenizer" in verdict.message


def test_missing_ids_differ_and_holes_do_not():
    small = changed({k: v for k, v in BASE.items() if v < 4})
    assert headline_of(changed(BASE), small).differing == ((4, b"ing", None),)
    hole = changed({k: v for k, v in BASE.items() if v != 3})
    assert headline_of(hole, changed(BASE)).kind == "compatible"


def test_other_ways_to_spell_the_same_bytes_are_identical():
    pieces = Tokenizer(
        models.BPE(vocab={"<|end|>": 0, "a": 1, "b": 2, "▁the": 3, "ing": 4}, merges=[])
    )
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.add_special_tokens(["<|end|>"])
    assert headline_of(changed(BASE), from_backend(pieces)).kind == "identical"


def test_ids_beyond_the_rows_of_a_head():
    student = changed(BASE)
    with pytest.raises(
        VocabularyError, match=r"^student: token b' the' has id 3, the model has 3 rows"
    ):
        headline_of(student, student, student_head=3)
    with pytest.raises(
        VocabularyError, match=r"^teachers\.w1: token b'ing' has id 4, the model has 4"
    ):
        headline_of(student, student, teacher_head=4)


def test_stop_token_and_template_are_compared():
    student = changed(BASE, specials=("<|end|>", "<|eot|>"))
    teacher = changed(BASE, specials=("<|end|>", "<|eot|>"))
    teacher.eos_token = "<|eot|>"
    assert "the eos id is 5 here and 0 in the student's" in headline_of(student, teacher).message
    student.chat_template = "a"
    teacher.chat_template = "b"
    assert "the chat template is not the student's" in headline_of(student, teacher).message
    assert "chat template" not in headline_of(student, student).message


def test_large_vocabularies_are_compared_quickly():
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzĠĊÃ©"
    tokens = {"".join(draw.choices(letters, k=7)) for _ in range(150_000)}
    vocabulary = {token: number for number, token in enumerate(sorted(tokens))}
    tokenizer = changed(vocabulary)
    start = time.process_time()
    assert headline_of(tokenizer, tokenizer).kind == "identical"
    assert time.process_time() - start < 4
