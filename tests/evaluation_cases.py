"""Small datasets, and teachers with hand-written logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import tiny
from collegium.data.documents import Document
from collegium.data.encode import Encoded, Encoder
from collegium.data.windows import PackedDataset
from collegium.distributions import LIVE, Answer, DenseRows
from collegium.types import Batch, Rows

TEXTS = {
    "prose": ["In the beginning was the word.", "To be, or not to be, that is the question."],
    "code": ["def add(a, b):\n    return a + b\n", "x = 3 € # café\n", "return 数 and 学"],
}


def text_dataset(*, packing: bool = True, max_length: int = 48) -> PackedDataset:
    """Pack five short texts of two domains."""
    documents = [
        Document(id=f"{domain}/{number}", domain=domain, text=text)
        for domain, texts in TEXTS.items()
        for number, text in enumerate(texts)
    ]
    encoder = Encoder(tiny.tiny_tokenizer(), max_length=max_length, where="texts")
    return PackedDataset(
        [one.encoded for one in encoder.encode(documents) if one.encoded is not None],
        max_length=max_length,
        packing=packing,
        domains=[document.domain for document in documents],
    )


def id_dataset(
    documents: Sequence[Sequence[int]], domains: Sequence[str], *, max_length: int = 32
) -> PackedDataset:
    """Pack documents of token ids, two bytes per token."""
    encoded = [
        Encoded(
            np.array(ids, np.int64),
            np.arange(len(ids)) > 0,
            np.full(len(ids), 2, np.int64),
            can_split=True,
        )
        for ids in documents
    ]
    return PackedDataset(encoded, max_length=max_length, domains=domains)


class BigramTeacher:
    """A teacher whose logits depend only on the current token."""

    capabilities = LIVE

    def __init__(self, name: str, logits_VV: Tensor) -> None:
        self.name = name
        self.logits_VV = logits_VV
        self.num_calls = 0

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> Answer:
        self.num_calls += 1
        current_N = batch.input_ids.flatten()[rows.index]
        return Answer(self.name, DenseRows(self.logits_VV[current_N.cpu()]))


def bigram_logits(*, vocab_size: int, step: int, sharpness: float) -> Tensor:
    """Return logits that favor token v + step after token v, uniform over the others."""
    logits_VV = torch.zeros(vocab_size, vocab_size)
    current_V = torch.arange(vocab_size)
    logits_VV[current_V, (current_V + step) % vocab_size] = sharpness
    return logits_VV


def walks(
    *, vocab_size: int, step: int, noise: float, number: int, length: int, seed: int
) -> list[list[int]]:
    """Generate documents in which v + step follows v, or with probability `noise` any token."""
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(number):
        ids = [int(generator.integers(vocab_size))]
        while len(ids) < length:
            is_noise = generator.random() < noise
            ids.append(
                int(generator.integers(vocab_size)) if is_noise else (ids[-1] + step) % vocab_size
            )
        documents.append(ids)
    return documents
