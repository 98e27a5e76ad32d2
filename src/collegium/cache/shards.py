"""One shard of a cache: a Parquet file with one row per piece of a document.

docs/cache-format.md documents the columns for other readers. A piece of L trained tokens has L - 1
targets, because its first token is never one. The lists of a piece hold its targets in text order.
A codec defines the list columns. The columns of the keys are the same in every cache.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from collegium.cache.keys import PieceKey
from collegium.cache.manifest import FORMAT
from collegium.errors import CacheError

KEYS = {"document": pa.uint64(), "offset": pa.uint32(), "window": pa.binary(16)}
"""Columns of the key of a piece, and their types."""
_READ_KEYS = ["document", "window"]
ZSTD_LEVEL = 9
_METADATA_KEY = "collegium"

Columns = Mapping[str, np.ndarray]
"""Values of consecutive targets: one or several for each target, by name."""


@dataclass(frozen=True, slots=True)
class EncodedPiece:
    """The encoded targets of one piece."""

    key: PieceKey
    columns: Columns
    window: int
    """Number of its training window, whose pieces share a row group."""


@dataclass(frozen=True, slots=True)
class ListColumn:
    """A list column of a shard: the concatenated lists, and the start of each."""

    values: np.ndarray
    starts: np.ndarray
    """(pieces + 1,) int64."""


Decoded = TypeVar("Decoded", covariant=True)


class Codec(Protocol[Decoded]):
    """The columns of a cache, and their meaning.

    `unread` are columns that `decode` does not use. `pack` converts the encoded pieces of one shard
    to its list columns, in file order. `unpack` inverts it for the columns that are read, and
    raises ValueError or KeyError for columns that `pack` never writes. `decode` decodes targets of
    any number of shards. `bytes_per_target` estimates their size on disk, in a shard of
    `num_targets`, from some encoded pieces.
    """

    shared: ClassVar[str]
    """The column stored only in the first row of a shard. Empty for none."""
    entries: ClassVar[frozenset[str]]
    """Columns with `sizes` values per target. All others have equally many for each target."""
    group_targets: ClassVar[int]
    """Minimum targets per row group, except for the last. Reading a window decodes its group."""

    @property
    def unread(self) -> frozenset[str]: ...
    def num_targets(self, columns: Columns) -> int: ...
    def pack(self, pieces: Sequence[Columns]) -> Mapping[str, ListColumn]: ...
    def unpack(self, columns: Columns, shared: np.ndarray | None) -> Columns: ...
    def decode(self, columns: Columns) -> Decoded: ...
    def bytes_per_target(self, sample: Sequence[Columns], num_targets: int) -> float: ...


class ShardMetadata(BaseModel):
    """Metadata of a shard. Its extra fields are the identity: shards merge without a manifest."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    format: Literal[2]
    shard: NonNegativeInt
    num_targets: NonNegativeInt
    num_shards: NonNegativeInt
    side_file: str | None = None
    """SHA-256 of the side file."""

    def of_cache(self) -> dict[str, Any]:
        """Return the fields that all shards of a cache share."""
        return self.model_dump(exclude={"shard", "num_targets"}, exclude_unset=True)


def shard_bytes(
    pieces: Sequence[EncodedPiece], codec: Codec[Any], metadata: ShardMetadata
) -> memoryview:
    """Serialize a Parquet file. Equal pieces give equal bytes."""
    columns = codec.pack([piece.columns for piece in pieces])
    schema = pa.schema(
        [
            *(pa.field(name, kind, nullable=False) for name, kind in KEYS.items()),
            *(_list_field(name, column.values.dtype) for name, column in columns.items()),
        ],
        {_METADATA_KEY: json.dumps(metadata.model_dump(exclude_unset=True), sort_keys=True)},
    )
    buffer = io.BytesIO()
    elements: Any = [f"{name}.list.element" for name in columns]  # its stub allows only a bool
    writer = pq.ParquetWriter(
        buffer,
        schema,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=False,
        # Groups bytes by significance, so the zero high bytes of small numbers compress away.
        use_byte_stream_split=elements,
        write_statistics=False,
        # Readers verify these, so that damage after `open_cache` cannot return a wrong value.
        write_page_checksum=True,
    )
    counts = [codec.num_targets(piece.columns) for piece in pieces]
    with writer:
        for group in _row_groups([piece.window for piece in pieces], counts, codec.group_targets):
            keys, span = [pieces[n].key for n in group], slice(group.start, group.stop + 1)
            arrays = [pa.array([getattr(k, name) for k in keys], KEYS[name]) for name in KEYS]
            for name, column in columns.items():
                arrays.append(_list_array(column, span, schema.field(name).type))
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
    return buffer.getbuffer()


