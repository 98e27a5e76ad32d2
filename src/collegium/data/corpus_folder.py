"""A folder with the tokens of all sources, named by the digest of their inputs.

    ROOT/sources.json            SHA-256 of large source files, by size and modification time
    ROOT/DIGEST/shard-*          tokens and documents (`collegium.data.shards`)
    ROOT/DIGEST/manifest.json    identity, sizes and digests; written last
    ROOT/DIGEST/layout-*/        splits, budgets and windows (`collegium.data.pack`)

docs/design/corpus.md explains the format.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.console import OnProgress, say
from collegium.data.corpus import (
    SourceEncoders,
    TokenCorpus,
    encode_corpus,
    flat_sources,
    read_sources,
)
from collegium.data.corpus_identity import changed_files, corpus_identity
from collegium.data.pool import encoded_shards
from collegium.data.shards import (
    ROW,
    SHARD_CHARACTERS,
    TOKEN,
    Shard,
    ShardFile,
    ShardInfo,
    ShardStrings,
    cut_shards,
    shard_name,
    write_shard,
)
from collegium.data.sources import DataOptions, SourceSummary, source_files
from collegium.errors import CollegiumError, DataError
from collegium.storage.arrays import StoredArray
from collegium.storage.files import fingerprint, lock_folder, sha256_of, write_json
from collegium.storage.records import FileDigest, Record, open_record, read_record
from collegium.storage.seals import read_sealed, write_sealed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

FORMAT = 1
"""Version of the files. Any other is refused."""
MANIFEST = "manifest.json"
STAMPS = "verified.json"
"""Size and modification time of each file when its digest was last verified."""
DIGESTS = "sources.json"
SMALL_BYTES = 16_000_000
"""Sources up to this size are encoded in memory where nothing may be written."""
EXPANSION = {".gz": 5, ".zst": 5, ".parquet": 4}
"""Size of text relative to a compressed file, roughly."""
MEMO_BYTES = 1_000_000
"""Smaller files are hashed every time."""


class CorpusVersion(Record):
    """Version of a manifest."""

    format: int


class CorpusManifest(CorpusVersion):
    """Content of a corpus."""

    identity: dict[str, Any]
    shards: Sequence[ShardInfo]
    sources: Sequence[dict[str, Any]]
    """`SourceSummary` of each source."""
    files: dict[str, FileDigest]
    """All files of the shards."""


class CorpusFolder:
    """The corpus of a run: its identity, and the folder that holds it."""

    def __init__(
        self,
        options: DataOptions,
        tokenizer: Tokenizer,
        root: Path,
        *,
        where: str,
        teachers: Collection[str] = (),
    ) -> None:
        self._options, self._tokenizer = options, tokenizer
        self._where, self._teachers = where, teachers
        self.root = root
        self._identity: dict[str, Any] | None = None
        self._manifest: CorpusManifest | None = None
        self._is_read = False
        self._stats: dict[str, tuple[int, int]] = {}
        self._in_memory: TokenCorpus | None = None

    def identity(self) -> dict[str, Any]:
        """Return everything that the tokens depend on. Large files are hashed once.

        Raises DataError if a source has no files.
        """
        if self._identity is None:
            memo: dict[str, Sequence[Any]] = {}
            with suppress(CollegiumError):  # without it, all files are read
                memo |= read_record(self.root / DIGESTS, dict[str, list[Any]]) or {}
            before = dict(memo)
            digest = partial(self._digest, memo)
            self._identity = corpus_identity(self._options, self._tokenizer, self._where, digest)
            # Where nothing is built yet, a check must not write.
            if memo != before and self.root.is_dir() and os.access(self.root, os.W_OK):
                write_json(self.root / DIGESTS, memo)
        return self._identity

    @property
    def folder(self) -> Path:
        """Folder of the corpus, by the digest of its identity."""
        return self.root / fingerprint(self.identity())[:16]

    def num_bytes(self) -> int | None:
        """Return the size of the text of the sources, roughly, None where it is not known."""
        total = 0
        for place, source in flat_sources(self._options, self._where):
            files = source_files(source, place)
            if files is None:
                return None
            total += sum(f.stat().st_size * EXPANSION.get(f.suffix.lower(), 1) for f in files)
        return total

    def manifest(self) -> CorpusManifest | None:
        """Return the manifest of a finished corpus with all files, None without one.

        A damaged file is named. Raises DataError if it was written by another version.
        """
        if not self._is_read:
            self._manifest, self._is_read = self._read_manifest(), True
        return self._manifest

    def _read_manifest(self) -> CorpusManifest | None:
        path = self.folder / MANIFEST
        version = None
        with suppress(CollegiumError):  # a damaged file is named below
            version = read_record(path, CorpusVersion) if path.is_file() else None
        if version is not None and version.format != FORMAT:
            raise DataError(
                f"{path}: got format {version.format}; must be {FORMAT}: another version of "
                "collegium wrote it; use that version, or delete the folder"
            )
        manifest = read_sealed(path, CorpusManifest)
        return None if manifest is None or self._is_damaged(manifest) else manifest

    def _is_damaged(self, manifest: CorpusManifest) -> bool:
        """Verify the files that changed since they were last verified, and name a damaged one."""
        stamps: Mapping[str, Sequence[int]] = {}
        with suppress(CollegiumError):  # without them, all files are verified
            stamps = read_record(self.folder / STAMPS, dict[str, list[int]]) or {}
        verified = dict[str, list[int]]()
        for name, file in manifest.files.items():
            path = self.folder / name
            stamp = _stamp(path) if path.is_file() else None
            if stamp is None or stamp[0] != file.bytes:
                problem = "is missing" if stamp is None else f"has {stamp[0]:,} bytes"
                say(f"{path}: {problem}; must have {file.bytes:,} bytes; encoded again")
                return True
            if stamps.get(name) != [*stamp] and sha256_of(path) != file.sha256:
                say(f"{path}: has a wrong sha256; encoded again")
                return True
            verified[name] = [*stamp]
        if verified != stamps and os.access(self.folder, os.W_OK):
            write_json(self.folder / STAMPS, verified)
        return False

    def is_readable(self) -> bool:
        """Return whether it is finished, or small enough to be encoded in memory."""
        if self.manifest() is not None:
            return True
        size = self.num_bytes()
        return size is not None and size <= SMALL_BYTES

    def open(self) -> TokenCorpus:
        """Open the finished corpus, or encode a small one in memory.

        Raises DataError if it is large and not finished, or a source cannot be read.
        """
        if (manifest := self.manifest()) is not None:
            return open_corpus(self.folder, manifest)
        if not self.is_readable():
            raise DataError(
                f"{self._where}: the corpus is not built ({self.folder}); must be; run "
                "`collegium corpus RECIPE`"
            )
        if self._in_memory is None:
            self._in_memory = encode_corpus(
                self._options, self._tokenizer, where=self._where, teachers=self._teachers
            )
        return self._in_memory

    def build(
        self, processes: int | None = None, on_progress: OnProgress = lambda done, total: None
    ) -> None:
        """Write the corpus, encoded in several processes unless it is in memory.

        Finished shards of an interrupted build are kept.

        Args:
            processes: worker processes, by default one per available core.
            on_progress: called with the finished shards, and a rough number of all.

        Raises:
            DataError: a source cannot be read or changes while it is read, or the disk is full.
        """
        folder = self.folder
        with lock_folder(folder, "wait for it", wait=True):
            self._is_read = False  # another process may have finished it
            if self.manifest() is not None:
                return
            try:
                manifest = self._write(processes, on_progress)
                stamps = {name: [*_stamp(folder / name)] for name in manifest.files}
                write_json(folder / STAMPS, stamps)
                write_sealed(folder / MANIFEST, manifest)
                self._manifest = manifest
            except OSError as error:
                raise DataError(
                    f"{folder}: cannot be written ({error.strerror or error}); must have room for "
                    "the corpus; finished shards are kept: free space or set another "
                    "`data.corpus`, and run the same command again"
                ) from error

    def _write(self, processes: int | None, on_progress: OnProgress) -> CorpusManifest:
        if self._in_memory is not None:
            summaries = [*self._in_memory.sources]
            written = _write_memory(self.folder, self._in_memory)
        else:
            summaries = []
            documents = read_sources(self._options, self._where, self._teachers, summaries)
            encoders = SourceEncoders(self._options, self._tokenizer, self._where)
            written = encoded_shards(self.folder, cut_shards(documents), encoders, processes)
        total = (self.num_bytes() or 0) // SHARD_CHARACTERS
        infos: list[ShardInfo] = []
        for info in written:
            infos.append(info)
            on_progress(len(infos), max(total, len(infos)))
        self._check_unchanged()
        return CorpusManifest(
            format=FORMAT,
            identity=self.identity(),
            shards=infos,
            sources=[_plain_summary(summary) for summary in summaries],
            files=_files(self.folder, infos),
        )

    def line(self) -> str:
        """Describe the corpus, which is finished or small."""
        manifest = self.manifest()
        if manifest is None:
            corpus = self.open()
            size = len(corpus.tokens) * corpus.bytes_per_token()
            return f"{len(corpus.tokens):,} tokens; {size / 1e6:,.1f} MB to write in {self.root}"
        num_tokens = sum(shard.tokens for shard in manifest.shards)
        size = sum(file.bytes for file in manifest.files.values())
        return f"{num_tokens:,} tokens; {size / 1e6:,.1f} MB in {self.folder}"

    def changed_sources(self) -> str | None:
        """Name a source file whose content differs from that of an earlier corpus, or None."""
        others = (f for f in self.root.glob(f"*/{MANIFEST}") if f.parent != self.folder)
        for file in sorted(others):
            old: Mapping[str, Any] = {}
            with suppress(CollegiumError):  # it is damaged, and of another recipe
                old = read_record(file, dict[str, Any]) or {}
            if names := changed_files(old.get("identity", {}), self.identity()):
                more = f" and {len(names) - 1:,} more files" if len(names) > 1 else ""
                return f"{names[0]}{more} changed since {file.parent} was built"
        return None

    def _digest(self, memo: dict[str, Sequence[Any]], path: Path) -> str:
        """Return the SHA-256 of a source file, remembered by its size and modification time."""
        size, modified = self._stats[str(path)] = _stamp(path)
        if size < MEMO_BYTES:
            return sha256_of(path)
        key = str(path.absolute())
        if [*memo.get(key, ())[:2]] != [size, modified]:
            memo[key] = [size, modified, sha256_of(path)]
        return memo[key][2]

    def _check_unchanged(self) -> None:
        for name, stamp in self._stats.items():
            path = Path(name)
            if not path.is_file() or _stamp(path) != stamp:
                raise DataError(
                    f"{self._where}: {name}: changed while it was read; must stay as it is until "
                    "the corpus is built; run the same command again"
                )


class StoredStrings:
    """The strings of the shards in a folder, read when they are asked for, and kept.

    Documents come in random order, so all shards are asked for, again and again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[int, ShardStrings] = {}

    def __getitem__(self, number: int, /) -> ShardStrings:
        if number not in self._kept:
            path = self._folder / f"{shard_name(number)}.json"
            self._kept[number] = open_record(path, ShardFile).strings
        return self._kept[number]


