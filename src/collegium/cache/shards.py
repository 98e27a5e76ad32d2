"""One shard of a cache: a Parquet file with one row per piece of a document, as any Parquet reader opens it.

docs/cache-format.md describes the columns for readers without us. A piece of L tokens that are all trained on has exactly
L - 1 targets: the first token is never one. The lists of a piece hold its targets in order of text, or the entries of all its
targets one after the other; `ranks` says how tokens and log-probabilities become small numbers.

Shapes: n targets, E entries.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collegium.cache.codec import (
    EncodedRows,
    Samples,
    TopK,
    id_dtype,
    join_encoded,
    uint_for,
)
from collegium.cache.layout import Layout
from collegium.cache.token_ranks import (
    from_gaps,
    from_heights,
    ranks_of,
    rising_order,
    to_gaps,
    to_heights,
    tokens_of,
    vocabulary_of,
)

GROUP_TARGETS = 4096
"""Targets per row group: what one random access decodes."""
KEYS = ("document", "offset", "window")
VOCABULARY = "vocabulary"
ZSTD_LEVEL = 9
_IDENTITY = b"collegium"


@dataclass(frozen=True, slots=True)
class PieceKey:
    """Which stretch of which document, in which exact context."""

    document: int
    """`document_hash` of the document's id."""
    offset: int
    """Tokens of the document before the piece."""
    window: bytes
    """`window_hash` of the piece."""


@dataclass(frozen=True, slots=True)
class PieceTargets:
    """The targets of one piece."""

    key: PieceKey
    rows: EncodedRows


def document_hash(name: str) -> int:
    """64 bits of a document's id."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")


def window_hash(ids: np.ndarray, is_target: np.ndarray) -> bytes:
    """128 bits of the (L,) tokens that a teacher saw and of which of them it was asked for."""
    digest = hashlib.blake2b(np.ascontiguousarray(ids, "<i8").tobytes(), digest_size=16)
    digest.update(np.ascontiguousarray(is_target, bool).tobytes())
    return digest.digest()


def schema(layout: Layout, vocab_size: int) -> pa.Schema:
    """The columns of a shard; nothing in them may be null."""

    def list_of(name: str, dtype: Any) -> pa.Field:
        item = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
        return pa.field(name, pa.list_(item), nullable=False)

    targets = layout.targets
    own = [list_of(VOCABULARY, id_dtype(vocab_size)), list_of("gaps", id_dtype(vocab_size))]
    if isinstance(targets, Samples):
        count = uint_for(targets.draws)
        own += [list_of("sizes", count), list_of("counts", count)]
    else:
        own += [list_of("sizes", uint_for(targets.k)), list_of("log_tail", np.float32)]
    if layout.has_levels or isinstance(targets, TopK):
        own += [list_of("heights", np.uint16), list_of("floor", np.uint16)]
    keys = [
        pa.field("document", pa.uint64(), nullable=False),
        pa.field("offset", pa.uint32(), nullable=False),
        pa.field("window", pa.binary(16), nullable=False),
    ]
    return pa.schema([*keys, *own, *(list_of(name, np.float16) for name in layout.scalars)])


def shard_bytes(
    pieces: Sequence[PieceTargets],
    layout: Layout,
    vocab_size: int,
    *,
    identity: Mapping[str, Any],
) -> memoryview:
    """A whole Parquet file: the same bytes for the same pieces."""
    columns = schema(layout, vocab_size)
    note = {_IDENTITY: json.dumps(identity, sort_keys=True).encode("utf-8")}
    lists = [f"{field.name}.list.element" for field in columns if pa.types.is_list(field.type)]
    buffer = io.BytesIO()
    writer = pq.ParquetWriter(
        buffer,
        columns.with_metadata(note),
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=False,
        # Puts the bytes of one order together: high bytes of small numbers cost next to nothing.
        use_byte_stream_split=lists,  # pyright: ignore[reportArgumentType]
        write_statistics=False,
        write_page_checksum=True,
    )
    table = _columns(pieces, layout, vocab_size)
    with writer:
        for group in _groups(pieces):
            writer.write_table(_group_table(pieces, group, table, columns))
    return buffer.getbuffer()


def read_identity(path: Path) -> Any:
    """What a shard says of the cache that it belongs to, or None where it says nothing.

    Raises:
        OSError: no Parquet file, or one cut short.
        ValueError: the note is damaged.
    """
    note = (pq.read_schema(path).metadata or {}).get(_IDENTITY)
    return None if note is None else json.loads(note)


def read_vocabulary(file: pq.ParquetFile) -> np.ndarray:
    """The ids that occur in a shard, by rank.

    Raises:
        OSError: a page fails its checksum, or cannot be read.
    """
    if not file.num_row_groups:
        return np.zeros(0, np.uint16)
    words, starts = _flat(
        file.read_row_group(0, columns=[VOCABULARY], use_threads=False), VOCABULARY
    )
    return words[: starts[1]]


def read_group(
    file: pq.ParquetFile, group: int, layout: Layout, vocabulary: np.ndarray
) -> tuple[EncodedRows, np.ndarray]:
    """One row group: the targets of its pieces one after the other, and (pieces + 1,) where each piece begins.

    Raises:
        OSError: a page fails its checksum, or cannot be read.
        ValueError: a column is not what `shard_bytes` writes.
    """
    names = [name for name in file.schema_arrow.names if name not in (*KEYS, VOCABULARY)]
    table = file.read_row_group(group, columns=names, use_threads=False)
    lists = {name: _flat(table, name) for name in names}
    sizes, starts = lists["sizes"]
    entries = {"gaps", "counts", "heights"}
    wanted = {name: int(sizes.sum()) if name in entries else len(sizes) for name in names}
    for name, (values, _) in lists.items():
        if len(values) != wanted[name]:
            raise ValueError(f"column `{name}` has {len(values)} values instead of {wanted[name]}")
    if len(sizes) and not sizes.all():
        raise ValueError("an empty row")
    ids = tokens_of(from_gaps(lists["gaps"][0], sizes), vocabulary)
    scalars = {name: lists[name][0] for name in layout.scalars}
    levels = None
    if "heights" in lists:
        levels = from_heights(lists["heights"][0], lists["floor"][0], sizes)
    if isinstance(layout.targets, Samples):
        return EncodedRows(sizes, ids, lists["counts"][0], None, scalars, levels), starts
    if levels is None:
        raise ValueError("column `heights` is missing")
    return EncodedRows(sizes, ids, levels, lists["log_tail"][0], scalars), starts


def read_keys(file: pq.ParquetFile) -> list[list[PieceKey]]:
    """The keys of the pieces of each row group."""
    found = []
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=list(KEYS), use_threads=False)
        columns = (table.column(name).to_pylist() for name in KEYS)
        found.append([PieceKey(*key) for key in zip(*columns, strict=True)])
    return found


def _starts(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """(m,) counts -> (m + 1,) int64: where each begins, and the end."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)


