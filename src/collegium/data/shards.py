"""Shards of a corpus: the tokens of consecutive documents, in memory or in three files.

shard-00000-tokens.npy     a record per token: id, UTF-8 bytes, whether it is a target
shard-00000-documents.npy  a record of `ROW` per document
shard-00000.json           strings, counts, and the SHA-256 of both files; written last
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from collegium.data.documents import Document
from collegium.data.encode import Encoder, Outcome
from collegium.data.tokens import Encoded
from collegium.storage.arrays import npy_bytes
from collegium.storage.files import sha256_of, write_bytes
from collegium.storage.records import FileDigest, Record
from collegium.storage.seals import write_sealed

SHARD_CHARACTERS = 8_000_000
"""Text of a shard, or a document more: what an interrupted build may lose per process."""
SHARD_DOCUMENTS = 2**17
TOKEN = np.dtype([("id", "<u4"), ("num_bytes", "<u4"), ("is_target", "?")])
"""A token in memory. Files hold the smallest unsigned integers that are wide enough."""
ROW = np.dtype(
    [
        ("content", "V32"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("length", "<u4"),
        ("path", "<u4"),
        ("number", "<i8"),
        ("source", "<u2"),
        ("domain", "<u2"),
        ("teacher", "<u2"),
        ("stops", "<u2"),
        ("notes", "u1"),
        ("can_split", "?"),
    ]
)
"""A document: SHA-256 of its content; place of its tokens in the shard and their number, 0 if it
has none; tokens before it was truncated; file and row of its id, -1 for none; numbers of its
source, and of domain, teacher (from 1, 0 for none) and stop tokens among the strings of the shard;
`Note`s of the encoder."""

SourceDocument = tuple[int, Document]
"""A document and the number of its source."""
Encoders = Callable[[int], Encoder]
"""Returns the encoder of a source."""


class ShardStrings(Record):
    """Strings and sets that the records of a shard refer to by number."""

    paths: Sequence[str] = ()
    domains: Sequence[str] = ()
    teachers: Sequence[str] = ()
    stops: Sequence[Sequence[int]] = ()
    """Sets of stop tokens."""
    errors: Mapping[str, str] = {}
    """Reason by document, for those that are refused."""


class ShardInfo(Record):
    """Sizes and digests of a shard."""

    documents: int
    tokens: int
    id_bytes: int
    count_bytes: int
    """Bytes of the number of UTF-8 bytes of a token."""
    key: str
    """Digest of the documents."""
    files: dict[str, FileDigest]

    @property
    def token_dtype(self) -> np.dtype[np.void]:
        """Record of a token in the file."""
        return token_dtype(self.id_bytes, self.count_bytes)


class ShardFile(Record):
    """Content of the JSON file of a shard."""

    info: ShardInfo
    strings: ShardStrings


@dataclass(frozen=True)
class Shard:
    """Encoded documents."""

    tokens: np.ndarray
    """(tokens,) records with the fields of `TOKEN`."""
    rows: np.ndarray
    """(documents,) records of `ROW`."""
    strings: ShardStrings


def token_dtype(id_bytes: int, count_bytes: int) -> np.dtype[np.void]:
    """Return the record of a token with integers of these sizes."""
    return np.dtype(
        [("id", f"<u{id_bytes}"), ("num_bytes", f"<u{count_bytes}"), ("is_target", "?")]
    )


def token_records(encoded: Encoded) -> np.ndarray:
    """Return the tokens of a document as (L,) records of `TOKEN`."""
    tokens = np.empty(len(encoded), TOKEN)
    tokens["id"], tokens["num_bytes"] = encoded.ids, encoded.num_bytes
    tokens["is_target"] = encoded.is_target
    return tokens


def cut_shards(documents: Iterator[SourceDocument]) -> Iterator[list[SourceDocument]]:
    """Cut documents into shards, as a function of the documents only."""
    shard: list[SourceDocument] = []
    num_characters = 0
    for item in documents:
        shard.append(item)
        num_characters += item[1].num_characters
        if num_characters >= SHARD_CHARACTERS or len(shard) == SHARD_DOCUMENTS:
            yield shard
            shard, num_characters = [], 0
    if shard:
        yield shard


def shard_key(documents: Sequence[SourceDocument]) -> str:
    """Return a digest of all that a shard is made of besides the options of the corpus."""
    digest = hashlib.sha256()
    for source, document in documents:
        parts = [document.content_hash(), document.id, document.domain, document.teacher, source]
        digest.update(repr(parts).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def encode_shard(documents: Sequence[SourceDocument], encoders: Encoders) -> Shard:
    """Encode the documents of a shard."""
    places = _Numbers()
    rows = np.zeros(len(documents), ROW)
    tokens: list[np.ndarray] = []
    errors: dict[str, str] = {}
    number, offset = 0, 0
    for source, run in groupby(documents, key=lambda item: item[0]):
        of_source = [document for _, document in run]
        outcomes = encoders(source).encode(of_source)
        for document, outcome in zip(of_source, outcomes, strict=True):
            row = rows[number]
            _fill(row, source, document, outcome, places)
            if outcome.error:
                errors[str(number)] = outcome.error
            row["offset"] = offset
            if outcome.encoded is not None:
                tokens.append(token_records(outcome.encoded))
                offset += len(outcome.encoded)
            number += 1
    strings = ShardStrings(
        paths=[*places.paths],
        domains=[*places.domains],
        teachers=[*places.teachers],
        stops=[sorted(ids) for ids in places.stops],
        errors=errors,
    )
    return Shard(np.concatenate([np.zeros(0, TOKEN), *tokens]), rows, strings)


class _Numbers:
    """Numbers of the strings of a shard, in the order of their first use."""

    def __init__(self) -> None:
        self.paths: dict[str, int] = {}
        self.domains: dict[str, int] = {}
        self.teachers: dict[str, int] = {}
        self.stops: dict[frozenset[int], int] = {frozenset(): 0}


def _fill(
    row: np.ndarray, source: int, document: Document, outcome: Outcome, places: _Numbers
) -> None:
    path, number = split_id(document.id)
    row["content"] = bytes.fromhex(document.content_hash())
    row["path"], row["number"] = places.paths.setdefault(path, len(places.paths)), number
    row["source"] = source
    row["domain"] = places.domains.setdefault(document.domain, len(places.domains))
    if document.teacher is not None:
        row["teacher"] = 1 + places.teachers.setdefault(document.teacher, len(places.teachers))
    row["notes"], row["length"] = int(outcome.notes), outcome.length
    if outcome.encoded is not None:
        row["size"], row["can_split"] = len(outcome.encoded), outcome.encoded.can_split
        row["stops"] = places.stops.setdefault(outcome.encoded.stops, len(places.stops))


def split_id(name: str) -> tuple[str, int]:
    """Split the id of a document into its file and its row, -1 for none."""
    path, colon, tail = name.rpartition(":")
    is_number = tail.isascii() and tail.isdecimal() and len(tail) < 19
    if colon and is_number and str(int(tail)) == tail:
        return path, int(tail)
    return name, -1


def join_id(path: str, number: int) -> str:
    """Return the id of a document, the inverse of `split_id`."""
    return path if number < 0 else f"{path}:{number}"


def shard_name(number: int) -> str:
    """Return the name of a shard without the endings of its files."""
    return f"shard-{number:05}"


def write_shard(folder: Path, number: int, shard: Shard, key: str) -> ShardInfo:
    """Write the files of a shard, each of them atomically, the one with the digests last."""
    name = shard_name(number)
    id_bytes = 2 if shard.tokens["id"].max(initial=0) < 2**16 else 4
    largest = int(shard.tokens["num_bytes"].max(initial=0))
    count_bytes = 1 if largest < 2**8 else 2 if largest < 2**16 else 4
    arrays = {
        f"{name}-tokens.npy": shard.tokens.astype(token_dtype(id_bytes, count_bytes)),
        f"{name}-documents.npy": shard.rows,
    }
    files = {}
    for file, rows in arrays.items():
        data = npy_bytes(rows)
        write_bytes(folder / file, data)
        files[file] = FileDigest(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    info = ShardInfo(
        documents=len(shard.rows),
        tokens=len(shard.tokens),
        id_bytes=id_bytes,
        count_bytes=count_bytes,
        key=key,
        files=files,
    )
    write_sealed(folder / f"{name}.json", ShardFile(info=info, strings=shard.strings))
    return info


def is_intact(folder: Path, files: dict[str, FileDigest]) -> bool:
    """Return whether all files are as they were written."""
    return all(
        (folder / name).is_file()
        and (folder / name).stat().st_size == file.bytes
        and sha256_of(folder / name) == file.sha256
        for name, file in files.items()
    )
