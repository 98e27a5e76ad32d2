"""One shard of a cache: a Parquet file with one row per piece of a document, as any Parquet reader opens it.

Columns: `document` uint64, hash of the document's id; `offset` uint32, where the piece begins in it, in tokens; `window`
16 bytes, hash of the piece's tokens and of which of them are targets; and lists, one item per target in order of text:
`sizes` (entries of the target), `log_tail` (top k alone), the scalars of the layout. The lists of entries are those of all
targets of the piece one after the other: `token_gaps` and `counts` of draws, in a per-teacher cache also `levels`, their
log-probabilities; `tokens` and `steps` of top k (see `codec`).
A piece of L tokens that are all trained on has exactly L - 1 targets: the first is never one.

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
    from_gaps,
    id_dtype,
    to_gaps,
    uint_for,
)
from collegium.cache.layout import Layout

GROUP_TARGETS = 4096
"""Targets per row group: what one random access decodes."""
KEYS = ("document", "offset", "window")
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

    ids, targets = id_dtype(vocab_size), layout.targets
    if isinstance(targets, Samples):
        count = uint_for(targets.draws)
        own = [list_of("sizes", count), list_of("token_gaps", ids), list_of("counts", count)]
        own += [list_of("levels", np.uint16)] if layout.has_levels else []
    else:
        sizes = list_of("sizes", uint_for(targets.k))
        own = [sizes, list_of("tokens", ids), list_of("steps", np.uint16)]
        own.append(list_of("log_tail", np.float32))
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
        use_dictionary=False,
        # Puts the bytes of one order together: high bytes of small numbers cost next to nothing.
        use_byte_stream_split=lists,  # pyright: ignore[reportArgumentType]
        write_statistics=False,
        write_page_checksum=True,
    )
    with writer:
        for group in _groups(pieces):
            writer.write_table(_table(group, layout, columns))
    return buffer.getbuffer()


def read_identity(path: Path) -> Any:
    """What a shard says of the cache that it belongs to, or None where it says nothing.

    Raises:
        OSError: no Parquet file, or one cut short.
        ValueError: the note is damaged.
    """
    note = (pq.read_schema(path).metadata or {}).get(_IDENTITY)
    return None if note is None else json.loads(note)


def read_group(file: pq.ParquetFile, group: int, layout: Layout) -> tuple[EncodedRows, np.ndarray]:
    """One row group: the targets of its pieces one after the other, and (pieces + 1,) where each piece begins.

    Raises:
        OSError: a page fails its checksum, or cannot be read.
        ValueError: a column is not what `shard_bytes` writes.
    """
    table = file.read_row_group(group, use_threads=False)
    lists = {name: _flat(table, name) for name in table.column_names if name not in KEYS}
    sizes, starts = lists["sizes"]
    if isinstance(layout.targets, Samples):
        ids, values, tail = from_gaps(lists["token_gaps"][0], sizes), lists["counts"][0], None
    else:
        ids, values, tail = lists["tokens"][0], lists["steps"][0], lists["log_tail"][0]
    scalars = {name: lists[name][0] for name in layout.scalars}
    for name, values_n in [*scalars.items(), *([] if tail is None else [("log_tail", tail)])]:
        if len(values_n) != len(sizes):
            raise ValueError(f"column `{name}` has {len(values_n)} values for {len(sizes)} targets")
    levels = lists["levels"][0] if layout.has_levels else None
    return EncodedRows(sizes, ids, values, tail, scalars, levels), starts


def read_keys(file: pq.ParquetFile) -> list[list[PieceKey]]:
    """The keys of the pieces of each row group."""
    found = []
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=list(KEYS), use_threads=False)
        columns = (table.column(name).to_pylist() for name in KEYS)
        found.append([PieceKey(*key) for key in zip(*columns, strict=True)])
    return found


def _groups(pieces: Sequence[PieceTargets]) -> list[list[PieceTargets]]:
    groups: list[list[PieceTargets]] = []
    room = 0
    for piece in pieces:
        if room <= 0:
            groups.append([])
            room = GROUP_TARGETS
        groups[-1].append(piece)
        room -= len(piece.rows.sizes)
    return groups


def _table(pieces: Sequence[PieceTargets], layout: Layout, columns: pa.Schema) -> pa.Table:
    rows = [piece.rows for piece in pieces]
    lists: dict[str, list[Any]]
    if isinstance(layout.targets, Samples):
        ids = {"token_gaps": [to_gaps(r.ids, r.sizes) for r in rows]}
        lists = {**ids, "counts": [r.values for r in rows]}
    else:
        ids = {"tokens": [r.ids for r in rows], "steps": [r.values for r in rows]}
        lists = {**ids, "log_tail": [r.log_tail for r in rows]}
    if layout.has_levels:
        lists["levels"] = [r.levels for r in rows]
    lists["sizes"] = [r.sizes for r in rows]
    lists |= {name: [r.scalars[name] for r in rows] for name in layout.scalars}
    keys = {name: [getattr(piece.key, name) for piece in pieces] for name in KEYS}
    arrays = [
        _list_array(lists[field.name], field.type)
        if field.name in lists
        else pa.array(keys[field.name], field.type)
        for field in columns
    ]
    return pa.Table.from_arrays(arrays, schema=columns)


def _list_array(parts: Sequence[Any], kind: pa.ListType) -> pa.Array:
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
    values = pa.array(np.concatenate(parts), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(starts), values, type=kind)


def _flat(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a column of lists, and where each list begins."""
    array = table.column(name).combine_chunks()
    starts = array.offsets.to_numpy()
    return array.values.to_numpy(zero_copy_only=False), starts
