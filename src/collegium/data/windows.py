"""Windows of `max_length` tokens, packed or padded, and their collator.

A text that does not fit the rest of a window continues in the next one. The continuation repeats
the last token of the previous piece as context, never as a target, so packing, padding and any
`max_length` give the same targets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import Dataset

from collegium.data.encode import Encoded
from collegium.errors import DataError
from collegium.types import IGNORE, domain_number, teacher_number


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of a document, or padding of that length if `document` is None."""

    document: int | None
    start: int
    stop: int


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Windows of tokens, each a dict of 1-D int64 tensors.

    - `input_ids`
    - `position_ids`: restart at 0 in every piece of a document and in the padding
    - `labels`: the token id where it is a target, else `IGNORE` (not shifted)
    - `sample_ids`: index of the document in this dataset, -1 in padding
    - `domain_ids`: `domain_number` of the document's domain, 0 in padding
    - `num_bytes`: UTF-8 bytes of text per token, counted once per document
    - `teacher_ids`: `teacher_number` of the teacher that the document names, 0 in padding or if it
      names none. Absent if no document names a teacher.
    """

    def __init__(
        self,
        columns: dict[str, np.ndarray],
        starts: np.ndarray,
        *,
        domains: list[str],
        sample_domains: np.ndarray,
        sample_names: list[str],
        sample_teachers: Sequence[str | None] = (),
        windows: Sequence[Sequence[Piece]] = (),
    ) -> None:
        self._columns = columns
        self._starts = starts
        self.domains = domains
        """Domain names."""
        self.sample_domains = sample_domains
        """(documents,) index into `domains`."""
        numbers = np.array([domain_number(name) for name in domains], np.int64)
        # An extra last entry, so that index -1 (padding) reads 0.
        self._domain_numbers = np.append(numbers[sample_domains], 0)
        self.sample_names = sample_names
        """Id of each document."""
        self.sample_teachers = list(sample_teachers)
        """Teacher named by each document or None. Empty if no document names one."""
        named = [0 if name is None else teacher_number(name) for name in sample_teachers]
        self._teacher_numbers = np.array([*named, 0], np.int64)
        pieces = [piece for window in windows for piece in window if piece.document is not None]
        self._pieces = np.array([(p.document, p.start, p.stop) for p in pieces], np.int64)
        counts = [sum(piece.document is not None for piece in window) for window in windows]
        self._piece_starts = np.cumsum([0, *counts])
        is_document = columns["sample_ids"] >= 0
        self.num_tokens = int((is_document & ~columns["is_repeat"]).sum())
        """Document tokens, without padding and repeated context."""
        self.num_target_tokens = int(columns["is_target"].sum())
        self.fingerprint = self._hash()
        """SHA-256 hex digest of everything that a model sees."""

    @classmethod
    def from_encoded(
        cls,
        encoded: Sequence[Encoded],
        *,
        max_length: int,
        packing: bool = True,
        domains: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        pad_token_id: int = 0,
        order_seed: int | None = None,
        teachers: Sequence[str | None] = (),
    ) -> PackedDataset:
        """Lay documents out in windows, in order; `order_seed` then shuffles the windows.

        `domains` and `names` have one entry per document, as does `teachers` if any names one.

        Raises:
            ValueError: an unsplittable document is longer than `max_length`.
        """
        domains = ["default"] * len(encoded) if domains is None else domains
        names = [str(i) for i in range(len(encoded))] if names is None else names
        windows = (_pack if packing else _one_per_window)(encoded, max_length)
        if order_seed is not None:
            windows = [windows[i] for i in np.argsort(_splitmix64(len(windows), order_seed))]
        unique_domains = sorted(set(domains))
        index = {name: number for number, name in enumerate(unique_domains)}
        return cls(
            _build_columns(encoded, windows, pad_token_id),
            np.cumsum([0, *(sum(p.stop - p.start for p in window) for window in windows)]),
            domains=unique_domains,
            sample_domains=np.array([index[name] for name in domains], np.int64),
            sample_names=list(names),
            sample_teachers=teachers if any(name is not None for name in teachers) else (),
            windows=windows,
        )

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        index %= len(self)
        window = slice(self._starts[index], self._starts[index + 1])
        column = {name: values[window] for name, values in self._columns.items()}
        labels = np.where(column["is_target"], column["input_ids"], IGNORE)
        arrays = {name: column[name] for name in ("input_ids", "position_ids", "sample_ids")}
        arrays |= {"labels": labels, "num_bytes": column["num_bytes"]}
        arrays["domain_ids"] = self._domain_numbers[column["sample_ids"]]
        if self.sample_teachers:
            arrays["teacher_ids"] = self._teacher_numbers[column["sample_ids"]]
        return {name: torch.from_numpy(a.astype(np.int64)) for name, a in arrays.items()}

    def pieces(self, index: int) -> list[Piece]:
        """Return the document pieces of a window in order, without padding."""
        span = slice(self._piece_starts[index], self._piece_starts[index + 1])
        return [Piece(*row) for row in self._pieces[span].tolist()]

    def targets_per_window(self) -> np.ndarray:
        """Return the number of target tokens per window, (windows,)."""
        return np.add.reduceat(self._columns["is_target"].astype(np.int64), self._starts[:-1])

    def require_windows(self, num_windows: int, *, where: str) -> None:
        """Check that there are enough windows for one step.

        Raises:
            DataError: fewer than `num_windows` windows.
        """
        if len(self) < num_windows:
            raise DataError(
                f"{where}: got {len(self)} windows; must have at least {num_windows} for one step; "
                "add data, or lower the batch size or `max_length`"
            )

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._columns):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self._columns[name]).tobytes())
        digest.update(np.ascontiguousarray(self._starts.astype(np.int64)).tobytes())
        digest.update(self.sample_domains.tobytes())
        digest.update("\0".join(self.domains).encode())
        # Only if used, so that data without teachers keeps its fingerprint and its caches.
        if self.sample_teachers:
            digest.update(self._teacher_numbers.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Collator:
    """Collator of windows, or of ordinary Hugging Face items, into (B, T) tensors.

    Rows are padded on the right to the longest. Padding, added here or marked by an
    `attention_mask` of 0, has label `IGNORE`, sample -1 and positions that restart at 0, so it
    counts as one more document.
    """

    # No attention mask is returned: models of transformers 5 keep documents apart by the restarts
    # of `position_ids` (checked when a model is loaded).

    pad_token_id: int = 0

    def __call__(self, items: Sequence[dict[str, object]]) -> dict[str, torch.Tensor]:
        """Collate items of (T_i,) tensors or lists into (B, T) int64 tensors.

        Raises:
            DataError: an item has no `input_ids` or no `labels`, or columns of unequal length.
        """
        rows = [_normalize_item(item, number) for number, item in enumerate(items)]
        length = max(len(row["input_ids"]) for row in rows)
        names = [name for name in rows[0] if all(name in row for row in rows)]
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE, "sample_ids": -1}
        batch = {
            name: torch.full((len(rows), length), fill.get(name, 0), dtype=torch.int64)
            for name in names
        }
        for number, row in enumerate(rows):
            size = len(row["input_ids"])
            for name in names:
                batch[name][number, :size] = row[name]
            # Padding added here continues the positions of the row's own padding, if any.
            tail_starts_at = 0
            if size and row["sample_ids"][-1] < 0:
                tail_starts_at = int(row["position_ids"][-1]) + 1
            batch["position_ids"][number, size:] = torch.arange(length - size) + tail_starts_at
        return batch


def _normalize_item(item: dict[str, object], number: int) -> dict[str, torch.Tensor]:
    missing = [name for name in ("input_ids", "labels") if name not in item]
    if missing:
        raise DataError(
            f"batch item {number}: `{missing[0]}` is missing (has: {', '.join(item)}); must "
            "have `input_ids` and `labels`"
        )
    names = ("input_ids", "labels", "position_ids", "sample_ids", "domain_ids", "num_bytes")
    names = (*names, "teacher_ids", "attention_mask")
    row = {n: torch.as_tensor(item[n], dtype=torch.int64) for n in names if n in item}
    size = len(row["input_ids"])
    if ragged := [name for name, values in row.items() if values.shape != (size,)]:
        raise DataError(
            f"batch item {number}: `{ragged[0]}` has shape {tuple(row[ragged[0]].shape)}; "
            f"must be ({size},) like `input_ids`"
        )
    is_padding = row.pop("attention_mask", torch.ones(size)) == 0
    if "sample_ids" in row:
        is_padding |= row["sample_ids"] < 0
    samples = row.get("sample_ids", torch.full((size,), number))
    positions = _restart_positions(row.get("position_ids", torch.arange(size)), is_padding)
    row["position_ids"] = positions
    row["sample_ids"] = samples.masked_fill(is_padding, -1)
    # The first token of a document is context only, whatever label the item gives it.
    row["labels"] = row["labels"].masked_fill(is_padding | (positions == 0), IGNORE)
    return row


def _restart_positions(positions: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
    """Restart positions at 0 in every run of padding and of tokens."""
    positions = positions.clone()
    edges = (is_padding[1:] != is_padding[:-1]).nonzero()[:, 0] + 1
    bounds = [0, *edges.tolist(), len(positions)]
    for start, stop in pairwise(bounds):
        run = positions[start:stop]
        if not len(run):
            continue
        if is_padding[start]:
            run.copy_(torch.arange(stop - start))
            continue
        # After left padding, for example, a run starts at a later position.
        zeros = (run == 0).nonzero()
        first = int(zeros[0]) if len(zeros) else len(run)
        run[:first] -= run[0].clone()
    return positions


def _pack(encoded: Sequence[Encoded], max_length: int) -> list[list[Piece]]:
    windows: list[list[Piece]] = []
    room = 0

    def open_window() -> None:
        nonlocal room
        if windows and room:
            windows[-1].append(Piece(None, 0, room))
        windows.append([])
        room = max_length

    for number, document in enumerate(encoded):
        size, start = len(document), 0
        _check_size(document, number, max_length)
        while True:
            # A piece of one token has no target: its first token is context only.
            needed = min(2, size) if document.can_split else size
            if room < needed:
                open_window()
            stop = min(size, start + room)
            windows[-1].append(Piece(number, start, stop))
            room -= stop - start
            if stop == size:
                break
            start = stop - 1
    if windows and room:
        windows[-1].append(Piece(None, 0, room))
    return windows


def _one_per_window(encoded: Sequence[Encoded], max_length: int) -> list[list[Piece]]:
    windows: list[list[Piece]] = []
    for number, document in enumerate(encoded):
        size, start = len(document), 0
        _check_size(document, number, max_length)
        while True:
            stop = min(size, start + max_length)
            windows.append([Piece(number, start, stop)])
            if stop == size:
                break
            start = stop - 1
    return windows


def _check_size(document: Encoded, number: int, max_length: int) -> None:
    if max_length < 2:
        raise ValueError(f"max_length: got {max_length}; must be at least 2")
    if not document.can_split and len(document) > max_length:
        raise ValueError(
            f"document {number}: {len(document)} tokens; must be at most max_length = "
            f"{max_length}, because it may not be split"
        )


def _build_columns(
    encoded: Sequence[Encoded], windows: list[list[Piece]], pad_token_id: int
) -> dict[str, np.ndarray]:
    total = sum(piece.stop - piece.start for window in windows for piece in window)
    columns = {
        "input_ids": np.full(total, pad_token_id, np.int32),
        "position_ids": np.zeros(total, np.int32),
        "sample_ids": np.full(total, -1, np.int32),
        "num_bytes": np.zeros(total, np.int32),
        "is_target": np.zeros(total, bool),
        "is_repeat": np.zeros(total, bool),
    }
    offset = 0
    for window in windows:
        for piece in window:
            size = piece.stop - piece.start
            to = slice(offset, offset + size)
            offset += size
            columns["position_ids"][to] = np.arange(size)
            if piece.document is None:
                continue
            document = encoded[piece.document]
            columns["input_ids"][to] = document.ids[piece.start : piece.stop]
            columns["sample_ids"][to] = piece.document
            columns["num_bytes"][to] = document.num_bytes[piece.start : piece.stop]
            columns["is_target"][to] = document.is_target[piece.start : piece.stop]
            # The first token of a piece is context; bytes of a repeated one were counted before.
            columns["is_target"][to.start] = False
            if piece.start:
                columns["num_bytes"][to.start] = 0
                columns["is_repeat"][to.start] = True
    return columns


def _splitmix64(count: int, seed: int) -> np.ndarray:
    """Return (count,) pseudo-random uint64, the same on every machine and version.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014
    (SplitMix64).
    """
    # NumPy's generators may change their streams: https://numpy.org/neps/nep-0019-rng-policy.html
    # Overflow is intended: the arithmetic is modulo 2^64.
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed % 2**64) * np.uint64(
            count + 1
        )
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
