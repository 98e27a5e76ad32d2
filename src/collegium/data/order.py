"""Split and order of the documents of a corpus, by a hash of their content and a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from collegium.data.corpus import DocumentNames, TokenCorpus, source_parts
from collegium.data.sources import DataOptions, Part
from collegium.errors import DataError

PARTS: tuple[Part, ...] = ("train", "calibration", "validation")
_KEY = np.dtype("S14")
_CHUNK = 2**16


def split_of(content_hash: str, seed: int, calibration: float, validation: float) -> Part:
    """Assign a document to a split, as a function of its content and the seed only.

    u = SHA-256(seed, content) in [0, 1). The split is validation if u < validation, calibration if
    u < validation + calibration, else train. Identical documents always get the same split.
    """
    share = int.from_bytes(seeded_hash(content_hash, seed, "split"), "big") / 2**64
    if share < validation:
        return "validation"
    return "calibration" if share < validation + calibration else "train"


def seeded_hash(content_hash: str, seed: int, purpose: str) -> bytes:
    """Return 8 bytes that depend on the content, the seed and the purpose."""
    return hashlib.sha256(f"{purpose}:{seed}:{content_hash}".encode()).digest()[:8]


@dataclass(frozen=True)
class OrderedDocuments:
    """The documents of a part in their order, 14 bytes each.

    A key is the hash that orders (8 bytes), the number in the corpus (4) and the number of the
    domain (2), big-endian, so that keys compare as strings.
    """

    keys: np.ndarray
    """(documents,) of bytes."""
    domains: Sequence[str]
    """Names of the domains of the corpus."""

    def __len__(self) -> int:
        return len(self.keys)

    def hashes(self, span: slice = slice(None)) -> np.ndarray:
        """Return the hashes, (documents,) uint64."""
        return self._field(span, 0, ">u8").astype(np.uint64)

    def numbers(self, span: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Return the numbers in the corpus, (documents,) int64."""
        return self._field(span, 8, ">u4").astype(np.int64)

    def domain_numbers(self, span: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Return the numbers of the domains, (documents,) int64."""
        return self._field(span, 12, ">u2").astype(np.int64)

    def _field(self, span: slice | np.ndarray, start: int, dtype: str) -> np.ndarray:
        rows = self.keys.view(np.uint8).reshape(-1, _KEY.itemsize)[span]
        stop = start + np.dtype(dtype).itemsize
        return np.ascontiguousarray(rows[:, start:stop]).view(dtype)[:, 0]


def order_documents(
    corpus: TokenCorpus, options: DataOptions, *, where: str
) -> dict[Part, OrderedDocuments]:
    """Split the documents of a corpus, and order each part.

    Raises DataError if a part is empty, or two parts share documents.
    """
    domains: dict[str, int] = {}
    keys = _keys(corpus, options, domains)
    _check_not_empty({part: len(one) // _KEY.itemsize for part, one in keys.items()}, where)
    ordered: dict[Part, OrderedDocuments] = {}
    for part in PARTS:
        # Sorted in place: with a copy, the keys would take twice the memory.
        sorted_keys = np.frombuffer(keys.pop(part), _KEY)
        sorted_keys.sort()
        ordered[part] = OrderedDocuments(sorted_keys, [*domains])
        _break_ties(ordered[part], corpus)
    if options.calibration or options.validation:  # else the parts are disjoint by their hashes
        _check_disjoint(ordered, corpus, where)
    return ordered


def _keys(
    corpus: TokenCorpus, options: DataOptions, domains: dict[str, int]
) -> dict[Part, bytearray]:
    keys: dict[Part, bytearray] = {part: bytearray() for part in PARTS}
    parts, seed = source_parts(options), options.split_seed
    calibration = 0.0 if options.calibration else options.calibration_fraction
    validation = 0.0 if options.validation else options.validation_fraction
    starts, _ = corpus.starts
    for shard, first in enumerate(starts[:-1]):
        rows = corpus.rows[first : starts[shard + 1]]
        names = corpus.strings[shard].domains
        numbers = [domains.setdefault(name, len(domains)).to_bytes(2, "big") for name in names]
        contents = rows["content"].tobytes().hex()
        places = zip(rows["source"].tolist(), rows["domain"].tolist(), strict=True)
        for index, (source, domain) in enumerate(places):
            content = contents[64 * index : 64 * index + 64]
            part = parts[source]
            if part == "train":
                part = split_of(content, seed, calibration, validation)
            keys[part] += seeded_hash(content, seed, "order")
            keys[part] += (first + index).to_bytes(4, "big") + numbers[domain]
    return keys


def _check_not_empty(counts: Mapping[Part, int], where: str) -> None:
    for part, count in counts.items():
        if not count:
            remedy = f"raise `{part}_fraction`, add `{part}` sources"
            raise DataError(
                f"{where}.{part}: got no document (of {sum(counts.values()):,}); must have at "
                f"least one; {'lower the fractions' if part == 'train' else remedy}, or split the "
                "texts with `split_on: blank_line`"
            )


def _break_ties(ordered: OrderedDocuments, corpus: TokenCorpus) -> None:
    """Order documents of equal content by their id and domain."""
    names, keys = DocumentNames(corpus), ordered.keys
    hashes = ordered.hashes()
    ties = np.flatnonzero(hashes[1:] == hashes[:-1])
    if not len(ties):
        return
    # Runs of equal hashes: a tie that does not continue the one before starts a run.
    starts = ties[np.append(True, np.diff(ties) > 1)]
    stops = ties[np.append(np.diff(ties) > 1, True)] + 2
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        span = slice(start, stop)
        places = zip(ordered.numbers(span), ordered.domain_numbers(span), strict=True)
        by_name = [(names[int(n)], ordered.domains[domain]) for n, domain in places]
        keys[span] = keys[span][sorted(range(stop - start), key=by_name.__getitem__)]


def _check_disjoint(
    ordered: Mapping[Part, OrderedDocuments], corpus: TokenCorpus, where: str
) -> None:
    """Check that parts with sources of their own share no content with another part."""
    for earlier, later in combinations(PARTS, 2):
        hashes = ordered[later].hashes()
        is_shared = np.zeros(len(hashes), bool)
        for start in range(0, len(ordered[earlier]), _CHUNK):
            # Both are sorted, so only documents in the range of the chunk can be in it.
            chunk = ordered[earlier].hashes(slice(start, start + _CHUNK))
            low, high = (
                np.searchsorted(hashes, chunk[0]),
                np.searchsorted(hashes, chunk[-1], "right"),
            )
            is_shared[low:high] |= np.isin(hashes[low:high], chunk)
        if is_shared.any():
            first = int(ordered[later].numbers(is_shared).min())
            raise DataError(
                f"{where}.{later}: got documents that also occur in {earlier}: "
                f"{int(is_shared.sum()):,} of {len(hashes):,} (first: "
                f"{DocumentNames(corpus)[first]}); must be disjoint; remove them from one of the "
                "two"
            )