def open_corpus(folder: Path, manifest: CorpusManifest) -> TokenCorpus:
    """Open the files of a manifest."""
    shards, names = manifest.shards, [shard_name(i) for i in range(len(manifest.shards))]
    documents = [shard.documents for shard in shards]
    return TokenCorpus(
        StoredArray(
            [folder / f"{name}-tokens.npy" for name in names],
            [shard.tokens for shard in shards],
            [shard.token_dtype for shard in shards],
            TOKEN,
        ),
        StoredArray(
            [folder / f"{name}-documents.npy" for name in names],
            documents,
            [ROW] * len(shards),
            ROW,
        ),
        [(shard.documents, shard.tokens) for shard in shards],
        StoredStrings(folder),
        [
            SourceSummary(**{**summary, "unread_columns": {*summary["unread_columns"]}})
            for summary in manifest.sources
        ],
        folder,
    )


def _files(folder: Path, shards: Sequence[ShardInfo]) -> dict[str, FileDigest]:
    """Return the digests of all files of the shards."""
    files = {name: file for shard in shards for name, file in shard.files.items()}
    for number in range(len(shards)):
        path = folder / f"{shard_name(number)}.json"
        files[path.name] = FileDigest(bytes=path.stat().st_size, sha256=sha256_of(path))
    return files


def _write_memory(folder: Path, corpus: TokenCorpus) -> Iterator[ShardInfo]:
    documents, tokens = corpus.starts
    for number in range(len(corpus.shards)):
        rows = corpus.rows[documents[number] : documents[number + 1]]
        span = slice(tokens[number], tokens[number + 1])
        shard = Shard(corpus.tokens[span], rows, corpus.strings[number])
        yield write_shard(folder, number, shard, "")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _plain_summary(summary: SourceSummary) -> dict[str, Any]:
    return {**asdict(summary), "unread_columns": sorted(summary.unread_columns)}
