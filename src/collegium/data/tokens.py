"""Token ids of text, with the number of UTF-8 bytes per token."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokens of an encoded document of length L."""

    ids: np.ndarray
    """(L,) int64."""
    is_target: np.ndarray
    """(L,) bool: the token is a target (never the first one)."""
    num_bytes: np.ndarray
    """(L,) int64: UTF-8 bytes of the document's text per token, 0 for added tokens."""
    can_split: bool
    """Whether the document may span several windows. Prompts and chats may not."""
    stops: frozenset[int] = frozenset()
    """Ids of the tokens that end the turns of a chat."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    def part(self, span: slice) -> Encoded:
        """Return some of the tokens. The first one has no context to be predicted from."""
        is_target = self.is_target[span].copy()
        is_target[:1] = False
        return replace(
            self, ids=self.ids[span], is_target=is_target, num_bytes=self.num_bytes[span]
        )


Tokens = tuple[np.ndarray, np.ndarray]
"""Ids (L,) and character offsets (L, 2) of a text."""

# Characters that some tokenizer does not merge with the text after them.
_GUARDS = ("\n", "a", ".", "\t")


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, *, quote: bool = False) -> list[Tokens]:
    """Return the tokens of each text, without added special tokens.

    `quote` encodes special tokens in the text as plain text.
    """
    encodings = _backend(tokenizer, quote).encode_batch(list(texts), add_special_tokens=False)
    return [
        (
            np.array(encoding.ids, np.int64),
            # Half the time of `np.array` of a list of tuples.
            np.fromiter(chain.from_iterable(encoding.offsets), np.int64).reshape(-1, 2),
        )
        for encoding in encodings
    ]


def _backend(tokenizer: Tokenizer, quote: bool) -> Any:
    # Its own batch encoding: that of transformers takes a third longer, and checks the length of
    # texts, which are split into windows later.
    backend: Any = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = quote
    return backend


class TextTokenizer:
    """Tokenizes texts, with the number of UTF-8 bytes per token.

    Offsets take half of the time of a byte-level tokenizer. They follow from the lengths of its
    tokens, as long as these are the bytes of the text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes_V = token_bytes(tokenizer)
        self._is_nfc = json.loads(_backend(tokenizer, False).to_str())["normalizer"] is not None

    def __call__(
        self, texts: Sequence[str], *, quote: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids (L,) and the bytes (L,) of each text, as `bytes_of_tokens` counts them."""
        if self._bytes_V is None:
            return self._by_offsets(texts, quote)
        backend = _backend(self._tokenizer, quote)
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        counted = []
        for text, encoding in zip(texts, encodings, strict=True):
            ids = np.array(encoding.ids, np.int64)
            num_bytes = self._by_lengths(text, self._bytes_V[ids])
            if num_bytes is None:
                ((ids, num_bytes),) = self._by_offsets([text], quote)
            counted.append((ids, num_bytes))
        return counted

    def _by_lengths(self, text: str, lengths: np.ndarray) -> np.ndarray | None:
        """Count the bytes by the lengths of the tokens, None if these are not those of the text."""
        if text.isascii():
            return lengths if lengths.sum() == len(text) else None
        if self._is_nfc and not unicodedata.is_normalized("NFC", text):
            return None
        raw = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        if lengths.sum() != len(raw):
            return None
        # A token that ends inside of a character counts all of it.
        token_ends = np.cumsum(lengths)
        is_inside = (raw & 0xC0) == 0x80
        if not is_inside.take(token_ends[:-1], mode="clip").any():
            return lengths
        ends = np.append(np.flatnonzero(~is_inside), len(raw))
        return np.diff(ends[np.searchsorted(ends, token_ends)], prepend=0)

    def _by_offsets(self, texts: Sequence[str], quote: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        tokens = tokenize(texts, self._tokenizer, quote=quote)
        return [
            (ids, bytes_of_tokens(text, offsets[:, 1]))
            for text, (ids, offsets) in zip(texts, tokens, strict=True)
        ]


def token_bytes(tokenizer: Tokenizer) -> np.ndarray | None:
    """Return the bytes of each token, (V,) int64, if all texts are the bytes of their tokens.

    None for a tokenizer that is not byte-level BPE, or that changes text or trims offsets.
    """
    backend = _backend(tokenizer, False)
    parts = json.loads(backend.to_str())
    model, normalizer, splitter = (parts[key] for key in ("model", "normalizer", "pre_tokenizer"))
    splitters = (splitter or {}).get("pretokenizers", [splitter])
    is_plain = (
        model["type"] == "BPE"
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and (normalizer is None or normalizer["type"] == "NFC")
        and splitters[-1:] != [None]
        and splitters[-1]["type"] == "ByteLevel"
        and all(map(_keeps_text, splitters))
        and '"trim_offsets": true' not in json.dumps(parts["post_processor"])
    )
    vocabulary = backend.get_vocab()
    if not is_plain or not vocabulary.keys() >= {*ByteLevel.alphabet()}:
        return None
    # A character of a byte-level token is a byte.
    bytes_V = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, number in vocabulary.items():
        bytes_V[number] = len(token)
    for number, added in backend.get_added_tokens_decoder().items():
        bytes_V[number] = len(added.content.encode())
    return bytes_V


def _keeps_text(splitter: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer only cuts text."""
    if splitter["type"] == "ByteLevel":
        return not splitter["add_prefix_space"]
    is_split = splitter["type"] == "Split" and splitter["behavior"] != "Removed"
    return is_split or splitter["type"] == "Digits"


def tokenize_after(
    texts: Sequence[str], tokenizer: Tokenizer, *, quote: bool = False
) -> list[Tokens]:
    """Return the tokens of texts that continue another text.

    Same as `tokenize`, without the space that SentencePiece tokenizers put before a text.
    """
    tokens = tokenize(texts, tokenizer, quote=quote)
    if not _adds_space(tokenizer):
        return tokens
    pending = list(range(len(texts)))
    for guard in _GUARDS:
        guarded = tokenize([guard + texts[n] for n in pending], tokenizer, quote=quote)
        shared = []
        for number, (ids, offsets) in zip(pending, guarded, strict=True):
            size = int((offsets[:, 1] <= len(guard)).sum())
            if (offsets[size:, 0] >= len(guard)).all():
                tokens[number] = ids[size:], offsets[size:] - len(guard)
            else:
                shared.append(number)  # a token covers the guard and the text
        pending = shared
    return tokens


def _adds_space(tokenizer: Tokenizer) -> bool:
    (first, _), (later, _) = tokenize(["a", "\na"], tokenizer)
    return later[-len(first) :].tolist() != first.tolist()


def tokenize_quoting(text: str, quoted: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> Tokens:
    """Return the tokens of a text, with its characters [start, end) of `quoted` as plain text."""
    bounds = [0, *chain.from_iterable(sorted(quoted)), len(text)]
    columns = []
    for number, (start, end) in enumerate(pairwise(bounds)):
        encode = tokenize_after if start else tokenize
        if start < end:
            ((ids, offsets),) = encode([text[start:end]], tokenizer, quote=number % 2 == 1)
            columns.append((ids, offsets + start))
    ids, offsets = zip(*columns, strict=True)
    return np.concatenate(ids), np.concatenate(offsets)


def marked(encoded: Encoded, tokenizer: Tokenizer, *, max_tokens: int = 200) -> str:
    """Decode the beginning of a document, with each run of targets in [[ ]]."""
    parts = []
    for is_target, run in groupby(
        zip(encoded.ids[:max_tokens].tolist(), encoded.is_target.tolist(), strict=False),
        key=lambda pair: pair[1],
    ):
        text = tokenizer.decode([number for number, _ in run])
        parts.append(f"[[{text}]]" if is_target else text)
    return repr("".join(parts))[1:-1] + " ..." * (len(encoded) > max_tokens)


def bytes_of_tokens(text: str, ends: np.ndarray) -> np.ndarray:
    """Return the UTF-8 bytes per token (L,), given the end of each token in characters (L,).

    n_i = e_i - e_(i-1), where e_i is the number of bytes before the largest end so far, so that the
    counts sum to the bytes of the text. A character shared by several tokens counts for the first
    of them, uncovered characters count for the next token, and the last token takes the rest.
    """
    if not len(ends):
        return np.zeros(0, np.int64)
    before = _byte_offsets(text)
    # Ends can repeat or go back: tokens share a character under byte fallback, or cover none.
    end_bytes = np.maximum.accumulate(before[ends])
    end_bytes[-1] = before[-1]
    return np.diff(end_bytes, prepend=0)


def _byte_offsets(text: str) -> np.ndarray:
    """Return the number of UTF-8 bytes before each character, (characters + 1,)."""
    if text.isascii():
        return np.arange(len(text) + 1)
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    size = 1 + (code >= 0x80).astype(np.int64) + (code >= 0x800) + (code >= 0x10000)
    return np.concatenate([[0], np.cumsum(size)])
