"""Arrays of records in NPY files, written in chunks and read by position.

Read with `pread` instead of a memory map: the pages of a map count as memory of the process, and a
file that shrinks under a map kills the process with SIGBUS, where a short read raises an error.
"""

from __future__ import annotations

import hashlib
import io
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from collegium.errors import DataError
from collegium.storage.files import write_bytes
from collegium.storage.records import FileDigest

ROWS_PER_FILE = 2**18
MAX_OPEN_FILES = 64
"""Open files of one array: far below the 1,024 descriptors that a process may have."""


class RecordArray(Protocol):
    """A one-dimensional array in memory or on disk."""

    def __len__(self) -> int: ...
    def __getitem__(self, span: slice, /) -> np.ndarray: ...


class ArrayFile(FileDigest):
    """A file with rows of an array."""

    name: str
    rows: int


class StoredArray:
    """The rows of several NPY files, in order."""

    def __init__(
        self,
        files: Sequence[Path],
        counts: Sequence[int],
        dtypes: Sequence[np.dtype[Any]],
        dtype: np.dtype[Any],
    ) -> None:
        """Take the rows and the dtype of each file. RecordArray are read as `dtype`."""
        self.dtype = dtype
        self._files = list(files)
        self._dtypes = list(dtypes)
        self._ends = list(accumulate(counts))
        self._open: OrderedDict[int, _File] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, span: slice) -> np.ndarray:
        """Read the rows of a span with step 1, in the dtype of their file.

        Raises DataError if a file ends early.
        """
        start, stop, _ = span.indices(len(self))
        number = bisect_right(self._ends, start)
        if start < stop <= self._ends[number]:
            return self._read(number, start, stop)
        rows = np.empty(max(0, stop - start), self.dtype)
        for at in range(number, len(self._ends)):
            end = min(stop, self._ends[at])
            if start < end:
                rows[len(rows) - (stop - start) :][: end - start] = self._read(at, start, end)
                start = end
        return rows

    def __getstate__(self) -> dict[str, Any]:
        # Descriptors are of one process.
        return {**self.__dict__, "_open": OrderedDict()}

    def _read(self, number: int, start: int, stop: int) -> np.ndarray:
        dtype, file = self._dtypes[number], self._open.get(number)
        begin = self._ends[number - 1] if number else 0
        if file is None:
            num_rows = self._ends[number] - begin
            file = _File(self._files[number], num_rows * dtype.itemsize)
            self._open[number] = file
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)
        size = dtype.itemsize
        return np.frombuffer(file.read((start - begin) * size, (stop - start) * size), dtype)


class _File:
    """An open file whose last `num_bytes` bytes are data."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self._begin = os.fstat(self._descriptor).st_size - num_bytes

    def read(self, start: int, size: int) -> bytes:
        # Large reads may return less than asked for.
        parts, done = [], 0
        while done < size:
            part = os.pread(self._descriptor, size - done, self._begin + start + done)
            if not part:
                raise DataError(
                    f"{self._path}: ends before byte {self._begin + start + size:,}; must be "
                    "complete; run the same command again, which writes it again"
                )
            parts.append(part)
            done += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        os.close(self._descriptor)


def gather(array: RecordArray, spans: Sequence[tuple[int, int]], dtype: Any) -> np.ndarray:
    """Return the rows of spans [start, stop), one after the other."""
    # Not `concatenate`, which takes 20 us to compare the fields of records.
    rows = np.empty(sum(stop - start for start, stop in spans), dtype)
    at = 0
    for start, stop in spans:
        rows[at : at + stop - start] = array[start:stop]
        at += stop - start
    return rows


def take(array: RecordArray, indices: np.ndarray, dtype: Any) -> np.ndarray:
    """Return the rows of some indices."""
    if isinstance(array, np.ndarray):
        return array[indices]
    return gather(array, [(index, index + 1) for index in indices.tolist()], dtype)


def npy_bytes(rows: np.ndarray) -> bytes:
    """Return the content of an NPY file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, rows, allow_pickle=False)
    return buffer.getvalue()


class ArrayWriter:
    """Collects rows in memory, or writes them into the files NAME-00000.npy of a folder."""

    def __init__(self, dtype: Any, folder: Path | None = None, name: str = "") -> None:
        self._dtype = np.dtype(dtype)
        self._folder, self._name = folder, name
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self.files: list[ArrayFile] = []
        """The files that were written."""

    def append(self, rows: np.ndarray) -> None:
        """Add rows."""
        self._pending.append(rows)
        self._num_pending += len(rows)
        while self._folder is not None and self._num_pending >= ROWS_PER_FILE:
            self._write(ROWS_PER_FILE)

    def finish(self) -> RecordArray:
        """Return all rows."""
        if self._folder is None:
            return self._joined()
        if self._num_pending or not self.files:
            self._write(self._num_pending)
        return stored(self._folder, self.files, self._dtype)

    def _joined(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, self._dtype), *self._pending])

    def _write(self, count: int) -> None:
        assert self._folder is not None
        rows = self._joined()
        name = f"{self._name}-{len(self.files):05}.npy"
        data = npy_bytes(rows[:count])
        write_bytes(self._folder / name, data)
        sha256 = hashlib.sha256(data).hexdigest()
        self.files.append(ArrayFile(name=name, rows=count, bytes=len(data), sha256=sha256))
        self._pending, self._num_pending = [rows[count:]], len(rows) - count


def stored(folder: Path, files: Sequence[ArrayFile], dtype: Any) -> StoredArray:
    """Open the files that a writer has written."""
    dtype = np.dtype(dtype)
    paths, counts = [folder / file.name for file in files], [file.rows for file in files]
    return StoredArray(paths, counts, [dtype] * len(files), dtype)
