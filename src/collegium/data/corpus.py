"""The encoded documents of all sources, in memory or on disk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from collegium.data.encode import Encoder
from collegium.data.shards import (
    ROW,
    TOKEN,
    ShardStrings,
    SourceDocument,
    cut_shards,
    encode_shard,
    join_id,
)
from collegium.data.sources import DataOptions, Part, SourceOptions, SourceSummary, read_documents
from collegium.errors import DataError, nearest
from collegium.storage.arrays import RecordArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

SAMPLE_DOCUMENTS = 200
"""Documents of each source that are encoded to check a corpus that is not built yet."""


class ShardTexts(Protocol):
    """Strings of shards, in memory or on disk."""

    def __getitem__(self, number: int, /) -> ShardStrings: ...


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """All encoded documents in stored order."""

    tokens: RecordArray
    rows: RecordArray
    """(documents,) records of `ROW`."""
    shards: Sequence[tuple[int, int]]
    """Documents and tokens of each shard."""
    strings: ShardTexts
    """Strings of each shard."""
    sources: Sequence[SourceSummary]
    folder: Path | None = None

    @cached_property
    def starts(self) -> tuple[list[int], list[int]]:
        """First document and first token of each shard, and the ends of the last."""
        documents, tokens = zip(*self.shards, strict=True) if self.shards else ((), ())
        return [0, *accumulate(documents)], [0, *accumulate(tokens)]

    def shard_of(self, number: int) -> int:
        """Return the shard of a document."""
        return bisect_right(self.starts[0], number) - 1

    def errors(self) -> list[str]:
        """Return the reasons of all refused documents."""
        return [
            e for number in range(len(self.shards)) for e in self.strings[number].errors.values()
        ]

    def bytes_per_token(self) -> float:
        """Return the bytes on disk of a token, with the share of its document and window."""
        id_bytes = 2 if self.tokens[:]["id"].max(initial=0) < 2**16 else 4
        per_document = (ROW.itemsize + 32) * len(self.rows) / max(1, len(self.tokens))
        return id_bytes + 2 + per_document

    def error_of(self, number: int) -> str:
        """Return the reason why a document is refused, or nothing."""
        shard = self.shard_of(number)
        return self.strings[shard].errors.get(str(number - self.starts[0][shard]), "")


class DocumentNames(Sequence[str]):
    """Ids of documents of a corpus, read when they are asked for."""

    def __init__(self, corpus: TokenCorpus, documents: RecordArray | None = None) -> None:
        """Take records with the number of each document in the corpus. None for all documents."""
        self._corpus, self._documents = corpus, documents

    def __len__(self) -> int:
        return len(self._corpus.rows if self._documents is None else self._documents)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if self._documents is not None:
            number = int(self._documents[number : number + 1]["document"][0])
        row = self._corpus.rows[number : number + 1][0]
        strings = self._corpus.strings[self._corpus.shard_of(number)]
        return join_id(strings.paths[int(row["path"])], int(row["number"]))


def read_sources(
    options: DataOptions,
    where: str,
    teachers: Collection[str],
    summaries: list[SourceSummary],
    limit: int | None = None,
) -> Iterator[SourceDocument]:
    """Yield the documents of all sources with the number of their source.

    Reads at most `limit` documents of each. Raises DataError if a source cannot be read, or a
    document names no teacher of the run.
    """
    for number, (place, source) in enumerate(flat_sources(options, where)):
        summaries.append(SourceSummary(place))
        documents = read_documents(source, where=place, summary=summaries[-1])
        for document in islice(documents, limit):
            check_teacher(document.teacher, teachers, f"{place}: {document.id}", source)
            yield number, document


def check_teacher(
    name: str | None, teachers: Collection[str], place: str, source: SourceOptions
) -> None:
    """Raise DataError if a document names a teacher that does not exist."""
    if name is not None and name not in teachers:
        raise DataError(
            f"{place}: `{source.teacher_column}`: got `{name}`; must be the name of a teacher, or "
            f"null{nearest(name, teachers)}"
        )


def flat_sources(options: DataOptions, where: str) -> list[tuple[str, SourceOptions]]:
    """Return the place and the options of each source."""
    return [
        (f"{where}.{part}[{number}]", source)
        for part, sources in options.sources.items()
        for number, source in enumerate(sources)
    ]


def source_parts(options: DataOptions) -> list[Part]:
    """Return the part of each source."""
    return [part for part, sources in options.sources.items() for _ in sources]


class SourceEncoders:
    """Encoders of the sources: equal but for the place that their errors name."""

    def __init__(self, options: DataOptions, tokenizer: Tokenizer, where: str) -> None:
        self._options, self._tokenizer, self._where = options, tokenizer, where
        self._parts = source_parts(options)
        self._encoders: dict[str, Encoder] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Each process makes encoders of its own: they hold the worker that renders templates.
        return {**self.__dict__, "_encoders": {}}

    def __call__(self, source: int) -> Encoder:
        part = self._parts[source]
        if part not in self._encoders:
            self._encoders[part] = self._new(part)
        return self._encoders[part]

    def _new(self, part: str) -> Encoder:
        options = self._options
        return Encoder(
            self._tokenizer,
            max_length=options.max_length,
            truncate=options.truncate,
            special_tokens=options.special_tokens,
            date=options.date,
            where=f"{self._where}.{part}",
        )


def encode_corpus(
    options: DataOptions,
    tokenizer: Tokenizer,
    *,
    where: str,
    teachers: Collection[str] = (),
    limit: int | None = None,
) -> TokenCorpus:
    """Encode the sources in memory, at most `limit` documents of each.

    Raises DataError as `read_sources`, or if the tokenizer has no stop token.
    """
    summaries: list[SourceSummary] = []
    encoders = SourceEncoders(options, tokenizer, where)
    documents = read_sources(options, where, teachers, summaries, limit)
    shards = [encode_shard(shard, encoders) for shard in cut_shards(documents)]
    return TokenCorpus(
        np.concatenate([np.zeros(0, TOKEN), *(shard.tokens for shard in shards)]),
        np.concatenate([np.zeros(0, ROW), *(shard.rows for shard in shards)]),
        [(len(shard.rows), len(shard.tokens)) for shard in shards],
        [shard.strings for shard in shards],
        summaries,
    )
