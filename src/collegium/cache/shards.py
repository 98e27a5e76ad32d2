"""One shard of a cache: a Parquet file with one row per piece of a document.

docs/cache-format.md documents the columns for other readers. A piece of L trained tokens has L - 1
targets, because its first token is never one. The lists of a piece hold its targets in text order,
or the concatenated entries of its targets. `token_ranks` defines the encoding of the entries.

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
    build_vocabulary,
    from_gaps,
    from_heights,
    from_ranks,
    rank_order,
    to_gaps,
    to_heights,
    to_ranks,
)

# A row group is the unit of random access: reading one piece decodes all of its group.
GROUP_TARGETS = 4096
"""Minimum targets per row group, except for the last."""
KEYS = ("document", "offset", "window")
VOCABULARY = "vocabulary"
ZSTD_LEVEL = 9
_METADATA_KEY = b"collegium"


@dataclass(frozen=True, slots=True)
class PieceKey:
    """Key of a piece: a span of one document in its exact context."""

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
    """Return a 64-bit hash of a document's id."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")


def window_hash(ids: np.ndarray, is_target: np.ndarray) -> bytes:
    """Return a 128-bit hash of (L,) tokens and of the mask of those that are targets."""
    # A target is valid only in its exact context: repacking or truncation changes the distribution,
    # and a lookup by document and offset would not notice.
    digest = hashlib.blake2b(np.ascontiguousarray(ids, "<i8").tobytes(), digest_size=16)
    digest.update(np.ascontiguousarray(is_target, bool).tobytes())
    return digest.digest()


def schema(layout: Layout, vocab_size: int) -> pa.Schema:
    """Return the columns of a shard, none of them nullable."""

    def list_of(name: str, dtype: Any) -> pa.Field:
        item = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
        return pa.field(name, pa.list_(item), nullable=False)

    targets = layout.targets
    columns = [list_of(VOCABULARY, id_dtype(vocab_size)), list_of("gaps", id_dtype(vocab_size))]
    if isinstance(targets, Samples):
        count = uint_for(targets.draws)
        columns += [list_of("sizes", count), list_of("counts", count)]
    else:
        columns += [list_of("sizes", uint_for(targets.k)), list_of("log_tail", np.float32)]
    if layout.has_levels or isinstance(targets, TopK):
        columns += [list_of("heights", np.uint16), list_of("floor", np.uint16)]
    keys = [
        pa.field("document", pa.uint64(), nullable=False),
        pa.field("offset", pa.uint32(), nullable=False),
        pa.field("window", pa.binary(16), nullable=False),
    ]
    return pa.schema([*keys, *columns, *(list_of(name, np.float16) for name in layout.scalars)])


def shard_bytes(
    pieces: Sequence[PieceTargets],
    layout: Layout,
    vocab_size: int,
    *,
    identity: Mapping[str, Any],
) -> memoryview:
    """Serialize a Parquet file. Equal pieces give equal bytes."""
    columns = schema(layout, vocab_size)
    metadata = {_METADATA_KEY: json.dumps(identity, sort_keys=True).encode("utf-8")}
    lists = [f"{field.name}.list.element" for field in columns if pa.types.is_list(field.type)]
    buffer = io.BytesIO()
    writer = pq.ParquetWriter(
        buffer,
        columns.with_metadata(metadata),
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=False,
        # Groups bytes by significance, so the zero high bytes of small numbers compress away.
        use_byte_stream_split=lists,  # pyright: ignore[reportArgumentType]
        write_statistics=False,
        # Readers verify these, so that damage after `open_cache` cannot return a wrong value.
        write_page_checksum=True,
    )
    table = _columns(pieces, layout, vocab_size)
    with writer:
        for group in _groups(pieces):
            writer.write_table(_group_table(pieces, group, table, columns))
    return buffer.getbuffer()


