"""Windows of tokens: documents laid out in rows of `max_length`, and the collator that makes batches of them.

A text that does not fit into what is left of a window goes on in the next one. The continuation repeats the last
token of the piece before as context, never as a target, so that packing, padding and any `max_length` give the
same targets.
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
    """Tokens [start, stop) of a document; None is padding of that length."""

    document: int | None
    start: int
    stop: int


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Windows of tokens, each a dict of 1-D int64 tensors.

    `input_ids`; `position_ids`, from 0 in every piece of a document and in the padding; `labels`, not shifted: the
    token's id where it is a target, `IGNORE` elsewhere; `sample_ids`, the number of the document in this data set,
    -1 in padding; `domain_ids`, `domain_number` of its domain, 0 in padding; `num_bytes`, UTF-8 bytes of text behind
    each token, counted once per document. Where a document names its teacher, also `teacher_ids`: `teacher_number` of that, 0 in
    padding and for the documents that name none.
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
        """Names of the domains."""
        self.sample_domains = sample_domains
        """(documents,) index into `domains`."""
        numbers = np.array([domain_number(name) for name in domains], np.int64)
        # One more entry, so that sample -1, which is padding, finds 0.
        self._domain_numbers = np.append(numbers[sample_domains], 0)
        self.sample_names = sample_names
        """Id of each document."""
        self.sample_teachers = list(sample_teachers)
        """The teacher that each document names, None for none; empty where no document does."""
        named = [0 if name is None else teacher_number(name) for name in sample_teachers]
        self._teacher_numbers = np.array([*named, 0], np.int64)
        pieces = [piece for window in windows for piece in window if piece.document is not None]
        self._pieces = np.array([(p.document, p.start, p.stop) for p in pieces], np.int64)
        counts = [sum(piece.document is not None for piece in window) for window in windows]
        self._piece_starts = np.cumsum([0, *counts])
        is_document = columns["sample_ids"] >= 0
        self.num_tokens = int((is_document & ~columns["is_repeat"]).sum())
        """Tokens of the documents, without padding and repeated context."""
        self.num_target_tokens = int(columns["is_target"].sum())
        self.fingerprint = self._hash()
        """SHA-256, in hex, of everything a model would see."""

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
        """Lay documents out in windows, in their order; `order_seed` then puts the windows in a random order.

        `domains` and `names` hold one entry per document, and so does `teachers` where any names one.

        Raises:
            ValueError: a document that may not be split is longer than `max_length`.
        """
        domains = ["default"] * len(encoded) if domains is None else domains
        names = [str(i) for i in range(len(encoded))] if names is None else names
        windows = (_pack if packing else _pad)(encoded, max_length)
        if order_seed is not None:
            windows = [windows[i] for i in np.argsort(_mix(len(windows), order_seed))]
        known = sorted(set(domains))
        index = {name: number for number, name in enumerate(known)}
        return cls(
            _columns(encoded, windows, pad_token_id),
            np.cumsum([0, *(sum(p.stop - p.start for p in window) for window in windows)]),
            domains=known,
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
        """The stretches of documents in a window, in order; padding is none."""
        span = slice(self._piece_starts[index], self._piece_starts[index + 1])
        return [Piece(*row) for row in self._pieces[span].tolist()]

    def targets_per_window(self) -> np.ndarray:
        """(windows,) number of target tokens."""
        return np.add.reduceat(self._columns["is_target"].astype(np.int64), self._starts[:-1])

    def require_windows(self, num_windows: int, *, where: str) -> None:
        """Say so if one step needs more windows than there are.

        Raises:
            DataError: fewer than `num_windows` windows.
        """
        if len(self) < num_windows:
            raise DataError(
                f"{where}: {len(self)} windows, one step needs {num_windows}; must fill one step; "
                "give more data, or lower the batch size or `max_length`"
            )

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._columns):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self._columns[name]).tobytes())
        digest.update(np.ascontiguousarray(self._starts.astype(np.int64)).tobytes())
        digest.update(self.sample_domains.tobytes())
        digest.update("\0".join(self.domains).encode())
        if self.sample_teachers:
            digest.update(self._teacher_numbers.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Collator:
    """Makes a batch of (B, T) tensors out of windows, or of ordinary Hugging Face items.

    Rows are padded on the right to the longest. Padding, ours or what an `attention_mask` of 0 marks, has label
    `IGNORE`, sample -1 and positions that restart at 0, so it counts as one more document.
    """

    pad_token_id: int = 0

    def __call__(self, items: Sequence[dict[str, object]]) -> dict[str, torch.Tensor]:
        """(T_i,) tensors or lists per item -> (B, T) int64 tensors.

        Raises:
            DataError: an item has no `input_ids` or no `labels`, or columns of unequal length.
        """
        rows = [_row(item, number) for number, item in enumerate(items)]
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
            tail_starts_at = 0
            if size and row["sample_ids"][-1] < 0:
                tail_starts_at = int(row["position_ids"][-1]) + 1
            batch["position_ids"][number, size:] = torch.arange(length - size) + tail_starts_at
        return batch


def _row(item: dict[str, object], number: int) -> dict[str, torch.Tensor]:
    missing = [name for name in ("input_ids", "labels") if name not in item]
    if missing:
        raise DataError(
            f"item {number} of a batch: `{missing[0]}` is missing (has: {', '.join(item)}); must have "
            "`input_ids` and `labels`"
        )
    names = ("input_ids", "labels", "position_ids", "sample_ids", "domain_ids", "num_bytes")
    names = (*names, "teacher_ids", "attention_mask")
    row = {n: torch.as_tensor(item[n], dtype=torch.int64) for n in names if n in item}
    size = len(row["input_ids"])
    if ragged := [name for name, values in row.items() if values.shape != (size,)]:
        raise DataError(
            f"item {number} of a batch: `{ragged[0]}` has shape {tuple(row[ragged[0]].shape)}; must be "
            f"({size},) like `input_ids`"
        )
    is_padding = row.pop("attention_mask", torch.ones(size)) == 0
    if "sample_ids" in row:
        is_padding |= row["sample_ids"] < 0
    samples = row.get("sample_ids", torch.full((size,), number))
    positions = _restart(row.get("position_ids", torch.arange(size)), is_padding)
    row["position_ids"] = positions
    row["sample_ids"] = samples.masked_fill(is_padding, -1)
    row["labels"] = row["labels"].masked_fill(is_padding | (positions == 0), IGNORE)
    return row


def _restart(positions: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
    """Let positions begin at 0 in every run of padding and in every run of tokens."""
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


def _pad(encoded: Sequence[Encoded], max_length: int) -> list[list[Piece]]:
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
            f"document {number}: {len(document)} tokens; must be at most max_length = {max_length}, "
            "because it may not be split"
        )


def _columns(
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
    at = 0
    for window in windows:
        for piece in window:
            size = piece.stop - piece.start
            to = slice(at, at + size)
            at += size
            columns["position_ids"][to] = np.arange(size)
            if piece.document is None:
                continue
            document = encoded[piece.document]
            columns["input_ids"][to] = document.ids[piece.start : piece.stop]
            columns["sample_ids"][to] = piece.document
            columns["num_bytes"][to] = document.num_bytes[piece.start : piece.stop]
            columns["is_target"][to] = document.is_target[piece.start : piece.stop]
            columns["is_target"][to.start] = False
            if piece.start:
                columns["num_bytes"][to.start] = 0
                columns["is_repeat"][to.start] = True
    return columns


def _mix(count: int, seed: int) -> np.ndarray:
    """(count,) pseudo-random uint64, the same on every machine and version.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014 (SplitMix64).
    """
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed % 2**64) * np.uint64(
            count + 1
        )
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
