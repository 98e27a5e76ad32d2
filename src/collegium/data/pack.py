"""Packed train, calibration and validation datasets, laid out from the documents of a corpus.

Nothing here needs text: the split and the order follow from content hashes, budgets from lengths.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from collegium.console import say
from collegium.data.budgets import Choice, choose
from collegium.data.corpus import (
    DocumentNames,
    TokenCorpus,
    check_teacher,
    encode_corpus,
    flat_sources,
    source_parts,
)
from collegium.data.encode import EncodingReport
from collegium.data.layout import (
    DOCUMENT,
    WINDOW,
    DatasetFacts,
    Layout,
    chunks_of,
    window_order,
    window_starts,
)
from collegium.data.order import PARTS, OrderedDocuments, order_documents
from collegium.data.shards import ROW, is_intact
from collegium.data.sources import DataOptions, Part, SourceSummary
from collegium.data.tokens import Encoded, marked
from collegium.data.windows import PackedDataset
from collegium.errors import DataError
from collegium.options import plain
from collegium.storage.arrays import ArrayFile, ArrayWriter, RecordArray, stored, take
from collegium.storage.files import fingerprint
from collegium.storage.records import Record
from collegium.storage.seals import read_sealed, write_sealed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

_LOG = logging.getLogger(__name__)
KEPT_TOKENS = 2**20
"""A corpus on disk with more tokens keeps its layouts. A smaller one is laid out in 0.2 s."""
LAYOUT = "layout.json"
_DTYPES = {
    "documents": DOCUMENT,
    "windows": WINDOW,
    "order": np.dtype("<i8"),
    "counts": np.dtype("<i8"),
    "ids": np.dtype("<i8"),
}
"""Arrays of a dataset."""
_CHUNK = 2**14


class DatasetRecord(Record):
    """A dataset of a layout on disk."""

    facts: dict[str, str | int]
    """`DatasetFacts`."""
    stops: Sequence[int]
    domains: Sequence[str]
    teachers: Sequence[str]
    files: dict[str, Sequence[ArrayFile]]
    """Files of each array."""
    warnings: Sequence[str]
    samples: dict[str, str]
    """A decoded document of each source, by its number."""


class LayoutRecord(Record):
    """Content of a layout on disk."""

    datasets: dict[Part, DatasetRecord]


def build_datasets(
    options: DataOptions,
    tokenizer: Tokenizer,
    *,
    where: str,
    teachers: Collection[str] = (),
    summaries: list[SourceSummary] | None = None,
) -> dict[str, PackedDataset]:
    """Read, encode, split and pack `train`, `calibration` and `validation` in memory.

    A document may name one of `teachers`. A summary of each source is appended to `summaries`.
    Raises DataError if a source cannot be read, or as `lay_out`.
    """
    corpus = encode_corpus(options, tokenizer, where=where, teachers=teachers)
    if summaries is not None:
        summaries += corpus.sources
    return lay_out(corpus, options, tokenizer, where=where, teachers=teachers)


def lay_out(
    corpus: TokenCorpus,
    options: DataOptions,
    tokenizer: Tokenizer,
    *,
    where: str,
    teachers: Collection[str] = (),
) -> dict[str, PackedDataset]:
    """Split and pack a corpus into `train`, `calibration` and `validation`, disjoint by content.

    Documents are ordered by a hash of their content and the seed, and the windows are shuffled with
    the seed, so any prefix of a dataset is a fair mixture. A large corpus on disk keeps its
    layouts. Sets the samples of `corpus.sources`. Raises DataError if a part is empty, parts share
    documents, a document cannot be encoded or names an unknown teacher, or nothing can be learned.
    """
    return _Layouts(corpus, options, tokenizer, where, teachers).open()


def _pad_id(tokenizer: Tokenizer) -> int:
    # The pad id may be eos: padding is masked by position, never by id. A mask by id removed the
    # real eos from the loss in https://github.com/huggingface/trl/issues/6357
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return pad if isinstance(pad, int) else 0


@dataclass(frozen=True)
class _Layouts:
    """The datasets of a corpus under some options."""

    corpus: TokenCorpus
    options: DataOptions
    tokenizer: Tokenizer
    where: str
    teachers: Collection[str]

    def open(self) -> dict[str, PackedDataset]:
        """Open the datasets that are kept, or lay them out."""
        folder = self._folder()
        if folder is None:
            return {part: dataset for part, dataset, _ in self._built(None)}
        kept = read_sealed(folder / LAYOUT, LayoutRecord)
        records: dict[Part, DatasetRecord] = {} if kept is None else kept.datasets
        if not records or not all(self._can_use(one, folder) for one in records.values()):
            temporary = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
            temporary.mkdir()
            records = {part: record for part, _, record in self._built(temporary)}
            write_sealed(temporary / LAYOUT, LayoutRecord(datasets=records))
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        return {part: self._kept(record, folder) for part, record in records.items()}

    def _folder(self) -> Path | None:
        """Return the folder of the layout of a large corpus on disk, else None."""
        if self.corpus.folder is None or len(self.corpus.tokens) <= KEPT_TOKENS:
            return None
        # The sources are in the digest of the corpus.
        without = (*self.options.sources, "corpus")
        values = {name: one for name, one in plain(self.options).items() if name not in without}
        key = fingerprint([values, _pad_id(self.tokenizer)])[:16]
        return self.corpus.folder / f"layout-{key}"

    def _can_use(self, record: DatasetRecord, folder: Path) -> bool:
        """Return whether all files are intact, and all teachers are of the run."""
        for file in (file for files in record.files.values() for file in files):
            if not is_intact(folder, {file.name: file}):
                say(f"{folder / file.name}: is damaged; made again")
                return False
        return {*record.teachers} <= {*self.teachers}

    def _kept(self, record: DatasetRecord, folder: Path) -> PackedDataset:
        for line in record.warnings:
            _LOG.warning(line)
        for source, sample in record.samples.items():
            self.corpus.sources[int(source)].sample = sample
        arrays = {
            name: stored(folder, record.files[name], dtype) for name, dtype in _DTYPES.items()
        }
        facts = DatasetFacts(**record.facts)  # pyright: ignore[reportArgumentType]
        layout = self._layout(arrays, record.domains, record.teachers, record.stops, folder)
        return PackedDataset.of(layout, facts, (arrays["counts"], arrays["ids"]))

    def _built(self, folder: Path | None) -> Iterator[tuple[Part, PackedDataset, DatasetRecord]]:
        ordered = order_documents(self.corpus, self.options, where=self.where)
        for part in PARTS:
            yield part, *self._build(part, ordered.pop(part), folder)

    def _build(
        self, part: Part, ordered: OrderedDocuments, folder: Path | None
    ) -> tuple[PackedDataset, DatasetRecord]:
        options = self.options
        choice, warnings = self._choose(part, ordered)
        writers = {n: ArrayWriter(dtype, folder, f"{part}-{n}") for n, dtype in _DTYPES.items()}
        places = _Placement(self, part, ordered, choice)
        lengths = places.lengths(writers["documents"])
        starts = window_starts(lengths, options.max_length, packing=options.packing)
        while batch := [*islice(starts, _CHUNK)]:
            writers["windows"].append(np.array(batch, WINDOW))
        arrays = {name: writers[name].finish() for name in ("documents", "windows")}
        for rows in chunks_of(window_order(len(arrays["windows"]) - 1, options.split_seed)):
            writers["order"].append(rows)
        arrays["order"] = writers["order"].finish()
        teachers, stops = [*places.teachers], sorted(places.stops)
        layout = self._layout(arrays, places.domains, teachers, stops, folder)
        dataset = PackedDataset.of(layout)
        if folder is not None:
            for name, rows in (("counts", dataset.targets_per_window()), ("ids", dataset.ids)):
                writers[name].append(rows)
                writers[name].finish()
        return dataset, DatasetRecord(
            facts=asdict(dataset.facts),
            stops=stops,
            domains=places.domains,
            teachers=teachers,
            files={name: writer.files for name, writer in writers.items()},
            warnings=warnings,
            samples=places.samples,
        )

    def _choose(self, part: Part, ordered: OrderedDocuments) -> tuple[Choice, list[str]]:
        options, where = self.options, f"{self.where}.{part}"
        report = EncodingReport(
            max_length=options.max_length,
            truncate=options.truncate,
            special_tokens=options.special_tokens,
            where=where,
        )
        limit: int | None = getattr(options, f"max_{part}_tokens")
        choice = choose(ordered, self.corpus, limit, report)
        warnings = report.check()
        if not choice.is_chosen.any():
            raise DataError(
                f"{where}: no document left ({report.num_too_long:,} too long for "
                f"{options.max_length:,} tokens); must have at least one; raise `max_length` or "
                "the token limit, or set `truncate: right`"
            )
        for line in warnings:
            _LOG.warning(line)
        return choice, warnings

    def check_teacher(self, name: str, source: int, document: str) -> None:
        """Check that a teacher that a document names is one of the run."""
        place, options = flat_sources(self.options, self.where)[source]
        check_teacher(name, self.teachers, f"{place}: {document}", options)

    def _layout(
        self,
        arrays: Mapping[str, RecordArray],
        domains: Sequence[str],
        teachers: Sequence[str],
        stops: Sequence[int],
        folder: Path | None,
    ) -> Layout:
        return Layout(
            tokens=self.corpus.tokens,
            documents=arrays["documents"],
            windows=arrays["windows"],
            order=arrays["order"],
            names=DocumentNames(self.corpus, arrays["documents"]),
            domains=domains,
            teachers=teachers,
            stops=stops,
            max_length=self.options.max_length,
            packing=self.options.packing,
            pad_token_id=_pad_id(self.tokenizer),
            folder=folder,
        )


class _Placement:
    """The chosen documents of a part in their order, with their places among the tokens."""

    def __init__(
        self, layouts: _Layouts, part: Part, ordered: OrderedDocuments, choice: Choice
    ) -> None:
        self._layouts, self._ordered, self._choice = layouts, ordered, choice
        self._corpus, self._starts = layouts.corpus, layouts.corpus.starts
        used: list[int] = np.unique(ordered.domain_numbers(choice.is_chosen)).tolist()
        self.domains = sorted(ordered.domains[number] for number in used)
        self._domain_numbers = np.zeros(len(ordered.domains), np.int64)
        self._domain_numbers[used] = [self.domains.index(ordered.domains[n]) for n in used]
        self.teachers: dict[str, None] = {}
        """Names of the teachers that documents name, in the order of their numbers from 1."""
        eos = layouts.tokenizer.eos_token_id
        self.stops = {eos} if isinstance(eos, int) else set[int]()
        """Ids of the tokens that the student learns to stop with."""
        parts = source_parts(layouts.options)
        self._unsampled = {number for number, one in enumerate(parts) if one == part}
        self.samples: dict[str, str] = {}

    def lengths(self, documents: ArrayWriter) -> Iterator[tuple[int, bool]]:
        """Write the documents, and yield their tokens and whether they may be split."""
        places = np.flatnonzero(self._choice.is_chosen)
        truncated = self._choice.truncated
        for chunk in chunks_of(places, _CHUNK):
            numbers = self._ordered.numbers(chunk)
            rows = take(self._corpus.rows, numbers, ROW)
            shards = np.searchsorted(self._starts[0], numbers, side="right") - 1
            records = np.zeros(len(chunk), DOCUMENT)
            records["document"] = numbers
            records["offset"] = rows["offset"] + np.array(self._starts[1], np.uint64)[shards]
            wholes: list[int] = rows["size"].tolist()
            sizes = [
                truncated.get(place, size)
                for place, size in zip(chunk.tolist(), wholes, strict=True)
            ]
            records["size"] = sizes
            records["domain"] = self._domain_numbers[self._ordered.domain_numbers(chunk)]
            self._add_stops(shards, rows)
            records["teacher"] = self._teachers(shards, rows, numbers)
            self._add_samples(rows, records)
            documents.append(records)
            yield from zip(sizes, rows["can_split"].tolist(), strict=True)

    def _add_stops(self, shards: np.ndarray, rows: np.ndarray) -> None:
        for shard, number in {*zip(shards.tolist(), rows["stops"].tolist(), strict=True)}:
            self.stops |= {*self._corpus.strings[shard].stops[number]}

    def _teachers(self, shards: np.ndarray, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Return the numbers of the teachers that documents name, 0 for none."""
        new = np.zeros(len(rows), np.int64)
        for index in np.flatnonzero(rows["teacher"]).tolist():
            shard, number = int(shards[index]), int(rows["teacher"][index])
            name = self._corpus.strings[shard].teachers[number - 1]
            if name not in self.teachers:
                document = DocumentNames(self._corpus)[int(numbers[index])]
                self._layouts.check_teacher(name, int(rows["source"][index]), document)
                self.teachers[name] = None
            new[index] = 1 + [*self.teachers].index(name)
        return new

    def _add_samples(self, rows: np.ndarray, records: np.ndarray) -> None:
        for source in [*self._unsampled]:
            indices = np.flatnonzero(rows["source"] == source)
            if len(indices):
                record = records[indices[0]]
                start = int(record["offset"])
                tokens = self._corpus.tokens[start : start + int(record["size"])]
                ids, num_bytes = tokens["id"].astype(np.int64), tokens["num_bytes"]
                encoded = Encoded(ids, tokens["is_target"], num_bytes, can_split=True)
                sample = marked(encoded, self._layouts.tokenizer)
                self._corpus.sources[source].sample = self.samples[str(source)] = sample
                self._unsampled.remove(source)
