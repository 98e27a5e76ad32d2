"""Teachers and targets read from a cache.

Shapes: N rows, D width of a hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from collegium.cache.codecs.targets import TargetCodec
from collegium.cache.keys import BatchKeys
from collegium.cache.options import capabilities_of
from collegium.cache.store import CacheReader
from collegium.distributions import Answer, Capabilities, NamedRows
from collegium.errors import CacheError, RecipeError
from collegium.fusion.fuse import FinishedTarget
from collegium.teachers.prefetch import Prefetcher
from collegium.types import Batch, Rows


class CachedTargets:
    """The finished targets of a fused cache. Windows of a batch may be in any order."""

    def __init__(self, cache: CacheReader[NamedRows], documents: Sequence[str]) -> None:
        """Read from `cache`. `documents` has the ids of the sample numbers of a batch."""
        keys = BatchKeys(documents)
        self._read = Prefetcher(lambda batch: cache.read(keys(batch)))
        self.capabilities = _capabilities(cache)

    def prefetch(self, batch: Batch) -> None:
        """Start to read the targets of a batch."""
        self._read.prefetch(batch)

    def target(self, batch: Batch, rows: Rows) -> FinishedTarget:
        """Return the targets of all rows. Raises CacheError if a piece of the batch is missing."""
        named = self._read(batch)
        assert len(named) == len(rows)  # the mask of the rows is part of every key
        return FinishedTarget(named.to(batch.input_ids.device))


class CachedTeacher:
    """The stored distributions, and hidden states, of one teacher."""

    def __init__(
        self,
        name: str,
        cache: CacheReader[NamedRows],
        keys: BatchKeys,
        hidden: CacheReader[dict[str, Tensor]] | None = None,
    ) -> None:
        """Read distributions from `cache`, and (N, D) hidden states by tap from `hidden`.

        The teachers of one data set share `keys`.
        """
        self.name = name
        self.capabilities = _capabilities(cache, has_features=hidden is not None)
        self._hidden = hidden
        self._read = Prefetcher(lambda batch: cache.read(keys(batch)))
        self._read_hidden = Prefetcher(lambda batch: hidden.read(keys(batch)) if hidden else {})

    def prefetch(self, batch: Batch) -> None:
        """Start to read the answer for a batch."""
        self._read.prefetch(batch)
        if self._hidden is not None:
            self._read_hidden.prefetch(batch)

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> Answer:
        """Return the stored answer. Raises CacheError, or RecipeError without hidden states."""
        named = self._read(batch)
        assert len(named) == len(rows)  # the mask of the rows is part of every key
        device = batch.input_ids.device
        features = {tap: states.to(device) for tap, states in self._states(batch, taps).items()}
        return Answer(self.name, named.to(device), features)

    def _states(self, batch: Batch, taps: Sequence[str]) -> dict[str, Tensor]:
        if not taps:
            return {}
        if self._hidden is None:
            raise RecipeError(
                "objective.features: the cache holds no hidden states; omit it, or set "
                "cache.features"
            )
        states = self._read_hidden(batch)
        missing = [tap for tap in taps if tap not in states]
        if missing:
            raise CacheError(
                f"{self._hidden.location}: holds {', '.join(states)}; must hold {missing[0]}; "
                "build the cache again from this recipe"
            )
        return {tap: states[tap] for tap in taps}


def _capabilities(cache: CacheReader[NamedRows], *, has_features: bool = False) -> Capabilities:
    codec = cache.codec
    assert isinstance(codec, TargetCodec)
    return capabilities_of(codec.kind, codec.targets, codec.temperatures, has_features=has_features)
