"""Windows of `max_length` tokens, packed or padded, and their collator.

A text that does not fit the rest of a window continues in the next one. The continuation repeats
the last token of the previous piece as context, never as a target, so packing, padding and any
`max_length` give the same targets.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from collegium.data.tokens import Encoded
from collegium.errors import DataError
from collegium.types import IGNORE, Batch, domain_number, teacher_number

_COLUMNS = ("input_ids", "labels", "position_ids", "sample_ids", "attention_mask", "num_bytes")


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of a document."""

    document: int
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
        encoded: Sequence[Encoded],
        *,
        max_length: int,
        packing: bool = True,
        domains: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
        pad_token_id: int = 0,
        order_seed: int | None = None,
        teachers: Sequence[str | None] = (),
        stops: Iterable[int] = (),
    ) -> None:
        """Lay documents out in windows, in order. `order_seed` then shuffles the windows.

        `domains` and `names` have one entry per document, as does `teachers` if any names one.
        Raises ValueError if an unsplittable document is longer than `max_length`.
        """
        domains = ["default"] * len(encoded) if domains is None else domains
        windows = _pack(encoded, max_length, packing=packing)
        if order_seed is not None:
            windows = [windows[i] for i in np.argsort(_splitmix64(len(windows), order_seed))]
        lengths = [
            max_length if packing else sum(p.stop - p.start for p in window) for window in windows
        ]
        self._starts = np.cumsum([0, *lengths])
        self._columns = _build_columns(encoded, windows, self._starts, pad_token_id)
        pieces = [(p.document, p.start, p.stop) for window in windows for p in window]
        self._pieces = np.array(pieces, np.int64)
        self._piece_starts = np.cumsum([0, *map(len, windows)])
        self.domains = sorted(set(domains))
        """Domain names."""
        index = {name: number for number, name in enumerate(self.domains)}
        self.sample_domains = np.array([index[name] for name in domains], np.int64)
        """(documents,) index into `domains`."""
        # An extra last entry, so that index -1 (padding) reads 0.
        self._domain_numbers = np.array([*map(domain_number, domains), 0], np.int64)
        self.sample_names = [str(i) for i in range(len(encoded))] if names is None else list(names)
        """Id of each document."""
        self.sample_teachers = list(teachers) if any(name is not None for name in teachers) else []
        """Teacher named by each document or None. Empty if no document names one."""
        named = [0 if name is None else teacher_number(name) for name in self.sample_teachers]
        self._teacher_numbers = np.array([*named, 0], np.int64)
        is_document = self._columns["sample_ids"] >= 0
        self.num_tokens = int((is_document & ~self._columns["is_repeat"]).sum())
        """Document tokens, without padding and repeated context."""
        self.stops = sorted(stops)
        """Ids of the tokens that end documents and turns."""
        self.num_target_tokens = int(self._columns["is_target"].sum())
        self.fingerprint = self._hash()
        """SHA-256 hex digest of everything that a model sees."""

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest window."""
        return int(np.diff(self._starts).max(initial=0))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(len(self))[index]
        window = slice(self._starts[index], self._starts[index + 1])
        column = {name: values[window] for name, values in self._columns.items()}
        names = ("input_ids", "position_ids", "sample_ids", "num_bytes")
        arrays = {name: column[name] for name in names}
        arrays["labels"] = np.where(column["is_target"], column["input_ids"], IGNORE)
        arrays["domain_ids"] = self._domain_numbers[column["sample_ids"]]
        if self.sample_teachers:
            arrays["teacher_ids"] = self._teacher_numbers[column["sample_ids"]]
        return {name: torch.from_numpy(a.astype(np.int64)) for name, a in arrays.items()}

    def pieces(self, index: int) -> list[Piece]:
        """Return the document pieces of a window in order, without padding."""
        span = slice(self._piece_starts[index], self._piece_starts[index + 1])
        return [Piece(*row) for row in self._pieces[span].tolist()]

    def documents(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids and the mask of the targets of each document, in order."""
        parts: list[tuple[int, int, slice]] = []
        for window, offset in enumerate(self._starts[:-1].tolist()):
            for piece in self.pieces(window):
                # The first token of a later piece repeats the last one of the piece before.
                skipped, size = int(piece.start > 0), piece.stop - piece.start
                span = slice(offset + skipped, offset + size)
                parts.append((piece.document, piece.start, span))
                offset += size
        spans: list[list[slice]] = [[] for _ in self.sample_names]
        for document, _, span in sorted(parts, key=lambda part: part[:2]):
            spans[document].append(span)
        ids, is_target = self._columns["input_ids"], self._columns["is_target"]
        return [
            (np.concatenate([ids[s] for s in of]), np.concatenate([is_target[s] for s in of]))
            for of in spans
        ]

    def renumbered(self, new_ids_V: np.ndarray) -> PackedDataset:
        """Return the same windows with the new id of each token, (V,) by old id."""
        changed = copy.copy(self)
        ids = new_ids_V[self._columns["input_ids"]].astype(np.int32)
        changed._columns = {**self._columns, "input_ids": ids}
        changed.stops = sorted(new_ids_V[self.stops].tolist())
        changed.fingerprint = changed._hash()
        return changed

    def token_ids(self) -> set[int]:
        """Return the ids that occur in documents."""
        is_document = self._columns["sample_ids"] >= 0
        return {*np.unique(self._columns["input_ids"][is_document]).tolist()}

    def targets_per_window(self) -> np.ndarray:
        """Return the number of target tokens per window, (windows,)."""
        return np.add.reduceat(self._columns["is_target"].astype(np.int64), self._starts[:-1])

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._columns):
            digest.update(name.encode())
            digest.update(self._columns[name].tobytes())
        digest.update(self._starts.astype(np.int64).tobytes())
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
        rows = [_complete_item(item, number) for number, item in enumerate(items)]
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE, "sample_ids": -1}
        columns = {
            name: pad_sequence(
                [row[name] for row in rows], batch_first=True, padding_value=fill.get(name, 0)
            )
            for name in rows[0]
            if all(name in row for row in rows)
        }
        # Given a mask, the batch separates documents and padding by positions.
        batch = Batch.from_inputs(columns)
        del columns["attention_mask"]
        separated = {"position_ids": batch.position_ids, "sample_ids": batch.sample_ids}
        return {**columns, **separated, "labels": batch.labels}


