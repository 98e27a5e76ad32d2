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

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from collegium.data.chat import ChatEncoder
from collegium.data.documents import Document
from collegium.data.sources import SpecialTokens, Truncate, raise_refused
from collegium.data.tokens import Encoded, bytes_of_tokens, tokenize, tokenize_after
from collegium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

_STOPS = ("</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<eos>", "<|end|>", "<end_of_turn>")
# Documents are encoded in chunks: fast tokenizers work on batches, and a chunk bounds the memory.
_CHUNK_DOCUMENTS = 512
_CHUNK_CHARACTERS = 1_000_000


class Encoder:
    """Document encoder for one tokenizer, with a record of the documents it could not use."""

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
        self.num_seen = 0
        self.refused: list[str] = []
        """Errors of the documents that cannot be encoded."""
        self.too_long: list[tuple[int, str]] = []
        """(number of tokens, id) of every unsplittable document over `max_length`."""
        self.untrained: list[str] = []
        """Ids of the documents without a target."""
        self.parsed: list[str] = []
        """Ids of the texts and prompts with special tokens between their first and last token."""
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
        self._special = [number for number, token in added if token.special]

    @property
    def stops(self) -> set[int]:
        """Ids of the tokens that the student learns to stop with."""
        return {*self._eos, *self.chats.stops}

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded | None]:
        """Encode documents lazily. None stands for one that is dropped or refused, see `check`.

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

    def check(self) -> list[str]:
        """Check the documents encoded so far, and return warnings about those not used in full.

        Raises:
            DataError: a document cannot be encoded, no document has a target, or some are too long
                and `truncate` is `error`.
        """
        raise_refused(self.refused, self.num_seen, where=self.where)
        quoted = "plain text" if self.chats.quote else "special tokens"
        facts = [
            (
                self.chats.shortened,
                "chats of whose earlier assistant turns the chat template leaves out words",
                "trained as rendered",
            ),
            (self.chats.empty, "chats with an empty assistant turn", "it is no target"),
            (
                self.chats.quoting,
                "chats with special tokens in a message",
                f"encoded as {quoted} (`special_tokens`)",
            ),
            (
                self.parsed,
                "texts with special tokens inside",
                "encoded as such; set `special_tokens: text` to encode them as plain text",
            ),
        ]
        warnings = [
            f"{self.where}: {fact}: {len(ids):,} of {self.num_seen:,} (first: id {ids[0]}); {doing}"
            for ids, fact, doing in facts
            if ids
        ]
        if self.too_long:
            longest, name = max(self.too_long)
            fact = (
                f"{self.where}: samples of more than {self.max_length:,} tokens: "
                f"{len(self.too_long):,} (longest {longest:,}: {name})"
            )
            if self.truncate == "error":
                raise DataError(
                    f"{fact}; must fit in one window; raise `max_length` or set `truncate` to "
                    "right, left or drop"
                )
            action = "dropped" if self.truncate == "drop" else f"truncated ({self.truncate})"
            warnings.append(f"{fact}; {action}")
        if self.untrained:
            fact = (
                f"{self.where}: samples without a target token: {len(self.untrained):,} of "
                f"{self.num_seen:,} (first: id {self.untrained[0]})"
            )
            if len(self.untrained) == self.num_seen:
                raise DataError(
                    f"{fact}; must have a completion or an assistant turn that is not truncated; "
                    "check the rows, `max_length` and `truncate`"
                )
            warnings.append(f"{fact}; skipped")
        return warnings

    def _encode_chunk(self, documents: Sequence[Document]) -> Iterator[Encoded | None]:
        quote = self.special_tokens == "text"
        begins = [d.prompt if d.text is None else d.text for d in documents if d.messages is None]
        first = iter(tokenize([text or "" for text in begins], self.tokenizer, quote=quote))
        later = [d.completion for d in documents if d.completion is not None]
        second = iter(tokenize_after(later, self.tokenizer, quote=quote))
        for document in documents:
            self.num_seen += 1
            if document.messages is not None:
                try:
                    encoded = self.chats.encode(document)
                except DataError as error:
                    self.refused.append(str(error))
                    yield None
                    continue
            elif document.text is not None:
                encoded = self._frame(document, [(document.text, True, *next(first))])
            else:
                pieces = [(document.prompt or "", False, *next(first))]
                pieces.append((document.completion or "", True, *next(second)))
                encoded = self._frame(document, pieces)
            yield self._finish(document, encoded)

    def _frame(
        self, document: Document, pieces: Sequence[tuple[str, bool, np.ndarray, np.ndarray]]
    ) -> Encoded:
        """Join pieces of (text, whether it is a target, ids, offsets) between bos and eos."""
        columns = [
            (ids, np.full(len(ids), is_target), bytes_of_tokens(text, offsets[:, 1]))
            for text, is_target, ids, offsets in pieces
        ]
        all_ids = np.concatenate([ids for ids, _, _ in columns])
        has_eos = all_ids[-1:].tolist() == self._eos
        if np.isin(all_ids[1 : len(all_ids) - has_eos], self._special).any():
            self.parsed.append(document.id)
        if all_ids[:1].tolist() != self._bos:
            columns.insert(0, _added(self._bos, is_target=False))
        if not has_eos:
            columns.append(_added(self._eos, is_target=True))
        ids, is_target, num_bytes = map(np.concatenate, zip(*columns, strict=True))
        can_split = document.text is not None
        return Encoded(ids, is_target, num_bytes, can_split)

    def _finish(self, document: Document, encoded: Encoded) -> Encoded | None:
        length, span = len(encoded), slice(None)
        if not encoded.can_split and length > self.max_length:
            self.too_long.append((length, document.id))
            if self.truncate in ("drop", "error"):
                return None
            # Targets are already decided, so truncation only drops tokens.
            is_left = self.truncate == "left"
            span = slice(-self.max_length, None) if is_left else slice(self.max_length)
        encoded = encoded.part(span)
        if encoded.is_target.any():
            return encoded
        self.untrained.append(document.id)
        return None


def _added(ids: Sequence[int], *, is_target: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Added tokens cover no bytes of the text.
    size = len(ids)
    return np.array(ids, np.int64), np.full(size, is_target), np.zeros(size, np.int64)


def eos_candidates(tokenizer: Tokenizer) -> str:
    """List the common stop tokens in the vocabulary of this tokenizer, for a message."""
    vocabulary = tokenizer.get_vocab()
    return ", ".join(f"`{name}`" for name in _STOPS if name in vocabulary) or "none"
