"""Windows of `max_length` tokens, packed or padded, read by index.

A text that does not fit the rest of a window continues in the next one. The continuation repeats
the last token of the previous piece as context, never as a target, so packing, padding and any
`max_length` give the same targets.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from collegium.data.layout import (
    DOCUMENT,
    WINDOW,
    DatasetFacts,
    Layout,
    chunks_of,
    window_order,
    window_starts,
)
from collegium.data.shards import TOKEN, token_records
from collegium.data.tokens import Encoded
from collegium.storage.arrays import ArrayWriter, RecordArray, gather
from collegium.storage.files import write_text
from collegium.types import IGNORE, domain_number, teacher_number

_HASHED = {
    "input_ids": np.int32,
    "is_repeat": np.bool_,
    "is_target": np.bool_,
    "num_bytes": np.int32,
    "position_ids": np.int32,
    "sample_ids": np.int32,
}
"""Columns of the fingerprint, in its order."""
_OF_TOKENS = ("input_ids", "is_target", "num_bytes")
_BLOCK_TOKENS = 2**20
"""Tokens whose columns are in memory at once while a dataset is measured."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, stop) of a document."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The pieces of some windows, in order."""

    numbers: np.ndarray
    """(pieces,) number of the document in the dataset."""
    documents: np.ndarray
    """(pieces,) records of `DOCUMENT`."""
    starts: np.ndarray
    stops: np.ndarray
    """(pieces,) tokens of the documents."""
    ends: np.ndarray
    """(windows,) number of pieces up to the end of each window."""


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """Windows of tokens, each a dict of 1-D int64 tensors, read when they are asked for.

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
        used = [*dict.fromkeys(name for name in teachers if name is not None)]
        documents = np.zeros(len(encoded), DOCUMENT)
        sizes = [len(one) for one in encoded]
        documents["document"] = np.arange(len(encoded))
        documents["offset"] = np.cumsum([0, *sizes])[:-1]
        documents["size"] = sizes
        places = {name: number for number, name in enumerate(sorted(set(domains)))}
        documents["domain"] = [places[name] for name in domains]
        if used:
            documents["teacher"] = [
                0 if name is None else used.index(name) + 1 for name in teachers
            ]
        lengths = ((len(one), one.can_split) for one in encoded)
        starts = np.array([*window_starts(lengths, max_length, packing=packing)], WINDOW)
        order = window_order(len(starts) - 1, order_seed)
        self._use(
            Layout(
                np.concatenate([np.zeros(0, TOKEN), *map(token_records, encoded)]),
                documents, starts, order,
                [str(i) for i in range(len(encoded))] if names is None else list(names),
                sorted(set(domains)), used, sorted(stops), max_length, packing, pad_token_id,
            )
        )  # fmt: skip

    @classmethod
    def of(
        cls,
        layout: Layout,
        facts: DatasetFacts | None = None,
        columns: tuple[RecordArray, RecordArray] | None = None,
    ) -> PackedDataset:
        """Open a layout, with its facts and measured columns if they were measured before."""
        dataset = cls.__new__(cls)
        dataset._use(layout, facts, columns)
        return dataset

    def _use(
        self,
        layout: Layout,
        facts: DatasetFacts | None = None,
        columns: tuple[RecordArray, RecordArray] | None = None,
    ) -> None:
        self.layout = layout
        self.domains = list(layout.domains)
        """Domain names."""
        self.sample_names = layout.names
        """Id of each document."""
        self.stops = sorted(layout.stops)
        """Ids of the tokens that end documents and turns."""
        self._new_ids_V: np.ndarray | None = None
        # An extra last entry, so that padding reads 0.
        self._domain_numbers = np.array([*map(domain_number, layout.domains), 0], np.int64)
        self._teacher_numbers = np.array([0, *map(teacher_number, layout.teachers)], np.int64)
        if facts is None or columns is None:
            counts, ids = ArrayWriter(np.int64), ArrayWriter(np.int64)
            facts = self.measure(counts, ids)
            columns = counts.finish(), ids.finish()
        self.facts = facts
        self._counts, self._ids = columns

    def __len__(self) -> int:
        return len(self.layout.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        column, _ = self._columns([range(len(self))[index]])
        names = ("input_ids", "position_ids", "sample_ids", "num_bytes", "domain_ids")
        arrays = {name: column[name] for name in names}
        arrays["labels"] = np.where(column["is_target"], column["input_ids"], IGNORE)
        if self.layout.teachers:
            arrays["teacher_ids"] = column["teacher_ids"]
        return {name: torch.from_numpy(a.astype(np.int64)) for name, a in arrays.items()}

    @property
    def ids(self) -> np.ndarray:
        """(U,) the ids that occur in documents, in increasing order."""
        return self._ids[:]

    @property
    def num_tokens(self) -> int:
        """Document tokens, without padding and repeated context."""
        return self.facts.num_tokens

    @property
    def num_target_tokens(self) -> int:
        """Targets of all windows."""
        return self.facts.num_target_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest window."""
        return self.facts.longest

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 hex digest of everything that a model sees."""
        if self._new_ids_V is None:
            return self.facts.fingerprint
        # Of renumbered tokens: measured once, and kept beside the layout, which all splits share.
        parts = self.facts.fingerprint.encode() + self._new_ids_V.astype(np.int64).tobytes()
        key = hashlib.sha256(parts).hexdigest()[:16]
        folder = self.layout.folder
        file = None if folder is None else folder / f"fingerprint-{key}.txt"
        if file is not None and file.is_file():
            return file.read_text(encoding="utf-8").strip()
        digest = self.measure(ArrayWriter(np.int64), ArrayWriter(np.int64)).fingerprint
        if file is not None:
            write_text(file, digest + "\n")
        return digest

    @cached_property
    def sample_domains(self) -> np.ndarray:
        """(documents,) int64 index into `domains`."""
        return self._document_column("domain")

    @property
    def names_digest(self) -> str:
        """SHA-256 hex digest of the ids of the documents."""
        return self.facts.names_digest

    def teacher_of(self, document: int) -> str | None:
        """Return the teacher that a document names, or None."""
        number = int(self.layout.documents[document : document + 1]["teacher"][0])
        return self.layout.teachers[number - 1] if number else None

    def pieces(self, index: int) -> list[Piece]:
        """Return the document pieces of a window in order, without padding."""
        pieces = self._pieces([index])
        columns = (pieces.numbers, pieces.starts, pieces.stops)
        return [Piece(*span) for span in zip(*(c.tolist() for c in columns), strict=True)]

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the ids and the mask of the targets of each document, in order."""
        for number in range(len(self.layout.documents)):
            row = self.layout.documents[number : number + 1][0]
            tokens = self.layout.tokens[int(row["offset"]) : int(row["offset"] + row["size"])]
            yield self._renumber(tokens["id"].astype(np.int32)), tokens["is_target"]

    def renumbered(self, new_ids_V: np.ndarray) -> PackedDataset:
        """Return the same windows with the new id of each token, (V,) by old id."""
        changed = copy.copy(self)
        changed.__dict__.pop("fingerprint", None)
        changed._new_ids_V = new_ids_V
        changed._ids = np.unique(new_ids_V[self._ids[:]])
        changed.stops = sorted(new_ids_V[self.stops].tolist())
        return changed

    def token_ids(self) -> set[int]:
        """Return the ids that occur in documents."""
        return {*self._ids[:].tolist()}

    def targets_per_window(self) -> np.ndarray:
        """Return the number of target tokens per window, (windows,)."""
        return self._counts[:].astype(np.int64)

    def measure(self, counts: ArrayWriter, ids: ArrayWriter) -> DatasetFacts:
        """Measure all windows. Writes the targets of each window into `counts`, and the used ids.

        The fingerprint is the digest of one column of all windows after the other.
        """
        digest = hashlib.sha256()
        used_V = np.zeros(0, bool)
        per_block = max(1, _BLOCK_TOKENS // self.layout.max_length)
        # A small dataset is read once, a large one in a pass for each column.
        whole = [*self._blocks(per_block, _HASHED)] if len(self) <= per_block else None
        num_targets, lengths = 0, list[np.ndarray]()
        for name, dtype in _HASHED.items():
            digest.update(name.encode())
            for columns, sizes in whole or self._blocks(per_block, [name]):
                digest.update(columns[name].astype(dtype).tobytes())
                if name == "input_ids":
                    lengths.append(sizes)
                    used_V = _marked(used_V, columns[name][columns["sample_ids"] >= 0])
                elif name == "is_target":
                    starts = np.cumsum([0, *sizes[:-1]])
                    counts.append(np.add.reduceat(columns[name].astype(np.int64), starts))
                    num_targets += int(columns[name].sum())
        ids.append(np.flatnonzero(used_V))
        sizes = np.concatenate([np.zeros(0, np.int64), *lengths])
        digest.update(np.cumsum([0, *sizes]).astype(np.int64).tobytes())
        num_tokens = self._hash_documents(digest)
        longest = int(sizes.max(initial=0))
        names = hashlib.sha256()
        for number, name in enumerate(self.sample_names):
            names.update(("\0" * (number > 0) + name).encode("utf-8"))
        return DatasetFacts(digest.hexdigest(), num_tokens, num_targets, longest, names.hexdigest())

    def _hash_documents(self, digest: Any) -> int:
        """Add domains and teachers to the fingerprint, and return the tokens of all documents."""
        num_tokens = 0
        for rows in chunks_of(self.layout.documents):
            digest.update(rows["domain"].astype(np.int64).tobytes())
            num_tokens += int(rows["size"].sum(dtype=np.int64))
        digest.update("\0".join(self.domains).encode())
        # Only if used, so that data without teachers keeps its fingerprint and its caches.
        if self.layout.teachers:
            for rows in chunks_of(self.layout.documents):
                digest.update(self._teacher_numbers[rows["teacher"]].tobytes())
            digest.update(np.zeros(1, np.int64).tobytes())
        return num_tokens

    def _blocks(
        self, per_block: int, names: Iterable[str]
    ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """Yield columns of consecutive windows, and the length of each window."""
        names = [*names]
        for start in range(0, len(self), per_block):
            yield self._columns(range(start, min(start + per_block, len(self))), names)

    def _pieces(self, indices: Sequence[int]) -> _Pieces:
        layout = self.layout
        spans, parts = list[tuple[int, int, int]](), list[tuple[int, int]]()
        for index in indices:
            place = int(layout.order[index : index + 1][0])
            (first, start), (last, stop) = layout.windows[place : place + 2].tolist()
            spans.append((first, start, stop))
            # The next window repeats the last token of a document that it continues.
            parts.append((first, last + (stop > 0)))
        documents = gather(layout.documents, parts, DOCUMENT)
        firsts, first_starts, last_stops = np.array(spans, np.int64).T
        counts = np.array([stop - start for start, stop in parts], np.int64)
        ends = np.cumsum(counts)
        starts = np.zeros(len(documents), np.int64)
        stops = documents["size"].astype(np.int64)
        starts[ends - counts] = first_starts
        is_cut = last_stops > 0
        stops[ends[is_cut] - 1] = last_stops[is_cut] + 1
        numbers = np.arange(len(documents)) + np.repeat(firsts - (ends - counts), counts)
        return _Pieces(numbers, documents, starts, stops, ends)

    def _columns(
        self, indices: Sequence[int], names: Sequence[str] | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return columns of some windows, one after the other, and the length of each window.

        Tokens are only read for the columns that need them.
        """
        pieces = self._pieces(indices)
        sizes = pieces.stops - pieces.starts
        totals = np.diff(np.cumsum(sizes)[pieces.ends - 1], prepend=0)
        packing, length = self.layout.packing, self.layout.max_length
        lengths = np.full(len(totals), length) if packing else totals
        # The padding of a window is one more piece.
        sizes = np.insert(sizes, pieces.ends, lengths - totals)
        begins = np.cumsum(sizes) - sizes
        is_later = np.insert(pieces.starts > 0, pieces.ends, False)
        is_repeat = np.zeros(int(lengths.sum()), bool)
        is_repeat[begins[is_later]] = True
        samples = np.repeat(np.insert(pieces.numbers, pieces.ends, -1), sizes)
        domains = np.insert(pieces.documents["domain"].astype(np.int64), pieces.ends, -1)
        columns = {
            "position_ids": np.arange(len(samples)) - np.repeat(begins, sizes),
            "sample_ids": samples,
            "is_repeat": is_repeat,
            "domain_ids": np.repeat(self._domain_numbers[domains], sizes),
        }
        if self.layout.teachers:
            teachers = np.insert(pieces.documents["teacher"].astype(np.int64), pieces.ends, 0)
            columns["teacher_ids"] = np.repeat(self._teacher_numbers[teachers], sizes)
        if names is None or not {*_OF_TOKENS}.isdisjoint(names):
            columns |= self._token_columns(pieces, columns)
        return columns, lengths

    def _token_columns(
        self, pieces: _Pieces, columns: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        offsets = pieces.documents["offset"].astype(np.int64)
        starts, stops = (offsets + pieces.starts).tolist(), (offsets + pieces.stops).tolist()
        tokens = gather(self.layout.tokens, [*zip(starts, stops, strict=True)], TOKEN)
        is_token = columns["sample_ids"] >= 0
        ids = np.full(len(is_token), self.layout.pad_token_id, np.int32)
        num_bytes, is_target = np.zeros(len(ids), np.int32), np.zeros(len(ids), bool)
        ids[is_token], num_bytes[is_token] = tokens["id"], tokens["num_bytes"]
        is_target[is_token] = tokens["is_target"]
        # The first token of a piece has no context, and the bytes of a repeated token were counted
        # in the previous piece.
        is_target[columns["position_ids"] == 0] = False
        num_bytes[columns["is_repeat"]] = 0
        return {"input_ids": self._renumber(ids), "num_bytes": num_bytes, "is_target": is_target}

    def _renumber(self, ids: np.ndarray) -> np.ndarray:
        return ids if self._new_ids_V is None else self._new_ids_V[ids].astype(np.int32)

    def _document_column(self, name: str) -> np.ndarray:
        parts = [rows[name].astype(np.int64) for rows in chunks_of(self.layout.documents)]
        return np.concatenate([np.zeros(0, np.int64), *parts])


def _marked(used_V: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return which ids occur, (V,) bool, V the largest id so far + 1."""
    missing = int(ids.max(initial=-1)) + 1 - len(used_V)
    if missing > 0:
        used_V = np.append(used_V, np.zeros(missing, bool))
    used_V[ids] = True
    return used_V