def _complete_item(item: dict[str, object], number: int) -> dict[str, torch.Tensor]:
    if missing := {"input_ids", "labels"} - {*item}:
        raise DataError(
            f"batch item {number}: `{min(missing)}` is missing (has: {', '.join(item)}); must "
            "have `input_ids` and `labels`"
        )
    names = (*_COLUMNS, "domain_ids", "teacher_ids")
    row = {n: torch.as_tensor(item[n], dtype=torch.int64) for n in names if n in item}
    size = len(row["input_ids"])
    row.setdefault("position_ids", torch.arange(size))
    row.setdefault("sample_ids", torch.full((size,), number))
    row.setdefault("attention_mask", torch.ones(size, dtype=torch.int64))
    if ragged := [name for name, values in row.items() if values.shape != (size,)]:
        raise DataError(
            f"batch item {number}: `{ragged[0]}` has shape {tuple(row[ragged[0]].shape)}; "
            f"must be ({size},) like `input_ids`"
        )
    row["attention_mask"] = row["attention_mask"].masked_fill(row["sample_ids"] < 0, 0)
    return row


def _pack(encoded: Sequence[Encoded], max_length: int, *, packing: bool) -> list[list[Piece]]:
    if max_length < 2:
        raise ValueError(f"max_length: got {max_length}; must be at least 2")
    windows: list[list[Piece]] = []
    room = 0
    for number, document in enumerate(encoded):
        size, start = len(document), 0
        if not document.can_split and size > max_length:
            raise ValueError(
                f"document {number}: got {size} tokens; must be at most max_length = {max_length}, "
                "because it may not be split"
            )
        while True:
            # A piece of one token has no target: its first token is context only.
            if room < (min(2, size) if document.can_split else size):
                windows.append([])
                room = max_length
            stop = min(size, start + room)
            windows[-1].append(Piece(number, start, stop))
            room = room - (stop - start) if packing else 0
            if stop == size:
                break
            start = stop - 1
    return windows


def _build_columns(
    encoded: Sequence[Encoded], windows: Sequence[Sequence[Piece]], starts: np.ndarray, pad_id: int
) -> dict[str, np.ndarray]:
    total = starts[-1]
    columns = {
        "input_ids": np.full(total, pad_id, np.int32),
        "position_ids": np.zeros(total, np.int32),
        "sample_ids": np.full(total, -1, np.int32),
        "num_bytes": np.zeros(total, np.int32),
        "is_target": np.zeros(total, bool),
        "is_repeat": np.zeros(total, bool),
    }
    for window, offset, end in zip(windows, starts[:-1], starts[1:], strict=True):
        for piece in window:
            document = encoded[piece.document].part(slice(piece.start, piece.stop))
            to = slice(offset, offset + len(document))
            columns["input_ids"][to] = document.ids
            columns["position_ids"][to] = np.arange(len(document))
            columns["sample_ids"][to] = piece.document
            columns["num_bytes"][to] = document.num_bytes
            columns["is_target"][to] = document.is_target
            # The bytes of a repeated token were counted in the previous piece.
            if piece.start:
                columns["num_bytes"][offset] = 0
                columns["is_repeat"][offset] = True
            offset = to.stop
        columns["position_ids"][offset:end] = np.arange(end - offset)
    return columns


def _splitmix64(count: int, seed: int) -> np.ndarray:
    """Return (count,) pseudo-random uint64, the same on every machine and version.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014
    (SplitMix64).
    """
    # NumPy's generators may change their streams: https://numpy.org/neps/nep-0019-rng-policy.html
    # Overflow is intended: the arithmetic is modulo 2^64.
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64)
        z += np.uint64(seed % 2**64) * np.uint64(count + 1)
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