def read_metadata(path: Path, number: int) -> ShardMetadata:
    """Read the metadata of a shard. Raises CacheError if the file is none, or not this number."""
    try:
        values = (pq.read_schema(path).metadata or {})[_METADATA_KEY.encode()]
        metadata = ShardMetadata.model_validate_json(values)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise CacheError(
            f"{path}: has no cache metadata; must be a shard of format {FORMAT}; delete it and "
            "build it again"
        ) from error
    if metadata.shard != number:
        raise CacheError(
            f"{path}: holds shard {metadata.shard}; must hold shard {number}; delete it and build "
            "it again"
        )
    return metadata


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group in memory: the keys of its pieces, without offsets, and some list columns."""

    lists: Mapping[str, ListColumn]
    documents: np.ndarray
    windows: np.ndarray
    """(pieces, 2) halves of the hashes of windows, uint64."""

    def has(self, n: int, key: PieceKey) -> bool:
        """Whether piece n has this document and window."""
        return int(self.documents[n]) == key.document and self.windows[n].tobytes() == key.window


def list_names(file: pq.ParquetFile) -> list[str]:
    """Return the names of the list columns, or raise ValueError if another one has another type."""
    schema = file.schema_arrow
    for name, kind in KEYS.items():
        if (got := schema.field(name).type) != kind:
            raise ValueError(f"column `{name}` is {got}")
    names = [name for name in schema.names if name not in KEYS]
    for name in names:
        if not pa.types.is_list(schema.field(name).type):
            raise ValueError(f"column `{name}` is no list")
    return names


def read_group(file: pq.ParquetFile, group: int, names: Collection[str]) -> RowGroup:
    """Read list columns of a row group. Raises OSError for a damaged page, ValueError for a null.

    The types are those that `list_names` has verified.
    """
    # One call for lists and keys: a second one takes a third of the time of a group, 0.2 ms.
    table = file.read_row_group(group, columns=[*names, *_READ_KEYS], use_threads=False)
    columns = {}
    for name in names:
        array = table.column(name).combine_chunks()
        values = array.values.to_numpy(zero_copy_only=False)
        columns[name] = ListColumn(values, array.offsets.to_numpy())
    return RowGroup(columns, *_keys_of(table))


def read_keys(file: pq.ParquetFile, groups: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Read the keys of the pieces of row groups, without their offsets.

    Returns:
        The (pieces,) hashes of documents and the (pieces, 2) halves of those of windows, uint64.
        Raises ValueError for columns of another type.
    """
    list_names(file)
    return _keys_of(file.read_row_groups(list(groups), columns=_READ_KEYS, use_threads=False))


def _keys_of(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    windows = table.column("window").combine_chunks()
    if windows.null_count or table.column("document").null_count:
        raise ValueError("a key is null")
    halves = np.frombuffer(windows.buffers()[1] or b"", "<u8").reshape(-1, 2)
    halves = halves[windows.offset : windows.offset + len(windows)]
    return table.column("document").to_numpy(), halves


def join_columns(parts: Sequence[Columns]) -> dict[str, np.ndarray]:
    """Concatenate the columns of at least one part."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split_columns(
    columns: Columns, counts: Sequence[int], entries: Collection[str]
) -> list[Columns]:
    """Split columns into runs of `counts` targets, which must add up to all of them."""
    target_at = starts_of(counts)
    entry_at = starts_of(columns["sizes"])[target_at] if entries else target_at
    at = {name: entry_at if name in entries else target_at for name in columns}
    return [
        {name: values[at[name][run] : at[name][run + 1]] for name, values in columns.items()}
        for run in range(len(counts))
    ]


def starts_of(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return (m + 1,) int64 offsets of consecutive runs with (m,) counts."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)


def split_runs(counts: Sequence[int], minimum: int) -> list[range]:
    """Split items into runs that count at least `minimum` in total, except for the last."""
    runs: list[range] = []
    start = filled = 0
    for number, count in enumerate(counts):
        filled += count
        if filled >= minimum:
            runs.append(range(start, number + 1))
            start, filled = number + 1, 0
    return [*runs, range(start, len(counts))] if filled else runs


def _row_groups(windows: Sequence[int], counts: Sequence[int], minimum: int) -> list[range]:
    """Split pieces into runs of whole windows with at least `minimum` targets in total."""
    window_at = [n for n, one in enumerate(windows) if n == 0 or one != windows[n - 1]]
    starts = [*window_at, len(windows)]
    sums = [sum(counts[at:end]) for at, end in pairwise(starts)]
    return [range(starts[run.start], starts[run.stop]) for run in split_runs(sums, minimum)]


def _list_field(name: str, dtype: np.dtype) -> pa.Field:
    item = pa.field("element", pa.from_numpy_dtype(dtype), nullable=False)
    return pa.field(name, pa.list_(item), nullable=False)


def _list_array(column: ListColumn, span: slice, kind: pa.DataType) -> pa.Array:
    starts = column.starts[span]
    items = pa.array(column.values[starts[0] : starts[-1]])
    return pa.ListArray.from_arrays(pa.array((starts - starts[0]).astype(np.int32)), items, kind)
