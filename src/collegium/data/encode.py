"""Document encoding: the only module that decides which tokens are targets.

- text: all tokens but the first, and an appended stop token. A beginning-of-text token is prepended
  only if the tokenizer adds one itself.
- prompt + completion: the completion and an appended stop token. The two are encoded separately, so
  no token spans the boundary and the prompt gets the same ids as at inference.
- messages: rendered with the tokenizer's chat template. Targets are the assistant's tokens and the
  stop token that ends each of its turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from collegium.data.chat import encode_chat
from collegium.data.readers import Document
from collegium.data.sources import Truncate
from collegium.data.tokens import Encoded, bytes_of_tokens, tokenize
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
        self, tokenizer: Tokenizer, *, max_length: int, truncate: Truncate = "right", where: str
    ) -> None:
        """Check the tokenizer. Raises DataError if it has no stop token."""
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncate: Truncate = truncate
        self.where = where
        self.num_seen = 0
        self.too_long: list[tuple[int, str]] = []
        """(number of tokens, id) of every unsplittable document over `max_length`."""
        self.untrained: list[str] = []
        """Ids of the documents without a target."""
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

    def encode(self, documents: Iterable[Document]) -> Iterator[Encoded | None]:
        """Encode documents lazily. None stands for one dropped for its length or without a target.

        Texts are never truncated: they span as many windows as they need. `truncate` applies to
        prompts and chats, after the targets are decided. Raises DataError if a chat has no
        template, or a template under which it cannot be trained.
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

    def check(self) -> list[str]:
        """Check the documents encoded so far, and return warnings about those not used in full.

        Raises:
            DataError: no document has a target, or some are too long and `truncate` is `error`.
        """
        warnings = []
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
        texts = [text for document in documents for text, _ in _pieces(document)]
        tokens = iter(tokenize(texts, self.tokenizer))
        for document in documents:
            if document.messages is not None:
                encoded = encode_chat(document, self.tokenizer, where=self.where)
            else:
                columns = [_added(self._bos, is_target=False)]
                for text, is_target in _pieces(document):
                    ids, offsets = next(tokens)
                    num_bytes = bytes_of_tokens(text, offsets[:, 1])
                    columns.append((ids, np.full(len(ids), is_target), num_bytes))
                columns.append(_added(self._eos, is_target=True))
                ids, is_target, num_bytes = map(np.concatenate, zip(*columns, strict=True))
                can_split = document.text is not None
                encoded = Encoded(ids, is_target, num_bytes, can_split)
            yield self._finish(document, encoded)

    def _finish(self, document: Document, encoded: Encoded) -> Encoded | None:
        self.num_seen += 1
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


def _pieces(document: Document) -> list[tuple[str, bool]]:
    """Return the pieces of a document that are encoded separately, and which are targets."""
    if document.text is not None:
        return [(document.text, True)]
    if document.prompt is not None and document.completion is not None:
        return [(document.prompt, False), (document.completion, True)]
    return []


def _added(ids: Sequence[int], *, is_target: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Added tokens cover no bytes of the text.
    size = len(ids)
    return np.array(ids, np.int64), np.full(size, is_target), np.zeros(size, np.int64)


def eos_candidates(tokenizer: Tokenizer) -> str:
    """List the common stop tokens in the vocabulary of this tokenizer, for a message."""
    vocabulary = tokenizer.get_vocab()
    return ", ".join(f"`{name}`" for name in _STOPS if name in vocabulary) or "none"
