"""Comparison of a teacher's vocabulary with the student's, id by id, as bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from collegium.errors import VocabularyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = b"\xff\xfe"
"""Prefix of special tokens. It is not valid UTF-8, so no text encodes to it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of comparing one teacher's tokenizer with the student's."""

    # Equal sizes do not imply equal vocabularies: with other ids the loss is wrong but finite
    # (huggingface/trl#4562, MakazhanAlpamys/Soup#681). Strict equality would refuse teachers with
    # harmless extra tokens, so there are three kinds.
    kind: Literal["identical", "compatible", "different"]
    """`identical`: same ids, same bytes. `compatible`: the same for every id of the student, while
    the teacher's extra ids or pad rows are dropped. `different`: some id maps to other bytes.
    Reserved ids do not count."""
    vocab_size: int
    """V: largest id of the student's tokenizer + 1. Heads are truncated to V rows."""
    differing: tuple[tuple[int, bytes | None, bytes | None], ...]
    """(id, student's bytes, teacher's bytes) of the first ids that differ, at most 5."""
    num_differing: int
    reserved: tuple[int, ...]
    """Ids of special tokens with another name, which neither a template nor the end of a text uses.
    No text to train on may contain them."""
    num_pad_rows: int
    """Number of rows of the teacher's head beyond V, which are dropped."""
    message: str


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes | None]:
    """Return the bytes of each token id: None for unused ids, `SPECIAL` + name for special ones."""
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    size = max([*vocabulary.values(), *added], default=-1) + 1
    tokens: list[bytes | None] = [None] * size
    backend = tokenizer.backend_tokenizer
    # Backend components expose no common type, only a JSON-like repr.
    kind = repr(backend.decoder) + repr(backend.pre_tokenizer)
    to_bytes = _plain
    if "ByteLevel" in kind:
        to_bytes = _byte_level
    elif "Metaspace" in kind or "▁" in kind or "ByteFallback" in kind:
        to_bytes = _piece
    for token, number in vocabulary.items():
        tokens[number] = to_bytes(token)
    for number, token in added.items():
        name = _plain(token.content)
        tokens[number] = SPECIAL + name if token.special else name
    return tokens


def compare(
    student_tokenizer: PreTrainedTokenizerFast,
    teacher_tokenizer: PreTrainedTokenizerFast,
    *,
    student_head_size: int | None,
    teacher_head_size: int | None,
    where: str,
) -> Verdict:
    """Compare two tokenizers id by id.

    A head size is the number of rows of the output layer, None if it is not known yet. `where` is
    the path of the teacher, such as `teachers.w1`.

    Raises:
        VocabularyError: a token id of the student has no row in the student's or teacher's head.
    """
    student, teacher = token_bytes(student_tokenizer), token_bytes(teacher_tokenizer)
    size = len(student)
    _check_head(student, student_head_size, "student")
    # Holes in the student's ids are skipped: no text produces them.
    pairs = list(enumerate(zip_longest(student, teacher)))
    differing = [(i, ours, theirs) for i, (ours, theirs) in pairs if ours not in (None, theirs)]
    added = {*student_tokenizer.added_tokens_decoder} & {*teacher_tokenizer.added_tokens_decoder}
    # The flag `special` only decides what decoding skips.
    flags = [i for i, ours, theirs in differing if i in added and _name(ours) == _name(theirs)]
    in_use = _special_in_use(student_tokenizer) | _special_in_use(teacher_tokenizer)
    reserved = [
        i
        for i, ours, theirs in differing
        if i not in flags and i not in in_use and _is_special(ours) and _is_special(theirs)
    ]
    differing = [row for row in differing if row[0] not in {*flags, *reserved}]
    num_extra = sum(ours is None and theirs is not None for _, (ours, theirs) in pairs)
    num_pad_rows = max(0, (teacher_head_size or 0) - size)
    if differing:
        number, ours, theirs = differing[0]
        kind = "different"
        message = (
            f"{len(differing):,} token ids map to other bytes than in the student's tokenizer "
            f"(id {number}: {_show(theirs)} here, {_show(ours)} there); must be the same for all "
            f"{size:,} ids; use a teacher with the student's tokenizer, or build the student with "
            "this one"
        )
    elif num_extra or num_pad_rows:
        kind = "compatible"
        message = (
            f"all {size:,} token ids of the student map to the same bytes; {num_extra:,} extra ids "
            f"and {num_pad_rows:,} head rows are dropped"
        )
    else:
        kind = "identical"
        message = f"{size:,} token ids map to the same bytes as in the student's tokenizer"
    if not differing:
        _check_head(student, teacher_head_size, where)
    notes = _notes(student_tokenizer, teacher_tokenizer)
    if flags:
        notes.append(f"{len(flags):,} tokens are special in one of the tokenizers only")
    if reserved:
        notes.append(f"{len(reserved):,} reserved ids have another name (first: {reserved[0]})")
    return Verdict(
        kind=kind,
        vocab_size=size,
        differing=tuple(differing[:5]),
        num_differing=len(differing),
        reserved=tuple(reserved),
        num_pad_rows=num_pad_rows,
        message="; ".join([f"{where}: {message}", *notes]),
    )


