"""Token ids of plain text, with the number of UTF-8 bytes per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Tokens:
    """L tokens: ids (L,) int64, is_target (L,) bool, num_bytes (L,) int64."""

    ids: np.ndarray
    is_target: np.ndarray
    num_bytes: np.ndarray

    @classmethod
    def added(cls, ids: Sequence[int], *, is_target: bool) -> Tokens:
        """Return special tokens, which cover no bytes of the text."""
        return cls(
            np.array(ids, np.int64), np.full(len(ids), is_target), np.zeros(len(ids), np.int64)
        )

    def with_target(self, is_target: bool) -> Tokens:
        """Return a copy with all tokens, or none, marked as targets."""
        return replace(self, is_target=np.full(len(self.ids), is_target))


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """Concatenate tokens in order."""
    return Tokens(
        np.concatenate([p.ids for p in parts]),
        np.concatenate([p.is_target for p in parts]),
        np.concatenate([p.num_bytes for p in parts]),
    )


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[Tokens]:
    """Encode texts without special tokens and without targets."""
    return [
        Tokens(ids, np.zeros(len(ids), bool), bytes_of_tokens(text, offsets[:, 1]))
        for text, (ids, offsets) in zip(texts, encode_offsets(texts, tokenizer), strict=True)
    ]


def encode_offsets(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the ids (L,) and character offsets (L, 2) of each text, without special tokens."""
    if not texts:
        return []
    # Not verbose: a text may exceed the model's length, since it is split into windows later.
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
        truncation=False,
        padding=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    return [
        (np.array(ids, np.int64), np.array(offsets, np.int64).reshape(-1, 2))
        for ids, offsets in pairs
    ]


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
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(size)])
