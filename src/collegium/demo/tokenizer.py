"""Byte-level BPE tokenizer of the demo, trained on a balanced mixture of its domains."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

END = "<|endoftext|>"
PAD = "<|pad|>"
CHARACTERS_PER_DOMAIN = 1_000_000


def train_tokenizer(corpora: Sequence[Path], folder: Path, *, vocab_size: int) -> None:
    """Train a tokenizer and save it as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        # All 256 bytes, so that any text can be encoded without an unknown token.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpora), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.save_pretrained(folder)


def _texts(corpora: Sequence[Path]) -> Iterator[str]:
    for path in corpora:
        # The same budget for every domain, so that no domain dominates the merges.
        left = CHARACTERS_PER_DOMAIN
        with path.open(encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                yield text[:left]
                left -= len(text)
                if left <= 0:
                    break
