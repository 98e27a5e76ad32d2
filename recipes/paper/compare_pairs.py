"""Differences of students that were evaluated on the same text under other file names.

    python recipes/paper/compare_pairs.py runs/study/distillm2/runs distillm-2 average-live-teachers

A study pairs documents by their id, which names their file, and generate_pairs.py copies held-out
documents into files of its own. So these are paired by their place: the order of documents follows
from their content, and sizes and domains must be equal.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from collegium.evaluate.documents import DOCUMENTS
from collegium.evaluate.intervals import Sums, document_interval, seed_interval

STUDENT = "nll/student (distilled)"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, help="folder `runs` of the study")
    parser.add_argument("of", help="setting, as in the names of the folders")
    parser.add_argument("minus", help="another setting")
    options = parser.parse_args()
    strata = []
    for folder in sorted(options.runs.glob(f"{options.of}_seed*")):
        seed = folder.name.rpartition("_")[2]
        strata.append(difference(folder, options.runs / f"{options.minus}_{seed}"))
    means = [float(total.sum() / count.sum()) for total, count in strata]
    print(f"{options.of} - {options.minus}: {np.mean(means):+.3f} nats; by seed", means)
    print("95 %, documents:", document_interval(strata), "seeds:", seed_interval(means))


def difference(of: Path, minus: Path) -> Sums:
    """Sum NLL(of) - NLL(minus) over each document, and its tokens."""
    tables = [pq.read_table(folder / DOCUMENTS) for folder in (of, minus)]
    for column in ("domain", "num_tokens"):
        left, right = (table[column].to_pylist() for table in tables)
        assert left == right, f"{of} and {minus}: other documents"
    nll = [np.array(table[STUDENT].to_pylist()) for table in tables]
    return nll[0] - nll[1], np.array(tables[0]["num_tokens"].to_pylist(), np.int64)


if __name__ == "__main__":
    main()
