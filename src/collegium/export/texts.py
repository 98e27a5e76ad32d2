"""Held-out text as arrays that a process without this package can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collegium.data.windows import PackedDataset
from collegium.errors import DataError
from collegium.evaluate.scoring import spread_windows

NUM_PROMPTS = 16
PROMPT_TOKENS = 16
NEW_TOKENS = 24
"""Tokens that are generated greedily after each prompt, at most."""


def save_texts(dataset: PackedDataset, max_tokens: int, path: Path) -> None:
    """Write evenly spread windows with about `max_tokens` targets as an NPZ file.

    Each piece of a document is a sequence of its own: `ids`, `labels` (-100 where the token is no
    target) and `num_bytes` hold all of them in order, (tokens,), and `starts` their offsets,
    (pieces + 1,). `prompts` are the first tokens of some of them, (P, T).

    Raises:
        DataError: the windows have no target.
    """
    columns: dict[str, list[NDArray[Any]]] = {"ids": [], "labels": [], "num_bytes": []}
    lengths = [0]
    for index in spread_windows(dataset, max_tokens):
        window, offset = dataset[index], 0
        for piece in dataset.pieces(index):
            span = slice(offset, offset + piece.stop - piece.start)
            offset = span.stop
            lengths.append(span.stop - span.start)
            for name, key in (("ids", "input_ids"), ("labels", "labels"), ("num_bytes",) * 2):
                columns[name].append(window[key][span].numpy())
    arrays = {name: np.concatenate(parts or [np.zeros(0)]) for name, parts in columns.items()}
    if not (arrays["labels"] >= 0).any():
        raise DataError(
            "export: got no target token; must have at least one; use more held-out text"
        )
    starts = np.cumsum(lengths)
    np.savez(
        path, allow_pickle=False, starts=starts, prompts=_prompts(arrays["ids"], starts), **arrays
    )


def _prompts(ids: NDArray[Any], starts: NDArray[Any]) -> NDArray[Any]:
    """Return the first tokens of the longest pieces, of equal length so that no padding is read."""
    longest = sorted(range(len(starts) - 1), key=lambda i: starts[i] - starts[i + 1])
    chosen = longest[:NUM_PROMPTS]
    # Half of a short piece, so that the continuation fits the positions of the student.
    shortest = min(starts[i + 1] - starts[i] for i in chosen)
    size = max(1, min(PROMPT_TOKENS, shortest // 2))
    return np.stack([ids[starts[i] : starts[i] + size] for i in chosen])
