"""Document encoding: the only module that decides which tokens are targets.

- text: all tokens but the first, and an appended stop token. A beginning-of-text token is prepended
  only if the tokenizer adds one itself.
- prompt + completion: the completion and an appended stop token. The two are encoded separately, so
  no token spans the boundary and the prompt gets the same ids as at inference.
- messages: rendered with the tokenizer's chat template. Targets are the assistant's tokens and the
  stop token that ends each of its turns.

Text that was rendered before keeps its own beginning-of-text and stop token: none is added twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntFlag, auto
from typing import TYPE_CHECKING

import numpy as np

from collegium.data.chat import ChatEncoder
from collegium.data.documents import Document
from collegium.data.sources import SpecialTokens, Truncate, raise_refused
from collegium.data.tokens import Encoded, TextTokenizer, bytes_of_tokens, tokenize, tokenize_after
from collegium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

_STOPS = ("</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<eos>", "<|end|>", "<end_of_turn>")
# Documents are encoded in chunks: fast tokenizers work on batches, and a chunk bounds the memory.
_CHUNK_DOCUMENTS = 512
_CHUNK_CHARACTERS = 1_000_000


class Note(IntFlag):
    """Facts about the encoding of a document."""

    SHORTENED = auto()
    EMPTY = auto()
    QUOTING = auto()
    PARSED = auto()
    TOO_LONG = auto()
    UNTRAINED = auto()
    REFUSED = auto()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The tokens of a document, or the reason why it has none."""

    encoded: Encoded | None
    """None if it is dropped or refused."""
    notes: Note
    length: int = 0
    """Tokens before it was truncated."""
    error: str = ""
    """Reason why it is refused."""


class EncodingReport:
    """Counts of the documents that were not used in full."""

    def __init__(
        self, *, max_length: int, truncate: Truncate, special_tokens: SpecialTokens, where: str
    ) -> None:
        self._max_length, self._truncate, self._where = max_length, truncate, where
        self._quoted = "special tokens" if special_tokens == "parse" else "plain text"
        self._num_seen = 0
        self._first: dict[Note, str] = {}
        self._counts: Counter[Note] = Counter()
        self._longest = 0, ""
        self._refused: list[str] = []

    def add(
        self,
        name: Callable[[], str],
        notes: Note,
        length: int = 0,
        error: Callable[[], str] = lambda: "",
    ) -> None:
        """Count a document. `name` and `error` return its id, and the reason why it is refused."""
        self._num_seen += 1
        for note in Note if notes else ():
            if note & notes:
                self._counts[note] += 1
                if note not in self._first:
                    self._first[note] = name()
        if notes & Note.TOO_LONG and length >= self._longest[0]:
            self._longest = max(self._longest, (length, name()))
        if notes & Note.REFUSED:
            self._refused.append(error())

    @property
    def num_too_long(self) -> int:
        """Number of unsplittable documents over `max_length`."""
        return self._counts[Note.TOO_LONG]

    def check(self) -> list[str]:
        """Check the documents, and return warnings about those not used in full.

        Raises:
            DataError: a document cannot be encoded, no document has a target, or some are too long
                and `truncate` is `error`.
        """
        raise_refused(self._refused, self._num_seen, where=self._where)
        facts = {
            Note.SHORTENED: (
                "chats of whose earlier assistant turns the chat template leaves out words",
                "trained as rendered",
            ),
            Note.EMPTY: ("chats with an empty assistant turn", "it is no target"),
            Note.QUOTING: (
                "chats with special tokens in a message",
                f"encoded as {self._quoted} (`special_tokens`)",
            ),
            Note.PARSED: (
                "texts with special tokens inside",
                "encoded as such; set `special_tokens: text` to encode them as plain text",
            ),
        }
        warnings = [
            f"{self._where}: {fact}: {self._counts[note]:,} of {self._num_seen:,} "
            f"(first: id {self._first[note]}); {doing}"
            for note, (fact, doing) in facts.items()
            if note in self._first
        ]
        return [*warnings, *self._check_lengths(), *self._check_targets()]

    def _check_lengths(self) -> Iterator[str]:
        if not self.num_too_long:
            return
        longest, name = self._longest
        fact = (
            f"{self._where}: samples of more than {self._max_length:,} tokens: "
            f"{self.num_too_long:,} (longest {longest:,}: {name})"
        )
        if self._truncate == "error":
            raise DataError(
                f"{fact}; must fit in one window; raise `max_length` or set `truncate` to "
                "right, left or drop"
            )
        action = "dropped" if self._truncate == "drop" else f"truncated ({self._truncate})"
        yield f"{fact}; {action}"

    def _check_targets(self) -> Iterator[str]:
        num_untrained = self._counts[Note.UNTRAINED]
        if not num_untrained:
            return
        fact = (
            f"{self._where}: samples without a target token: {num_untrained:,} of "
            f"{self._num_seen:,} (first: id {self._first[Note.UNTRAINED]})"
        )
        if num_untrained == self._num_seen:
            raise DataError(
                f"{fact}; must have a completion or an assistant turn that is not truncated; "
                "check the rows, `max_length` and `truncate`"
            )
        yield f"{fact}; skipped"


