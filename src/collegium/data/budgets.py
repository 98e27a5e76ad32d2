"""Choice of the documents of a part: those with targets, up to a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from collegium.data.corpus import DocumentNames, TokenCorpus
from collegium.data.encode import EncodingReport, Note
from collegium.data.order import OrderedDocuments
from collegium.data.shards import ROW
from collegium.storage.arrays import take

_CHUNK = 2**14

Candidate = tuple[int, int, bool]
"""Place of a document in its part, its tokens, and whether it may be split."""


@dataclass
class Choice:
    """The documents of a dataset among those of its part."""

    is_chosen: np.ndarray
    """(documents,) bool."""
    truncated: dict[int, int] = field(default_factory=dict)
    """Tokens of the documents that a limit has truncated, by their place."""


def choose(
    ordered: OrderedDocuments, corpus: TokenCorpus, max_tokens: int | None, report: EncodingReport
) -> Choice:
    """Choose the documents with targets, balanced over domains up to `max_tokens`.

    Adds every document that was considered to `report`.
    """
    names = DocumentNames(corpus)

    def candidates(numbers_of: Callable[[slice], np.ndarray], count: int) -> Iterator[Candidate]:
        for start in range(0, count, _CHUNK):
            places = numbers_of(slice(start, start + _CHUNK))
            numbers = ordered.numbers(places)
            rows = take(corpus.rows, numbers, ROW)
            columns = [rows[name].tolist() for name in ("notes", "length", "size", "can_split")]
            for place, number, notes, length, size, can_split in zip(
                places.tolist(), numbers.tolist(), *columns, strict=True
            ):
                name, error = partial(names.__getitem__, number), partial(corpus.error_of, number)
                report.add(name, Note(notes), length, error)
                if size:
                    yield place, size, can_split

    choice = Choice(np.zeros(len(ordered), bool))
    if max_tokens is None:
        every = np.arange(len(ordered))
        chosen = ((place, size) for place, size, _ in candidates(every.__getitem__, len(every)))
    else:
        domains = ordered.domain_numbers()
        streams = {
            ordered.domains[int(number)]: candidates(places.__getitem__, len(places))
            for number in np.unique(domains).tolist()
            for places in [np.flatnonzero(domains == number)]
        }
        chosen = balance_domains(dict(sorted(streams.items())), max_tokens, choice.truncated)
    for place, _ in chosen:
        choice.is_chosen[place] = True
    return choice


def balance_domains(
    streams: dict[str, Iterator[Candidate]], max_tokens: int, truncated: dict[int, int]
) -> Iterator[tuple[int, int]]:
    """Yield from the domain with the fewest tokens, until `max_tokens` or the end of all streams.

    A text over the remaining share of its domain is truncated, and noted in `truncated`. A prompt
    or chat over the limit ends its domain. Yields the place of each document and its tokens.
    """
    used = dict.fromkeys(streams, 0)
    room = max_tokens
    while streams and room >= 2:
        name = min(streams, key=lambda domain: (used[domain], domain))
        item = next(streams[name], None)
        if item is None:
            del streams[name]
            continue
        place, size, can_split = item
        # Tokens per domain once all remaining domains have equally many.
        level = (room + sum(used[domain] for domain in streams)) // len(streams)
        share = min(room, max(2, level - used[name])) if can_split else room
        if size > share and not can_split:
            del streams[name]
            continue
        if size > share:
            size = truncated[place] = share
        yield place, size
        used[name] += size
        room -= size
