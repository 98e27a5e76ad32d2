"""Packed train, calibration and validation datasets, built from the options of a recipe."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from collegium.data.encode import Encoded, Encoder, seeded_hash, split_of
from collegium.data.sources import DataOptions, Document, SourceOptions, read_documents
from collegium.data.windows import Collator, PackedDataset
from collegium.errors import DataError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Collator", "DataOptions", "PackedDataset", "build_datasets"]

_PARTS = ("train", "calibration", "validation")
# Documents are encoded in chunks: fast tokenizers work on batches, and a chunk bounds the memory.
_CHUNK_DOCUMENTS = 512
_CHUNK_CHARACTERS = 1_000_000
_Keyed = tuple[int, Document, Encoded]
_LOG = logging.getLogger(__name__)


def build_datasets(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerFast,
    *,
    where: str,
    teachers: Collection[str] = (),
) -> dict[str, PackedDataset]:
    """Read, split, encode and pack `train`, `calibration` and `validation`, disjoint by content.

    Documents are ordered by a hash of their content and the seed, and the windows are shuffled with
    the seed, so any prefix of a dataset is a fair mixture. A document may name one of `teachers`.

    Raises:
        DataError: a source cannot be read, a part is empty, parts share documents, a document names
            an unknown teacher, or nothing can be learned.
    """
    parts = _split(options, where, teachers)
    _check_disjoint(parts, where)
    limits = {
        "train": options.max_train_tokens,
        "calibration": options.max_calibration_tokens,
        "validation": options.max_validation_tokens,
    }
    return {
        part: _build(parts[part], limits[part], options, tokenizer, where=f"{where}.{part}")
        for part in _PARTS
    }


def _split(
    options: DataOptions, where: str, teachers: Collection[str]
) -> dict[str, list[Document]]:
    parts: dict[str, list[Document]] = {part: [] for part in _PARTS}
    shares = {
        "calibration": 0.0 if options.calibration else options.calibration_fraction,
        "validation": 0.0 if options.validation else options.validation_fraction,
    }
    for document in _read_sources(options.train, f"{where}.train", teachers):
        parts[split_of(document, seed=options.split_seed, **shares)].append(document)
    for part, sources in (("calibration", options.calibration), ("validation", options.validation)):
        parts[part] += _read_sources(sources, f"{where}.{part}", teachers)
    num_documents = sum(map(len, parts.values()))
    for part in _PARTS:
        if not parts[part]:
            remedy = (
                "lower the fractions"
                if part == "train"
                else f"raise `{part}_fraction`, add `{part}` sources"
            )
            raise DataError(
                f"{where}.{part}: none of {num_documents:,} documents fell into this part; must "
                f"have at least one; {remedy}, or split the texts with `split_on: blank_line`"
            )
    return parts


def _read_sources(
    sources: Sequence[SourceOptions], where: str, teachers: Collection[str]
) -> Iterator[Document]:
    for number, source in enumerate(sources):
        place = f"{where}[{number}]"
        for document in read_documents(source, where=place):
            name = document.teacher
            if name is not None and name not in teachers:
                raise DataError(
                    f"{place}: {document.id}: `{source.teacher_column}`: got `{name}`; "
                    "must be the name of a teacher, or null"
                    f"{nearest(name, teachers)}"
                )
            yield document


def _check_disjoint(parts: dict[str, list[Document]], where: str) -> None:
    for later, earlier in (
        ("validation", "train"),
        ("calibration", "train"),
        ("validation", "calibration"),
    ):
        hashes = {document.content_hash() for document in parts[earlier]}
        shared = [d.id for d in parts[later] if d.content_hash() in hashes]
        if shared:
            raise DataError(
                f"{where}.{later}: {len(shared):,} of {len(parts[later]):,} {later} documents also "
                f"occur in {earlier} (first: {shared[0]}); must be disjoint; remove them from one "
                "of the two"
            )


def _build(
    documents: list[Document],
    max_tokens: int | None,
    options: DataOptions,
    tokenizer: PreTrainedTokenizerFast,
    *,
    where: str,
) -> PackedDataset:
    seed = options.split_seed
    keyed = [(seeded_hash(document, seed, "order"), document) for document in documents]
    # Ids break ties between identical documents.
    keyed.sort(key=lambda pair: (pair[0], pair[1].id))
    encoder = Encoder(
        tokenizer, max_length=options.max_length, truncate=options.truncate, where=where
    )
    chosen = _select(keyed, max_tokens, encoder)
    encoder.check()
    if not chosen:
        raise DataError(
            f"{where}: no document left ({len(encoder.too_long):,} too long for "
            f"{options.max_length:,} tokens); must have at least one; raise `max_length` or the "
            "token limit, or set `truncate: right`"
        )
    _log_warnings(encoder, where)
    # The pad id may be eos: padding is masked by position, never by id. A mask by id removed the
    # real eos from the loss in https://github.com/huggingface/trl/issues/6357
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return PackedDataset.from_encoded(
        [encoded for _, encoded in chosen],
        max_length=options.max_length,
        packing=options.packing,
        domains=[document.domain for document, _ in chosen],
        names=[document.id for document, _ in chosen],
        teachers=[document.teacher for document, _ in chosen],
        pad_token_id=pad if isinstance(pad, int) else 0,
        order_seed=seed,
    )


def _select(
    keyed: list[tuple[int, Document]], max_tokens: int | None, encoder: Encoder
) -> list[tuple[Document, Encoded]]:
    """Encode documents in key order, balanced over the domains up to `max_tokens`."""
    domains = sorted({document.domain for _, document in keyed})
    # Streams are lazy: past the token limit, no more chunks are encoded.
    streams = {
        name: _encode_stream([pair for pair in keyed if pair[1].domain == name], encoder)
        for name in domains
    }
    if max_tokens is None:
        chosen = [item for stream in streams.values() for item in stream]
    else:
        chosen = list(_balance_domains(streams, max_tokens))
    return [(d, e) for _, d, e in sorted(chosen, key=lambda item: (item[0], item[1].id))]


def _balance_domains(streams: dict[str, Iterator[_Keyed]], max_tokens: int) -> Iterator[_Keyed]:
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
        key, document, encoded = item
        # Tokens per domain once all remaining domains have equally many.
        level = (room + sum(used[domain] for domain in streams)) // len(streams)
        share = min(room, max(2, level - used[name])) if encoded.can_split else room
        encoded = _truncate(encoded, share)
        if encoded is None:
            del streams[name]
            continue
        yield key, document, encoded
        used[name] += len(encoded)
        room -= len(encoded)


def _truncate(encoded: Encoded, room: int) -> Encoded | None:
    if len(encoded) <= room:
        return encoded
    if not encoded.can_split:
        return None
    return Encoded(
        encoded.ids[:room], encoded.is_target[:room], encoded.num_bytes[:room], can_split=True
    )


def _encode_stream(keyed: list[tuple[int, Document]], encoder: Encoder) -> Iterator[_Keyed]:
    start = 0
    while start < len(keyed):
        stop, characters = start, 0
        while (
            stop < len(keyed) and stop - start < _CHUNK_DOCUMENTS and characters < _CHUNK_CHARACTERS
        ):
            document = keyed[stop][1]
            characters += len(document.text or "") + len(document.prompt or "")
            stop += 1
        encoded = encoder.encode([document for _, document in keyed[start:stop]])
        for (key, document), tokens in zip(keyed[start:stop], encoded, strict=True):
            if tokens is not None:
                yield key, document, tokens
        start = stop


def _log_warnings(encoder: Encoder, where: str) -> None:
    if encoder.too_long:
        longest = max(length for _, length in encoder.too_long)
        action = "dropped" if encoder.truncate == "drop" else f"truncated ({encoder.truncate})"
        _LOG.warning(
            "%s: %d samples exceed %d tokens (longest %d) and were %s",
            where, len(encoder.too_long), encoder.max_length, longest, action,
        )  # fmt: skip
    if encoder.untrained:
        _LOG.warning(
            "%s: %d of %d samples have no target token (first: id %s) and were skipped",
            where, len(encoder.untrained), encoder.num_seen, encoder.untrained[0],
        )  # fmt: skip
