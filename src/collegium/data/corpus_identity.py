"""The identity of a corpus: everything that the tokens of its documents depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.data.corpus import flat_sources
from collegium.data.remote import copy_of
from collegium.data.sources import DataOptions, source_files, source_values
from collegium.options import plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

LAYOUT_ONLY = frozenset(
    {
        "corpus",
        "split_seed",
        "calibration_fraction",
        "validation_fraction",
        "packing",
        "max_train_tokens",
        "max_calibration_tokens",
        "max_validation_tokens",
    }
)
"""Data options that the tokens of a document do not depend on."""


def corpus_identity(
    options: DataOptions, tokenizer: Tokenizer, where: str, digest_of: Callable[[Path], str]
) -> dict[str, Any]:
    """Return everything that the tokens of the documents depend on, as plain data."""
    values: Mapping[str, Any] = plain(options)
    without = LAYOUT_ONLY.union(options.sources)
    sources = []
    for place, source in flat_sources(options, where):
        files = source_files(source, place)
        # A hub dataset is what was read first: pin its `revision` to name the content.
        remote = source.url and copy_of(source.url, place)
        name_of = remote.name_of if remote else str
        content = None if files is None else [[name_of(f), digest_of(f)] for f in files]
        sources.append({"place": place, "options": source_values(plain(source)), "files": content})
    return {
        "options": {name: value for name, value in values.items() if name not in without},
        "sources": sources,
        "tokenizer": _tokenizer_digest(tokenizer),
    }


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Both change with each call, and neither is used here.
    backend |= {"truncation": None, "padding": None}
    settings = [backend, tokenizer.chat_template, dict(tokenizer.special_tokens_map)]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def changed_files(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the source files whose content differs between two identities."""
    old, new = (
        {name: sha for source in one.get("sources", ()) for name, sha in source["files"] or ()}
        for one in (before, now)
    )
    return sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
