"""Collator of windows into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from collegium.errors import DataError
from collegium.types import IGNORE, Batch

_COLUMNS = ("input_ids", "labels", "position_ids", "sample_ids", "attention_mask", "num_bytes")


@dataclass(frozen=True, slots=True)
class Collator:
    """Collator of windows, or of ordinary Hugging Face items, into (B, T) tensors.

    RecordArray are padded on the right to the longest. Padding, added here or marked by an
    `attention_mask` of 0, has label `IGNORE`, sample -1 and positions that restart at 0, so it
    counts as one more document.
    """

    # No attention mask is returned: models of transformers 5 keep documents apart by the restarts
    # of `position_ids` (checked when a model is loaded).

    pad_token_id: int = 0

    def __call__(self, items: Sequence[dict[str, object]]) -> dict[str, torch.Tensor]:
        """Collate items of (T_i,) tensors or lists into (B, T) int64 tensors.

        Raises:
            DataError: an item has no `input_ids` or no `labels`, or columns of unequal length.
        """
        rows = [_complete_item(item, number) for number, item in enumerate(items)]
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE, "sample_ids": -1}
        columns = {
            name: pad_sequence(
                [row[name] for row in rows], batch_first=True, padding_value=fill.get(name, 0)
            )
            for name in rows[0]
            if all(name in row for row in rows)
        }
        # Given a mask, the batch separates documents and padding by positions.
        batch = Batch.from_inputs(columns)
        del columns["attention_mask"]
        separated = {"position_ids": batch.position_ids, "sample_ids": batch.sample_ids}
        return {**columns, **separated, "labels": batch.labels}


def _complete_item(item: dict[str, object], number: int) -> dict[str, torch.Tensor]:
    if missing := {"input_ids", "labels"} - {*item}:
        raise DataError(
            f"batch item {number}: `{min(missing)}` is missing (has: {', '.join(item)}); must "
            "have `input_ids` and `labels`"
        )
    names = (*_COLUMNS, "domain_ids", "teacher_ids")
    row = {n: torch.as_tensor(item[n], dtype=torch.int64) for n in names if n in item}
    size = len(row["input_ids"])
    row.setdefault("position_ids", torch.arange(size))
    row.setdefault("sample_ids", torch.full((size,), number))
    row.setdefault("attention_mask", torch.ones(size, dtype=torch.int64))
    if ragged := [name for name, values in row.items() if values.shape != (size,)]:
        raise DataError(
            f"batch item {number}: `{ragged[0]}` has shape {tuple(row[ragged[0]].shape)}; "
            f"must be ({size},) like `input_ids`"
        )
    row["attention_mask"] = row["attention_mask"].masked_fill(row["sample_ids"] < 0, 0)
    return row
