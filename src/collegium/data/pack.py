"""Packed train, calibration and validation datasets, built from the options of a recipe."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, combinations
from typing import TYPE_CHECKING, Literal

from collegium.data.documents import Document
from collegium.data.encode import Encoder
from collegium.data.sources import DataOptions, SourceOptions, SourceSummary, read_documents
from collegium.data.tokens import Encoded, marked
from collegium.data.windows import Collator as Collator
from collegium.data.windows import PackedDataset
from collegium.errors import DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

_LOG = logging.getLogger(__name__)


def build_datasets(
    options: DataOptions,
    tokenizer: Tokenizer,
    *,
    where: str,
    teachers: Collection[str] = (),
    summaries: list[SourceSummary] | None = None,
) -> dict[str, PackedDataset]:
    """Read, split, encode and pack `train`, `calibration` and `validation`, disjoint by content.

    Documents are ordered by a hash of their content and the seed, and the windows are shuffled with
    the seed, so any prefix of a dataset is a fair mixture. A document may name one of `teachers`.
    A summary of each source is appended to `summaries`. Raises DataError if a source cannot be
    read, a part is empty, parts share documents, a document names an unknown teacher, or nothing
    can be learned.
    """
    summaries = [] if summaries is None else summaries
    parts = _split(options, where, teachers, summaries)
    _check_disjoint(parts, where)
    return {
        part: _build(part, documents, options, tokenizer, summaries, where=f"{where}.{part}")
        for part, documents in parts.items()
    }


def split_of(
    document: Document, seed: int, calibration: float, validation: float
) -> Literal["train", "calibration", "validation"]:
    """Assign a document to a split, as a function of its content and the seed only.

    u = SHA-256(seed, content) in [0, 1). The split is validation if u < validation, calibration if
    u < validation + calibration, else train. Identical documents always get the same split.
    """
    share = _seeded_hash(document, seed, "split") / 2**64
    if share < validation:
        return "validation"
    return "calibration" if share < validation + calibration else "train"


def _seeded_hash(document: Document, seed: int, purpose: str) -> int:
    """Return a hash in [0, 2^64) of the content, the seed and the purpose."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{document.content_hash()}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _split(
    options: DataOptions, where: str, teachers: Collection[str], summaries: list[SourceSummary]
) -> dict[str, list[Document]]:
    parts = {
        part: list(_read_sources(sources, f"{where}.{part}", teachers, summaries))
        for part, sources in options.sources.items()
    }
    pooled, parts["train"] = parts["train"], []
    calibration = 0.0 if options.calibration else options.calibration_fraction
    validation = 0.0 if options.validation else options.validation_fraction
    for document in pooled:
        split = split_of(document, options.split_seed, calibration, validation)
        parts[split].append(document)
    num_documents = sum(map(len, parts.values()))
    for part, documents in parts.items():
        if not documents:
            remedy = f"raise `{part}_fraction`, add `{part}` sources"
            raise DataError(
                f"{where}.{part}: got no document (of {num_documents:,}); must have at least one; "
                f"{'lower the fractions' if part == 'train' else remedy}, or split the texts with "
                "`split_on: blank_line`"
            )
    return parts


def _read_sources(
    sources: Sequence[SourceOptions],
    where: str,
    teachers: Collection[str],
    summaries: list[SourceSummary],
) -> Iterator[Document]:
    for number, source in enumerate(sources):
        place = f"{where}[{number}]"
        summaries.append(SourceSummary(place))
        for document in read_documents(source, where=place, summary=summaries[-1]):
            name = document.teacher
            if name is not None and name not in teachers:
                raise DataError(
                    f"{place}: {document.id}: `{source.teacher_column}`: got `{name}`; "
                    f"must be the name of a teacher, or null{nearest(name, teachers)}"
                )
            yield document


def _check_disjoint(parts: dict[str, list[Document]], where: str) -> None:
    for earlier, later in combinations(parts, 2):
        hashes = {document.content_hash() for document in parts[earlier]}
        shared = [d.id for d in parts[later] if d.content_hash() in hashes]
        if shared:
            raise DataError(
                f"{where}.{later}: got documents that also occur in {earlier}: {len(shared):,} of "
                f"{len(parts[later]):,} (first: {shared[0]}); must be disjoint; remove them from "
                "one of the two"
            )