def read_identity(path: Path) -> Any:
    """Read the identity of a shard's cache from its metadata, or None if it has none.

    Raises:
        OSError: not a Parquet file, or a truncated one.
        ValueError: the metadata is damaged.
    """
    metadata = (pq.read_schema(path).metadata or {}).get(_METADATA_KEY)
    return None if metadata is None else json.loads(metadata)


def read_vocabulary(file: pq.ParquetFile) -> np.ndarray:
    """Read the ids that occur in a shard, by rank.

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
    """Read the targets of a row group, and the (pieces + 1,) row at which each piece starts.

    Raises:
        OSError: a page fails its checksum, or cannot be read.
        ValueError: `shard_bytes` never writes such a column.
    """
    names = [name for name in file.schema_arrow.names if name not in (*KEYS, VOCABULARY)]
    table = file.read_row_group(group, columns=names, use_threads=False)
    lists = {name: _flat(table, name) for name in names}
    sizes, starts = lists["sizes"]
    entries = {"gaps", "counts", "heights"}
    expected = {name: int(sizes.sum()) if name in entries else len(sizes) for name in names}
    for name, (values, _) in lists.items():
        if len(values) != expected[name]:
            raise ValueError(
                f"column `{name}` has {len(values)} values instead of {expected[name]}"
            )
    if len(sizes) and not sizes.all():
        raise ValueError("an empty row")
    ids = from_ranks(from_gaps(lists["gaps"][0], sizes), vocabulary)
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
    """Read the keys of the pieces of each row group."""
    groups = []
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=list(KEYS), use_threads=False)
        columns = (table.column(name).to_pylist() for name in KEYS)
        groups.append([PieceKey(*key) for key in zip(*columns, strict=True)])
    return groups


def _starts(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return (m + 1,) int64 offsets of consecutive runs with (m,) counts."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)


def _groups(pieces: Sequence[PieceTargets]) -> list[range]:
    """Split pieces into runs of at least `GROUP_TARGETS` targets, except for the last."""
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
    """List columns of a shard, concatenated over its pieces."""

    vocabulary: np.ndarray
    values: dict[str, np.ndarray]
    """By column name."""
    starts: dict[str, np.ndarray]
    """(pieces + 1,) offsets of the pieces, by column name."""


def _columns(pieces: Sequence[PieceTargets], layout: Layout, vocab_size: int) -> _Columns:
    rows = join_encoded([piece.rows for piece in pieces])
    vocabulary = build_vocabulary(rows.ids, vocab_size)
    ranks = to_ranks(rows.ids, vocabulary, vocab_size)
    order = rank_order(ranks, rows.sizes)
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
    pieces: Sequence[PieceTargets], group: range, shard: _Columns, columns: pa.Schema
) -> pa.Table:
    span = slice(group.start, group.stop + 1)
    arrays = []
    for name, kind in zip(columns.names, columns.types, strict=True):
        if name in KEYS:
            keys = [getattr(pieces[number].key, name) for number in group]
            arrays.append(pa.array(keys, kind))
        elif name == VOCABULARY:
            # Stored once per shard, in its first row; the lists of all other rows are empty.
            sizes = [len(shard.vocabulary) if number == 0 else 0 for number in group]
            arrays.append(_list_array(shard.vocabulary, _starts(sizes), kind))
        else:
            arrays.append(_list_array(shard.values[name], shard.starts[name][span], kind))
    return pa.Table.from_arrays(arrays, schema=columns)


def _list_array(values: np.ndarray, starts: np.ndarray, kind: pa.ListType) -> pa.Array:
    """Build a list array from concatenated values. The first list may start after 0."""
    items = pa.array(values[starts[0] : starts[-1]].astype(kind.value_type.to_pandas_dtype()))
    return pa.ListArray.from_arrays(pa.array((starts - starts[0]).astype(np.int32)), items, kind)


def _flat(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the concatenated values of a list column and the offset of each list."""
    array = table.column(name).combine_chunks()
    starts = array.offsets.to_numpy()
    return array.values.to_numpy(zero_copy_only=False), starts
