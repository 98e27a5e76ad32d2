"""NLL of every model by document, for paired intervals: `documents.parquet`.

Columns: `document` (id), `domain`, `num_tokens`, and `nll/MODEL`, the sum over the tokens of the
document in nats.

Shapes: N rows (target tokens), D documents.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collegium.errors import CollegiumError
from collegium.evaluate.intervals import Sums
from collegium.evaluate.metrics import Metrics

DOCUMENTS = "documents.parquet"


def documents_file(metrics: Mapping[str, Metrics], names: Sequence[str]) -> bytes:
    """Serialize the sums of all models; `names` has the id of each document of the dataset."""
    targets = next(iter(metrics.values())).targets
    number_D, document_N, count_D = np.unique(
        targets.samples_N, return_inverse=True, return_counts=True
    )
    domain_D = np.zeros(len(number_D), np.int64)
    domain_D[document_N] = targets.domains_N
    columns = {
        "document": [names[number] for number in number_D],
        "domain": [targets.domains[number] for number in domain_D],
        "num_tokens": count_D,
    }
    for name, scored in metrics.items():
        columns[f"nll/{name}"] = np.bincount(document_N, scored.nll_N, len(number_D))
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()


def difference_sums(
    file: Path, model: str, other_file: Path, other: str, domains: Collection[str] = ()
) -> Sums:
    """Sum NLL(model) - NLL(other) over each document of some domains or of all, and its tokens.

    Raises:
        CollegiumError: a file cannot be read, has no such model or domain, or has other documents
            or tokens.
    """
    left, right = _sums(file, model, domains), _sums(other_file, other, domains)
    if not left:
        raise CollegiumError(
            f"{file}: has no document of {', '.join(domains)}; must have some; name other domains"
        )
    if left.keys() != right.keys() or any(left[key][1] != right[key][1] for key in left):
        raise CollegiumError(
            f"{file}: got other documents than {other_file}; must be the same text, tokenizer and "
            "validation split; run both with the same `data` and seed"
        )
    totals = np.array([nll - right[key][0] for key, (nll, _) in left.items()])
    return totals, np.array([count for _, count in left.values()], np.int64)


def _sums(file: Path, model: str, domains: Collection[str]) -> dict[str, tuple[float, int]]:
    try:
        table = pq.read_table(file, columns=["document", "num_tokens", f"nll/{model}", "domain"])
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        problem = str(error).partition("\n")[0]
        raise CollegiumError(
            f"{file}: cannot be read ({problem}); must be the sums by document of an evaluation; "
            "evaluate the run again"
        ) from error
    columns = (column.to_pylist() for column in table.columns)
    return {
        name: (nll, count)
        for name, count, nll, domain in zip(*columns, strict=True)
        if not domains or domain in domains
    }
