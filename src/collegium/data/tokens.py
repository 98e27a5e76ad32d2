"""Token ids of text, with the number of UTF-8 bytes per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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

    def __len__(self) -> int:
        return self.ids.shape[0]

    def part(self, span: slice) -> Encoded:
        """Return some of the tokens. The first one has no context to be predicted from."""
        is_target = self.is_target[span].copy()
        is_target[:1] = False
        return Encoded(self.ids[span], is_target, self.num_bytes[span], self.can_split)


def tokenize(texts: Sequence[str], tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the ids (L,) and character offsets (L, 2) of each text, without special tokens."""
    if not texts:
        return []
    # Not verbose: a text may exceed the model's length, since it is split into windows later.
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
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
    return np.concatenate([[0], np.cumsum(size)])