def require_compatible(verdict: Verdict) -> None:
    """Check that the vocabularies are identical or compatible.

    Raises:
        VocabularyError: some id maps to other bytes.
    """
    if verdict.kind == "different":
        raise VocabularyError(verdict.message)


def _special_in_use(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Return the ids of special tokens with a role, or a place in the chat template."""
    template = str(tokenizer.chat_template or "")
    roles = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    added = tokenizer.added_tokens_decoder.items()
    return {n for n, token in added if token.content in roles or token.content in template}


def _is_special(token: bytes | None) -> bool:
    return token is not None and token.startswith(SPECIAL)


def _name(token: bytes | None) -> bytes | None:
    return token if token is None else token.removeprefix(SPECIAL)


def _notes(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> list[str]:
    # These do not make the teacher's distributions wrong, so they are reported, not refused.
    notes = []
    if student.eos_token_id != teacher.eos_token_id:
        notes.append(
            f"the eos id is {teacher.eos_token_id} here and {student.eos_token_id} in the "
            "student's tokenizer, so they end texts differently"
        )
    if student.chat_template and teacher.chat_template != student.chat_template:
        notes.append("the chat template differs from the student's, which is used for all")
    return notes


def _check_head(tokens: Sequence[bytes | None], head_size: int | None, where: str) -> None:
    if head_size is None or head_size >= len(tokens):
        return
    number = next(i for i in range(head_size, len(tokens)) if tokens[i] is not None)
    raise VocabularyError(
        f"{where}: token {_show(tokens[number])} has id {number}, the model has {head_size} rows; "
        "must have a row for every id; use the model's own tokenizer"
    )


def _show(token: bytes | None) -> str:
    if token is None:
        return "nothing"
    if token.startswith(SPECIAL):
        return f"special `{token[len(SPECIAL) :].decode('utf-8', 'replace')}`"
    return repr(token)


def _byte_alphabet() -> dict[int, int]:
    """Map each code point of a byte-level vocabulary to its byte.

    Printable bytes map to themselves, the others take the code points from 256 on, in order.
    Source: Radford et al., "Language models are unsupervised multitask learners", 2019.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _plain(token: str) -> bytes:
    return token.encode("utf-8", "surrogatepass")


# The tokenizers of a run share most tokens, so each is converted once.
@lru_cache(maxsize=2**18)
def _byte_level(token: str) -> bytes:
    try:
        return token.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return _plain(token)


@lru_cache(maxsize=2**18)
def _piece(token: str) -> bytes:
    if byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token):
        return bytes.fromhex(byte[1])
    return _plain(token.replace("▁", " "))