def _groups(pieces: Sequence[PieceTargets]) -> list[range]:
    """Pieces cut into runs of at least `GROUP_TARGETS` targets; the last may be short."""
    groups: list[range] = []
    start = filled = 0
    for number, piece in enumerate(pieces):
        filled += len(piece.rows.sizes)
        if filled >= GROUP_TARGETS:
            groups.append(range(start, number + 1))
            start, filled = number + 1, 0
    return [*groups, range(start, len(pieces))] if start < len(pieces) else groups


@dataclass(frozen=True, slots=True)
class _Columns:
    """The lists of a shard, those of all pieces one after the other."""

    vocabulary: np.ndarray
    values: dict[str, np.ndarray]
    """By the name of the column."""
    starts: dict[str, np.ndarray]
    """(pieces + 1,) where each piece begins in it."""


def _columns(pieces: Sequence[PieceTargets], layout: Layout, vocab_size: int) -> _Columns:
    rows = join_encoded([piece.rows for piece in pieces])
    vocabulary = vocabulary_of(rows.ids, vocab_size)
    ranks = ranks_of(rows.ids, vocabulary, vocab_size)
    order = rising_order(ranks, rows.sizes)
    entries = {"gaps": to_gaps(ranks[order], rows.sizes)}
    per_row = {"sizes": rows.sizes, **rows.scalars}
    levels = rows.levels
    if isinstance(layout.targets, Samples):
        entries["counts"] = rows.values[order]
    else:
        assert rows.log_tail is not None
        per_row["log_tail"] = rows.log_tail
        levels = rows.values
    if levels is not None:
        entries["heights"], per_row["floor"] = to_heights(levels[order], rows.sizes)
    piece_at = _starts([len(piece.rows.sizes) for piece in pieces])
    entry_at = _starts(rows.sizes)[piece_at]
    starts = {name: piece_at for name in per_row} | {name: entry_at for name in entries}
    return _Columns(vocabulary, per_row | entries, starts)


def _group_table(
    pieces: Sequence[PieceTargets], group: range, found: _Columns, columns: pa.Schema
) -> pa.Table:
    span = slice(group.start, group.stop + 1)
    arrays = []
    for name, kind in zip(columns.names, columns.types, strict=True):
        if name in KEYS:
            keys = [getattr(pieces[number].key, name) for number in group]
            arrays.append(pa.array(keys, kind))
        elif name == VOCABULARY:
            sizes = [len(found.vocabulary) if number == 0 else 0 for number in group]
            arrays.append(_list_array(found.vocabulary, _starts(sizes), kind))
        else:
            arrays.append(_list_array(found.values[name], found.starts[name][span], kind))
    return pa.Table.from_arrays(arrays, schema=columns)


def _list_array(values: np.ndarray, starts: np.ndarray, kind: pa.ListType) -> pa.Array:
    """Lists out of values that stand one after the other; the first may begin behind 0."""
    items = pa.array(values[starts[0] : starts[-1]].astype(kind.value_type.to_pandas_dtype()))
    return pa.ListArray.from_arrays(pa.array((starts - starts[0]).astype(np.int32)), items, kind)


def _flat(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a column of lists, and where each list begins."""
    array = table.column(name).combine_chunks()
    starts = array.offsets.to_numpy()
    return array.values.to_numpy(zero_copy_only=False), starts
