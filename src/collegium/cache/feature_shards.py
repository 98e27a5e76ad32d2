"""One shard of hidden states: a Parquet file with one row per piece of a document.

Columns: the keys of the target shards (`document`, `offset`, `window`), and for each tap two lists, in order of text: `TAP.codes`,
int8, R per target, and `TAP.scales`, float32, one per target (see `features`).

Shapes: n targets of a piece, R rank.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collegium.cache.shards import KEYS, PieceKey

GROUP_TARGETS = 1024
"""Targets per row group: what one random access decodes."""
_NOTE = b"collegium"


@dataclass(frozen=True, slots=True)
class PieceFeatures:
    """The hidden states of one piece, by tap: (n, R) int8 codes and (n,) float32 scales."""

    key: PieceKey
    taps: Mapping[str, tuple[np.ndarray, np.ndarray]]

    def __len__(self) -> int:
        return len(next(iter(self.taps.values()))[1])


def feature_schema(taps: Sequence[str]) -> pa.Schema:
    """The columns of a shard; nothing in them may be null."""

    def list_of(name: str, kind: pa.DataType) -> pa.Field:
        return pa.field(name, pa.list_(pa.field("element", kind, nullable=False)), nullable=False)

    keys = [
        pa.field("document", pa.uint64(), nullable=False),
        pa.field("offset", pa.uint32(), nullable=False),
        pa.field("window", pa.binary(16), nullable=False),
    ]
    columns = []
    for tap in taps:
        columns += [list_of(f"{tap}.codes", pa.int8()), list_of(f"{tap}.scales", pa.float32())]
    return pa.schema([*keys, *columns])


def feature_shard_bytes(
    pieces: Sequence[PieceFeatures], taps: Sequence[str], *, note: Mapping[str, Any]
) -> memoryview:
    """A whole Parquet file: the same bytes for the same pieces."""
    columns = feature_schema(taps)
    metadata = {_NOTE: json.dumps(note, sort_keys=True).encode("utf-8")}
    buffer = io.BytesIO()
    writer = pq.ParquetWriter(
        buffer,
        columns.with_metadata(metadata),
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    with writer:
        for group in _groups(pieces):
            writer.write_table(_table(group, columns))
    return buffer.getbuffer()


def read_feature_group(
    file: pq.ParquetFile, group: int, taps: Sequence[str]
) -> list[PieceFeatures]:
    """The pieces of one row group.

    Raises:
        OSError: a page fails its checksum, or cannot be read.
        ValueError: a column is not what `feature_shard_bytes` writes.
    """
    table = file.read_row_group(group, use_threads=False)
    keys = zip(*(table.column(name).to_pylist() for name in KEYS), strict=True)
    parts: list[dict[str, tuple[np.ndarray, np.ndarray]]] = [{} for _ in range(len(table))]
    for tap in taps:
        codes = _lists(table, f"{tap}.codes")
        for place, (codes_x, scale_n) in enumerate(
            zip(codes, _lists(table, f"{tap}.scales"), strict=True)
        ):
            if not len(scale_n) or len(codes_x) % len(scale_n):
                raise ValueError(
                    f"column `{tap}.codes` has {len(codes_x)} values for {len(scale_n)} targets"
                )
            parts[place][tap] = codes_x.reshape(len(scale_n), -1), scale_n
    return [PieceFeatures(PieceKey(*key), part) for key, part in zip(keys, parts, strict=True)]


def _groups(pieces: Sequence[PieceFeatures]) -> list[list[PieceFeatures]]:
    groups: list[list[PieceFeatures]] = []
    room = 0
    for piece in pieces:
        if room <= 0:
            groups.append([])
            room = GROUP_TARGETS
        groups[-1].append(piece)
        room -= len(piece)
    return groups


def _table(pieces: Sequence[PieceFeatures], columns: pa.Schema) -> pa.Table:
    arrays = []
    for field in columns:
        if field.name in KEYS:
            arrays.append(
                pa.array([getattr(piece.key, field.name) for piece in pieces], field.type)
            )
            continue
        tap, _, kind = field.name.rpartition(".")
        found = [piece.taps[tap][kind == "scales"].reshape(-1) for piece in pieces]
        starts = np.cumsum([0, *(len(part) for part in found)]).astype(np.int32)
        values = pa.array(np.concatenate(found), field.type.value_type)
        arrays.append(pa.ListArray.from_arrays(pa.array(starts), values, type=field.type))
    return pa.Table.from_arrays(arrays, schema=columns)


def _lists(table: pa.Table, name: str) -> list[np.ndarray]:
    array = table.column(name).combine_chunks()
    starts = array.offsets.to_numpy()
    values = array.values.to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in pairwise(starts)]