class Encoder:
    """Document encoder for one tokenizer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        truncate: Truncate = "right",
        special_tokens: SpecialTokens = "auto",
        date: str = "2025-01-01",
        where: str,
    ) -> None:
        """Check the tokenizer. Raises DataError if it has no stop token."""
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncate: Truncate = truncate
        self.where = where
        self.special_tokens: SpecialTokens = special_tokens
        self.chats = ChatEncoder(tokenizer, where=where, date=date, quote=special_tokens != "parse")
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        if not isinstance(eos, int):
            raise DataError(
                f"{where}: tokenizer: has no eos token; must have one, or the student never "
                f"learns to stop; set eos_token in tokenizer_config.json "
                f"(candidates: {eos_candidates(tokenizer)})"
            )
        # A tokenizer may define a bos token and never add it, like GPT-2's.
        first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        self._bos = first if isinstance(bos, int) and first == [bos] else []
        self._eos = [eos]
        added = tokenizer.added_tokens_decoder.items()
        special = [number for number, token in added if token.special]
        self._is_special_V = np.zeros(max(tokenizer.get_vocab().values()) + 1, bool)
        self._is_special_V[special] = True
        self._tokenize = TextTokenizer(tokenizer)

    def encode(self, documents: Iterable[Document]) -> Iterator[Outcome]:
        """Encode documents lazily.

        Texts are never truncated: they span as many windows as they need. `truncate` applies to
        prompts and chats, after the targets are decided.
        """
        chunk: list[Document] = []
        num_characters = 0
        for document in documents:
            chunk.append(document)
            num_characters += len(document.text or "") + len(document.prompt or "")
            if len(chunk) == _CHUNK_DOCUMENTS or num_characters >= _CHUNK_CHARACTERS:
                yield from self._encode_chunk(chunk)
                chunk, num_characters = [], 0
        yield from self._encode_chunk(chunk)

    def prompt_ids(self, document: Document) -> list[int]:
        """Encode a prompt, or a chat that ends with the user, as in training.

        Raises:
            DataError: the chat template cannot render it, or it has no tokens.
        """
        if document.messages is not None:
            return self.chats.prompt_ids(document)
        quote = self.special_tokens == "text"
        ((ids, _),) = tokenize([document.prompt or ""], self.tokenizer, quote=quote)
        has_bos = ids[:1].tolist() == self._bos
        framed = [*([] if has_bos else self._bos), *ids.tolist()]
        if not framed:
            raise DataError(
                f"{self.where}: {document.id}: got no tokens; must have at least one to continue"
            )
        return framed

    def _encode_chunk(self, documents: Sequence[Document]) -> Iterator[Outcome]:
        quote = self.special_tokens == "text"
        begins = [d.prompt if d.text is None else d.text for d in documents if d.messages is None]
        first = iter(self._tokenize([text or "" for text in begins], quote=quote))
        later = [d.completion for d in documents if d.completion is not None]
        second = (
            (ids, bytes_of_tokens(text, offsets[:, 1]))
            for text, (ids, offsets) in zip(
                later, tokenize_after(later, self.tokenizer, quote=quote), strict=True
            )
        )
        for document in documents:
            if document.messages is not None:
                yield self._encode_chat(document)
                continue
            if document.text is not None:
                pieces = [(True, *next(first))]
            else:
                pieces = [(False, *next(first)), (True, *next(second))]
            yield self._finish(*self._frame(pieces, can_split=document.text is not None))

    def _encode_chat(self, document: Document) -> Outcome:
        lists = {
            Note.SHORTENED: self.chats.shortened,
            Note.EMPTY: self.chats.empty,
            Note.QUOTING: self.chats.quoting,
        }
        for ids in lists.values():
            ids.clear()
        try:
            encoded = self.chats.encode(document)
        except DataError as error:
            return Outcome(None, Note.REFUSED, error=str(error))
        notes = Note(0)
        for note, ids in lists.items():
            if ids:
                notes |= note
        return self._finish(encoded, notes)

    def _frame(
        self, pieces: Sequence[tuple[bool, np.ndarray, np.ndarray]], *, can_split: bool
    ) -> tuple[Encoded, Note]:
        """Join pieces of (whether it is a target, ids, bytes) between bos and eos."""
        columns = [(ids, np.full(len(ids), is_target), count) for is_target, ids, count in pieces]
        all_ids = np.concatenate([ids for ids, _, _ in columns])
        has_eos = all_ids[-1:].tolist() == self._eos
        is_parsed = self._is_special_V[all_ids[1 : len(all_ids) - has_eos]].any()
        if all_ids[:1].tolist() != self._bos:
            columns.insert(0, _added(self._bos, is_target=False))
        if not has_eos:
            columns.append(_added(self._eos, is_target=True))
        ids, is_target, num_bytes = map(np.concatenate, zip(*columns, strict=True))
        notes = Note.PARSED if is_parsed else Note(0)
        return Encoded(ids, is_target, num_bytes, can_split), notes

    def _finish(self, encoded: Encoded, notes: Note) -> Outcome:
        length, span = len(encoded), slice(None)
        if not encoded.can_split and length > self.max_length:
            notes |= Note.TOO_LONG
            if self.truncate in ("drop", "error"):
                return Outcome(None, notes, length)
            # Targets are already decided, so truncation only drops tokens.
            is_left = self.truncate == "left"
            span = slice(-self.max_length, None) if is_left else slice(self.max_length)
        encoded = encoded.part(span)
        if encoded.is_target.any():
            return Outcome(encoded, notes, length)
        return Outcome(None, notes | Note.UNTRAINED, length)


def _added(ids: Sequence[int], *, is_target: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Added tokens cover no bytes of the text.
    size = len(ids)
    return np.array(ids, np.int64), np.full(size, is_target), np.zeros(size, np.int64)


def eos_candidates(tokenizer: Tokenizer) -> str:
    """List the common stop tokens in the vocabulary of this tokenizer, for a message."""
    vocabulary = tokenizer.get_vocab()
    return ", ".join(f"`{name}`" for name in _STOPS if name in vocabulary) or "none"
