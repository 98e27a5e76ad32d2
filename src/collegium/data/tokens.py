"""Token ids of text, with the number of UTF-8 bytes per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, pairwise
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
    if not texts:
        return []
    # Not verbose: a text may exceed the model's length, since it is split into windows later.
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=quote,
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