def _build(
    part: str,
    documents: list[Document],
    options: DataOptions,
    tokenizer: Tokenizer,
    summaries: Sequence[SourceSummary],
    *,
    where: str,
) -> PackedDataset:
    seed = options.split_seed
    # Ids and domains break ties between identical documents.
    documents = sorted(documents, key=lambda d: (_seeded_hash(d, seed, "order"), d.id, d.domain))
    encoder = Encoder(
        tokenizer,
        max_length=options.max_length,
        truncate=options.truncate,
        special_tokens=options.special_tokens,
        date=options.date,
        where=where,
    )
    max_tokens: int | None = getattr(options, f"max_{part}_tokens")
    encoded = _select(documents, max_tokens, encoder)
    warnings = encoder.check()
    if not encoded:
        raise DataError(
            f"{where}: no document left ({len(encoder.too_long):,} too long for "
            f"{options.max_length:,} tokens); must have at least one; raise `max_length` or the "
            "token limit, or set `truncate: right`"
        )
    for line in warnings:
        _LOG.warning(line)
    # The pad id may be eos: padding is masked by position, never by id. A mask by id removed the
    # real eos from the loss in https://github.com/huggingface/trl/issues/6357
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    chosen = [documents[number] for number in encoded]
    # Two parts may read the same data set, with other splits of it.
    for summary in (one for one in summaries if one.where.startswith(f"{where}[")):
        is_from = (summary.files and d.id.startswith((*summary.files,)) for d in chosen)
        first = next((n for n, hit in zip(encoded, is_from, strict=True) if hit), None)
        if first is not None and not summary.sample:
            summary.sample = marked(encoded[first], tokenizer)
    return PackedDataset(
        list(encoded.values()),
        max_length=options.max_length,
        packing=options.packing,
        domains=[document.domain for document in chosen],
        names=[document.id for document in chosen],
        teachers=[document.teacher for document in chosen],
        pad_token_id=pad if isinstance(pad, int) else 0,
        stops=encoder.stops,
        order_seed=seed,
    )


def _select(
    documents: Sequence[Document], max_tokens: int | None, encoder: Encoder
) -> dict[int, Encoded]:
    """Encode documents, balanced over domains up to `max_tokens`: number -> tokens, in order."""

    def stream(domain: str) -> Iterator[tuple[int, Encoded]]:
        numbers = [number for number, d in enumerate(documents) if d.domain == domain]
        encoded = encoder.encode(documents[number] for number in numbers)
        return ((number, e) for number, e in zip(numbers, encoded, strict=True) if e is not None)

    # Streams are lazy: past the token limit, no more chunks are encoded.
    streams = {name: stream(name) for name in sorted({d.domain for d in documents})}
    if max_tokens is None:
        return dict(sorted(chain.from_iterable(streams.values())))
    return dict(sorted(_balance_domains(streams, max_tokens)))


def _balance_domains(
    streams: dict[str, Iterator[tuple[int, Encoded]]], max_tokens: int
) -> Iterator[tuple[int, Encoded]]:
    """Yield from the domain with the fewest tokens, until `max_tokens` or the end of all streams.

    A text over the remaining share of its domain is truncated. A prompt or chat over the limit ends
    its domain.
    """
    used = dict.fromkeys(streams, 0)
    room = max_tokens
    while streams and room >= 2:
        name = min(streams, key=lambda domain: (used[domain], domain))
        item = next(streams[name], None)
        if item is None:
            del streams[name]
            continue
        number, encoded = item
        # Tokens per domain once all remaining domains have equally many.
        level = (room + sum(used[domain] for domain in streams)) // len(streams)
        share = min(room, max(2, level - used[name])) if encoded.can_split else room
        if len(encoded) > share and not encoded.can_split:
            del streams[name]
            continue
        encoded = encoded.part(slice(share))
        yield number, encoded
        used[name] += len(encoded)
        room -= len(encoded)
