"""From documents to token ids: the only place that decides what is trained on.

- text: every token is a target except the first, and the stop token is appended as a target. A beginning-of-text
  token is put in front only where the tokenizer itself adds one.
- prompt + completion: the completion and the stop token are targets. The two are encoded separately, so that no
  token spans the boundary and the prompt gets the same ids as at inference.
- messages: rendered with the tokenizer's own chat template; the assistant's words and the stop token that ends each
  of its turns are targets.
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
_USUAL_EOS = (
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
    """The tokens of one document of L tokens."""

    ids: np.ndarray
    """(L,) int64."""
    is_target: np.ndarray
    """(L,) bool: the token is trained on; never the first."""
    num_bytes: np.ndarray
    """(L,) int64: UTF-8 bytes of the document's text that the token stands for; 0 for tokens that were added."""
    can_split: bool
    """Whether the document may be cut over windows; a prompt or a chat may not."""

    def __len__(self) -> int:
        return self.ids.shape[0]


class Encoder:
    """Encodes documents with one tokenizer and keeps count of those that could not be used."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_length: int,
        truncate: Truncate = "right",
        where: str = "",
    ) -> None:
        """Look at the tokenizer.

        Raises:
            DataError: the tokenizer has no stop token.
        """
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncate: Truncate = truncate
        self.where = where
        self.num_seen = 0
        self.too_long: list[tuple[str, int]] = []
        """(document, tokens) of every document that may not be cut over windows and is too long."""
        self.untrained: list[str] = []
        """Documents without a target."""
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
        """Encode documents; None where one is dropped for its length or has no target."""
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
        """Judge what was encoded so far.

        Raises:
            DataError: nothing can be learned from any document; or some are too long and `truncate` is `error`.
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
                f"{at(self.where, f'{len(self.untrained):,} samples')} have no token to learn from "
                f"(first: id {self.untrained[0]}); must hold a completion or an assistant turn that "
                "is not cut off; look at the rows, `max_length` and `truncate`"
            )

    def _finish(self, document: Document, tokens: Tokens) -> Encoded | None:
        self.num_seen += 1
        can_split = document.text is not None
        length = len(tokens.ids)
        kept = slice(0, length)
        if not can_split and length > self.max_length:
            self.too_long.append((document.id, length))
            if self.truncate in ("drop", "error"):
                return None
            is_left = self.truncate == "left"
            kept = slice(length - self.max_length, length) if is_left else slice(0, self.max_length)
        is_target = tokens.is_target[kept].copy()
        is_target[:1] = False
        if not is_target.any():
            self.untrained.append(document.id)
            return None
        return Encoded(tokens.ids[kept], is_target, tokens.num_bytes[kept], can_split)


def eos_candidates(tokenizer: PreTrainedTokenizerFast) -> str:
    """The usual names of a stop token that this tokenizer has, for a message."""
    vocabulary = tokenizer.get_vocab()
    return ", ".join(f"`{name}`" for name in _USUAL_EOS if name in vocabulary) or "none"


def encode(
    document: Document,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    truncate: Truncate = "right",
) -> Encoded | None:
    """Encode one document; None where it is dropped for its length.

    A text is never cut here: it goes over as many windows as it needs. `truncate` cuts prompts and chats, after the
    targets were decided.

    Raises:
        DataError: the tokenizer has no stop token or no chat template, a stop token would not be trained on, the
            document is too long and `truncate` is `error`, or it has no token to learn from.
    """
    encoder = Encoder(tokenizer, max_length=max_length, truncate=truncate)
    (encoded,) = encoder.encode([document])
    encoder.check()
    return encoded


def split_of(
    document: Document, *, seed: int, calibration: float, validation: float
) -> Literal["train", "calibration", "validation"]:
    """Which part a document belongs to: a function of its content and the seed alone.

    u = SHA-256(seed, content) in [0, 1); validation where u < validation, calibration where
    u < validation + calibration, train elsewhere. Identical documents always land in the same part.
    """
    share = hash_order(document, seed, "split") / 2**64
    if share < validation:
        return "validation"
    return "calibration" if share < validation + calibration else "train"


def hash_order(document: Document, seed: int, purpose: str) -> int:
    """A number in [0, 2^64) drawn from the content, the seed and what it is for."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{document.content_hash()}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _bos(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    bos = tokenizer.bos_token_id
    first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
    return first if isinstance(bos, int) and first == [bos] else []
