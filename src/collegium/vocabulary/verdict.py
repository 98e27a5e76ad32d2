"""The verdict on two tokenizers: does every token id of the student mean the same bytes to the teacher?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from collegium.errors import VocabularyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = b"\xff\xfe"
"""In front of the name of a special token, which is not the same as those bytes in a text."""
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one teacher's tokenizer is to the student's."""

    kind: Literal["identical", "compatible", "different"]
    """`identical`: same ids, same bytes; `compatible`: the same for every id of the student, and the teacher's
    further ids or pad rows are dropped; `different`: some id means other bytes."""
    vocab_size: int
    """V: largest id of the student's tokenizer + 1; heads are cut to V rows."""
    differing: tuple[tuple[int, bytes | None, bytes | None], ...]
    """(id, student's bytes, teacher's bytes) of the first ids that differ."""
    num_differing: int
    num_pad_rows: int
    """Rows of the teacher's head beyond V, which are dropped."""
    message: str


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes | None]:
    """The bytes that each id stands for; None where no token has the id, and `SPECIAL` + name for special tokens."""
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    size = max([*vocabulary.values(), *added], default=-1) + 1
    tokens: list[bytes | None] = [None] * size
    backend = tokenizer.backend_tokenizer
    kind = repr(backend.decoder) + repr(backend.pre_tokenizer)
    if "ByteLevel" in kind:
        for token, number in vocabulary.items():
            tokens[number] = _byte_level(token)
    else:
        is_piece = "Metaspace" in kind or "▁" in kind or "ByteFallback" in kind
        for token, number in vocabulary.items():
            tokens[number] = _piece(token) if is_piece else token.encode("utf-8", "surrogatepass")
    for number, token in added.items():
        name = token.content.encode("utf-8", "surrogatepass")
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
    """Compare two tokenizers id by id; `where` names the teacher, such as `teachers.w1`.

    Head sizes are the rows of the models' output layers; None where that is not known yet.

    Raises:
        VocabularyError: a token id of the student has no row in the student's or the teacher's head.
    """
    student = token_bytes(student_tokenizer)
    teacher = token_bytes(teacher_tokenizer)
    size = len(student)
    _check_head(student, student_head_size, "student")
    padded = teacher[:size] + [None] * (size - len(teacher))
    pairs = zip(student, padded, strict=True)
    differing = [
        (number, ours, theirs)
        for number, (ours, theirs) in enumerate(pairs)
        if ours is not None and ours != theirs
    ]
    num_extra = sum(token is not None for token in teacher[size:])
    num_extra += sum(s is None and t is not None for s, t in zip(student, padded, strict=True))
    num_pad_rows = max(0, (teacher_head_size or 0) - size)
    kind: Literal["identical", "compatible", "different"] = "identical"
    if differing:
        kind = "different"
    else:
        _check_head(student, teacher_head_size, where)
        if num_extra or num_pad_rows:
            kind = "compatible"
    notes = _notes(student_tokenizer, teacher_tokenizer)
    message = {
        "identical": f"{where}: {size:,} token ids mean the same bytes as in the student's tokenizer",
        "compatible": f"{where}: all {size:,} token ids of the student mean the same bytes; "
        f"{num_extra:,} further ids and {num_pad_rows:,} rows of the head are dropped",
        "different": _differing_message(differing, size, where),
    }[kind]
    return Verdict(
        kind=kind,
        vocab_size=size,
        differing=tuple(differing[:_SHOWN]),
        num_differing=len(differing),
        num_pad_rows=num_pad_rows,
        message="; ".join([message, *notes]),
    )


def require_compatible(verdict: Verdict) -> None:
    """Let identical and compatible vocabularies pass.

    Raises:
        VocabularyError: some id means other bytes.
    """
    if verdict.kind == "different":
        raise VocabularyError(verdict.message)


def _differing_message(
    differing: Sequence[tuple[int, bytes | None, bytes | None]], size: int, where: str
) -> str:
    if not differing:
        return ""
    number, ours, theirs = differing[0]
    return (
        f"{where}: {len(differing):,} token ids mean other bytes than in the student's tokenizer "
        f"(id {number}: {_show(theirs)} here, {_show(ours)} there); must be the same for all "
        f"{size:,} ids; use a teacher with the student's tokenizer, or make the student with this one"
    )


def _notes(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> list[str]:
    notes = []
    if student.eos_token_id != teacher.eos_token_id:
        notes.append(
            f"the eos id is {teacher.eos_token_id} here and {student.eos_token_id} in the student's "
            "tokenizer: the two end a text differently"
        )
    if student.chat_template and teacher.chat_template != student.chat_template:
        notes.append("the chat template is not the student's; the student's is used for all")
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
    """Code point that stands for a byte in a byte-level vocabulary -> the byte.

    Printable bytes stand for themselves, the others for the code points from 256 on, in order.
    Source: Radford et al., "Language models are unsupervised multitask learners", 2019.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return token.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode("utf-8", "surrogatepass")


def _piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace("▁", " ").encode("utf-8", "surrogatepass")
