"""The encoded corpus of a run: an artifact that other runs may share, and its check."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from collegium.console import progress, say
from collegium.data.corpus import SAMPLE_DOCUMENTS, encode_corpus
from collegium.data.pool import num_cores
from collegium.data.sources import raise_refused
from collegium.data.windows import PackedDataset
from collegium.report.formats import amount, duration
from collegium.run.artifact import Artifact
from collegium.run.context import RunContext
from collegium.run.problems import CheckReport
from collegium.storage.records import FileDigest


class EncodedCorpus(Artifact[Mapping[str, PackedDataset]]):
    """The tokens of all sources, in a folder named by the digest of its inputs."""

    stage = "corpus"

    @property
    def path(self) -> Path:
        return self.context.corpus.folder

    def identity(self) -> Any:
        return self.context.corpus.identity()

    def is_done(self) -> bool:
        """Return True if it is finished, by this run or by another, and no file is damaged."""
        return self.context.corpus.manifest() is not None

    def build(self) -> None:
        corpus = self.context.corpus
        if changed := corpus.changed_sources():
            say(f"corpus: {changed}; encoded again")
        with progress(self.stage) as advance:
            corpus.build(on_progress=advance)
        say(f"corpus: {corpus.line()}")

    def digests(self) -> Mapping[str, FileDigest]:
        """Return nothing: its manifest has the digests, which several runs share."""
        return {}

    def set_aside(self) -> None:
        """Keep corpora of earlier recipes where they are: their folders have other names."""

    def log(self) -> AbstractContextManager[None]:
        """Record the stage, unless processes that share no log build together."""
        return nullcontext() if self.context.is_uncoordinated else super().log()

    def open(self) -> Mapping[str, PackedDataset]:
        return self.context.whole_datasets


def check_sample(context: RunContext, report: CheckReport) -> None:
    """Encode the first documents of each source, and estimate disk and time of the whole corpus.

    Raises DataError if a source cannot be read, or a document cannot be encoded.
    """
    store, recipe = context.corpus, context.recipe
    started = time.perf_counter()
    sample = encode_corpus(
        recipe.data,
        context.whole_tokenizer,
        where="data",
        teachers=list(recipe.teachers),
        limit=SAMPLE_DOCUMENTS,
    )
    seconds = time.perf_counter() - started
    raise_refused(sample.errors(), len(sample.rows), where="data")
    num_bytes = store.num_bytes()
    if num_bytes is None or not len(sample.tokens):
        report.lines.append("corpus: of unknown size (a dataset of the hub), encoded by the run")
        return
    per_byte = len(sample.tokens) / max(1, int(sample.tokens[:]["num_bytes"].sum()))
    num_tokens = num_bytes * per_byte
    size = num_tokens * sample.bytes_per_token()
    time_left = seconds * num_tokens / len(sample.tokens) / num_cores()
    report.lines.append(
        f"corpus: roughly {amount(num_tokens)} tokens, {size / 1e9:.1f} GB in {store.root}, "
        f"{duration(time_left)} to encode, by the first documents of each source; the other "
        "checks of the text follow then"
    )
    limit = recipe.data.max_train_tokens
    if limit is not None and 10 * limit < num_tokens:
        report.warnings.append(
            f"data.max_train_tokens: {limit:,} of roughly {amount(num_tokens)} tokens, all of "
            "which are encoded first; give the sources a `limit`"
        )
    disk = next(p for p in (store.root, *store.root.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(disk).free
    if size > free:
        report.warnings.append(
            f"corpus: takes roughly {size / 1e9:.1f} GB in {store.root}, which has "
            f"{free / 1e9:.1f} GB free; set another `data.corpus`"
        )
