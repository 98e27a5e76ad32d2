"""Vocabularies are compared by the bytes of their ids, never by size."""

import random
import time

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from collegium.errors import VocabularyError
from collegium.vocabulary.verdict import SPECIAL, compare, require_compatible, token_bytes
from refusals import check_message, refused


def from_backend(backend, **options):
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", **options)


def byte_level(vocabulary, *, specials=("<|end|>",), **options):
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True) for name in specials])
    return from_backend(backend, **options)


def verdict_of(student, teacher, *, student_head=None, teacher_head=None):
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
    verdict = verdict_of(tokenizer, tokenizer, student_head=400, teacher_head=400)
    assert (verdict.kind, verdict.vocab_size, verdict.num_differing) == ("identical", 400, 0)
    require_compatible(verdict)


def test_pad_rows_and_extra_ids_are_compatible():
    student = byte_level(BASE)
    rows = verdict_of(student, student, student_head=8, teacher_head=64)
    assert (rows.kind, rows.num_pad_rows) == ("compatible", 59)
    ids = verdict_of(student, byte_level({**BASE, "more": 5, "yet": 6}))
    assert (ids.kind, ids.num_differing, ids.num_pad_rows) == ("compatible", 0, 0)
    check_message(ids.message, "teachers.w1")
    require_compatible(ids)


def test_equal_size_is_not_equal_vocabulary():
    student = byte_level(BASE)
    teacher = byte_level({**BASE, "Ġthe": 4, "ing": 3})
    verdict = verdict_of(student, teacher, student_head=5, teacher_head=5)
    assert verdict.kind == "different"
    assert verdict.differing == ((3, b" the", b"ing"), (4, b"ing", b" the"))
    with refused(VocabularyError, "teachers.w1"):
        require_compatible(verdict)


def test_a_special_token_is_not_its_text():
    student = byte_level(BASE)
    plain = {**BASE, "<|end|>": 0}
    backend = Tokenizer(models.BPE(vocab=plain, merges=[]))
    backend.decoder = decoders.ByteLevel()
    teacher = PreTrainedTokenizerFast(tokenizer_object=backend)
    verdict = verdict_of(student, teacher)
    assert verdict.differing == ((0, SPECIAL + b"<|end|>", b"<|end|>"),)
    check_message(verdict.message, "teachers.w1")


def test_missing_ids_differ_and_holes_do_not():
    small = byte_level({k: v for k, v in BASE.items() if v < 4})
    assert verdict_of(byte_level(BASE), small).differing == ((4, b"ing", None),)
    hole = byte_level({k: v for k, v in BASE.items() if v != 3})
    assert verdict_of(hole, byte_level(BASE)).kind == "compatible"


def test_other_encodings_of_the_same_bytes_are_identical():
    pieces = Tokenizer(
        models.BPE(vocab={"<|end|>": 0, "a": 1, "b": 2, "▁the": 3, "ing": 4}, merges=[])
    )
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.add_special_tokens(["<|end|>"])
    assert verdict_of(byte_level(BASE), from_backend(pieces)).kind == "identical"


def test_ids_beyond_the_rows_of_a_head():
    student = byte_level(BASE)
    with refused(VocabularyError, "student"):
        verdict_of(student, student, student_head=3)
    with refused(VocabularyError, "teachers.w1"):
        verdict_of(student, student, teacher_head=4)


def test_stop_token_and_template_are_compared():
    student = byte_level(BASE, specials=("<|end|>", "<|eot|>"))
    teacher = byte_level(BASE, specials=("<|end|>", "<|eot|>"))
    teacher.eos_token = "<|eot|>"
    check_message(verdict_of(student, teacher).message, "teachers.w1")
    student.chat_template = "a"
    teacher.chat_template = "b"
    check_message(verdict_of(student, teacher).message, "teachers.w1")
    assert "chat template" not in verdict_of(student, student).message


def test_large_vocabularies_are_compared_quickly():
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyzĠĊÃ©"
    tokens = {"".join(draw.choices(letters, k=7)) for _ in range(150_000)}
    vocabulary = {token: number for number, token in enumerate(sorted(tokens))}
    tokenizer = byte_level(vocabulary)
    start = time.process_time()
    assert verdict_of(tokenizer, tokenizer).kind == "identical"
    assert time.process_time() - start < 4
