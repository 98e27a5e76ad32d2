"""Document encoding: the only module that decides which tokens are targets.

- text: all tokens but the first, and an appended stop token. A beginning-of-text token is prepended
  only if the tokenizer adds one itself.
- prompt + completion: the completion and an appended stop token. The two are encoded separately, so
  no token spans the boundary and the prompt gets the same ids as at inference.
- messages: rendered with the tokenizer's chat template. Targets are the assistant's tokens and the
  stop token that ends each of its turns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from collegium.data.chat import encode_chat, probe_template
from collegium.data.readers import Document, at
from collegium.data.tokens import Tokens, concatenate, tokenize
from collegium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Truncate = Literal["right", "left", "drop", "error"]
_COMMON_EOS = (
    "</s>",
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<eos>",
    "<|end|>",
    "<end_of_turn>",
)


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


class Encoder:
    """Document encoder for one tokenizer, with a record of the documents it could not use."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_length: int,
        truncate: Truncate = "right",
        where: str = "",
    ) -> None:
        """Check the tokenizer.

        Raises:
            DataError: it has no stop token.
        """
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncate: Truncate = truncate
        self.where = where
        self.num_seen = 0
        self.too_long: list[tuple[str, int]] = []
        """(id, number of tokens) of every unsplittable document over `max_length`."""
        self.untrained: list[str] = []
        """Ids of the documents without a target."""
        self._has_probed = False
        eos = tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise DataError(
                f"{at(where, 'tokenizer')}: has no eos token; must have one, or the student never "
                f"learns to stop; set eos_token in tokenizer_config.json "
                f"(candidates: {eos_candidates(tokenizer)})"
            )
        self._prefix = Tokens.added(_bos(tokenizer), is_target=False)
        self._eos = Tokens.added([eos], is_target=True)

    def encode(self, documents: Sequence[Document]) -> list[Encoded | None]:
        """Encode documents. None stands for one dropped for its length or without a target."""
        # Probed on first use: a corpus without chats never renders the template.
        if not self._has_probed and any(d.messages is not None for d in documents):
            probe_template(self.tokenizer, where=self.where)
            self._has_probed = True
        pieces = [
            piece
            for d in documents
            for piece in (d.text, d.prompt, d.completion)
            if piece is not None
        ]
        tokens = iter(tokenize(pieces, self.tokenizer))
        encoded = []
        for document in documents:
            if document.messages is not None:
                whole = encode_chat(document, self.tokenizer, where=self.where)
            elif document.text is not None:
                whole = concatenate([self._prefix, next(tokens).with_target(True), self._eos])
            else:
                prompt, completion = next(tokens), next(tokens).with_target(True)
                whole = concatenate([self._prefix, prompt, completion, self._eos])
            encoded.append(self._finish(document, whole))
        return encoded

    def check(self) -> None:
        """Check the documents encoded so far.

        Raises:
            DataError: no document has a target, or some are too long and `truncate` is `error`.
        """
        if self.too_long and self.truncate == "error":
            longest = max(self.too_long, key=lambda pair: pair[1])
            raise DataError(
                f"{at(self.where, f'{len(self.too_long):,} samples')} exceed {self.max_length:,} "
                f"tokens (longest {longest[1]:,}: {longest[0]}); must fit in one window; raise "
                "`max_length` or set `truncate` to right, left or drop"
            )
        if self.untrained and len(self.untrained) == self.num_seen:
            raise DataError(
                f"{at(self.where, f'{len(self.untrained):,} samples')} have no target token "
                f"(first: id {self.untrained[0]}); must have a completion or an assistant turn "
                "that is not truncated; check the rows, `max_length` and `truncate`"
            )

    def _finish(self, document: Document, tokens: Tokens) -> Encoded | None:
        self.num_seen += 1
        can_split = document.text is not None
        length = len(tokens.ids)
        span = slice(0, length)
        if not can_split and length > self.max_length:
            self.too_long.append((document.id, length))
            if self.truncate in ("drop", "error"):
                return None
            is_left = self.truncate == "left"
            # Targets are already decided, so truncation only drops tokens.
            span = slice(length - self.max_length, length) if is_left else slice(0, self.max_length)
        is_target = tokens.is_target[span].copy()
        # The first token has no context to be predicted from.
        is_target[:1] = False
        if not is_target.any():
            self.untrained.append(document.id)
            return None
        return Encoded(tokens.ids[span], is_target, tokens.num_bytes[span], can_split)


def eos_candidates(tokenizer: PreTrainedTokenizerFast) -> str:
    """List the common stop tokens in the vocabulary of this tokenizer, for a message."""
    vocabulary = tokenizer.get_vocab()
    return ", ".join(f"`{name}`" for name in _COMMON_EOS if name in vocabulary) or "none"


def encode(
    document: Document,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    truncate: Truncate = "right",
) -> Encoded | None:
    """Encode one document, or return None if it is dropped for its length.

    Texts are never truncated: they span as many windows as they need. `truncate` applies to prompts
    and chats, after the targets are decided.

    Raises:
        DataError: the tokenizer has no stop token or no chat template, a stop token is not a
            target, the document is too long and `truncate` is `error`, or it has no target.
    """
    encoder = Encoder(tokenizer, max_length=max_length, truncate=truncate)
    (encoded,) = encoder.encode([document])
    encoder.check()
    return encoded


def split_of(
    document: Document, *, seed: int, calibration: float, validation: float
) -> Literal["train", "calibration", "validation"]:
    """Assign a document to a split, as a function of its content and the seed only.

    u = SHA-256(seed, content) in [0, 1). The split is validation if u < validation, calibration if
    u < validation + calibration, else train. Identical documents always get the same split.
    """
    share = seeded_hash(document, seed, "split") / 2**64
    if share < validation:
        return "validation"
    return "calibration" if share < validation + calibration else "train"


def seeded_hash(document: Document, seed: int, purpose: str) -> int:
    """Return a hash in [0, 2^64) of the content, the seed and the purpose."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{document.content_hash()}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _bos(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    bos = tokenizer.bos_token_id
    # A tokenizer may define a bos token and never add it, like GPT-2's.
    first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    return first if isinstance(bos, int) and first == [bos] else []
