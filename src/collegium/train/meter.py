"""Loss statistics accumulated between two rows of the training log, and the log itself.

Shapes: N rows, K teachers, M domains.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collegium.storage.files import write_text
from collegium.storage.records import ConflictEffect, LogStep, LossMeans, read_log
from collegium.types import LossSum


class StepMeter:
    """Accumulates the sums of the objective on the device until a log row is due."""

    def __init__(
        self,
        teachers: Sequence[str],
        *,
        domains: Sequence[str] = (),
        sample_domains: Tensor | None = None,
    ) -> None:
        self.num_tokens = 0
        self._teachers = list(teachers)
        self._domains = list(domains)
        self._sample_domains = sample_domains
        self._clear()

    def _clear(self) -> None:
        self._rows = 0
        self._sums: dict[str, Tensor] = {}
        self._term_weights: dict[str, float] = {}
        # Unlike `_rows`, not restored by a resume: the clock runs for this process only.
        self._timed_rows = 0
        self._started = time.monotonic()

    def add(self, loss: LossSum) -> None:
        """Add one micro-batch."""
        samples_N = loss.rows.samples
        self.num_tokens += loss.num_rows
        self._rows += loss.num_rows
        self._timed_rows += loss.num_rows
        self._term_weights = dict(loss.weights)
        self._add("loss", loss.total.detach())
        for name, value in loss.terms.items():
            self._add(f"terms/{name}", value)
        for name, norm in loss.grad_norms.items():
            self._add(f"grad_norms/{name}", norm)
        if loss.teacher_weights_KN is not None:
            self._add("teachers", loss.teacher_weights_KN.sum(1))
            self._add_domains("domains", loss.teacher_weights_KN, samples_N)
            ones_N = torch.ones_like(samples_N, dtype=torch.float32)
            self._add_domains("domain_rows", ones_N, samples_N)
        for name, value_N in loss.conflict.items():
            self._add(f"conflict/{name}", value_N.sum())
            self._add_domains(f"conflict_domains/{name}", value_N[None], samples_N)

    def _add(self, name: str, value: Tensor) -> None:
        total = self._sums.get(name)
        # No `.item()` here: every micro-batch would wait for the device.
        value = value.detach().float()
        self._sums[name] = value.clone() if total is None else total + value

    def _add_domains(self, name: str, values: Tensor, samples_N: Tensor) -> None:
        """Sum (..., N) values into (..., M)."""
        if self._sample_domains is None:
            return
        self._sample_domains = self._sample_domains.to(samples_N.device)
        # Not `bincount`, which synchronizes with the device to size its output.
        sums = values.new_zeros(*values.shape[:-1], len(self._domains))
        self._add(name, sums.index_add(-1, self._sample_domains[samples_N], values))

    def row(self, gather: Callable[[Any], list[Any]] = lambda value: [value]) -> LossMeans:
        """Return the means since the last row over all processes, and reset.

        `gather` collects one value of every process.
        """
        parts = gather((self.state(), self._timed_rows))
        num_tokens = sum(state["num_tokens"] for state, _ in parts)
        timed_rows = sum(timed for _, timed in parts)
        if len(parts) > 1:
            self._sums, self._rows = _total([state for state, _ in parts])
        rows = max(self._rows, 1)
        norms = self._named("grad_norms/")
        total_norm = sum(norms.values())
        seconds = max(time.monotonic() - self._started, 1e-9)
        loss = self._sums.get("loss")
        is_measured = total_norm > 0
        row = LossMeans(
            loss=0.0 if loss is None else loss.item() / rows,
            tokens_per_s=timed_rows / seconds,
            num_tokens=num_tokens,
            terms={name: value / rows for name, value in self._named("terms/").items()},
            term_weights=self._term_weights,
            grad_shares={n: norm / total_norm for n, norm in norms.items()} if is_measured else {},
            teacher_weights=self._teacher_weights(rows),
            domain_weights=self._domain_weights(),
            conflict=self._conflict(rows),
        )
        self._clear()
        return row

    def _named(self, prefix: str) -> dict[str, float]:
        sums = {n: v for n, v in self._sums.items() if n.startswith(prefix)}
        return {name.removeprefix(prefix): value.item() for name, value in sums.items()}

    def _teacher_weights(self, rows: int) -> dict[str, float]:
        if "teachers" not in self._sums:
            return {}
        sums = self._sums["teachers"].tolist()
        return {name: value / rows for name, value in zip(self._teachers, sums, strict=True)}

    def _domain_weights(self) -> dict[str, dict[str, float]]:
        if "domains" not in self._sums:
            return {}
        counts = self._sums["domain_rows"].tolist()
        columns = self._sums["domains"].t().tolist()
        return {
            domain: {name: v / count for name, v in zip(self._teachers, column, strict=True)}
            for domain, count, column in zip(self._domains, counts, columns, strict=True)
            if count > 0
        }

    def _conflict(self, rows: int) -> ConflictEffect:
        means = {name: value / rows for name, value in self._named("conflict/").items()}
        if not means or "domain_rows" not in self._sums:
            return ConflictEffect.model_validate(means)
        counts = self._sums["domain_rows"].tolist()
        columns = {name: self._sums[f"conflict_domains/{name}"][0].tolist() for name in means}
        domains = {
            domain: {name: column[m] / counts[m] for name, column in columns.items()}
            for m, domain in enumerate(self._domains)
            if counts[m] > 0
        }
        return ConflictEffect.model_validate({**means, "domains": domains})

    def state(self) -> dict[str, Any]:
        """Return the state from which a resumed run continues the current row."""
        return {
            "num_tokens": self.num_tokens,
            "rows": self._rows,
            "term_weights": self._term_weights,
            "sums": {name: value.tolist() for name, value in self._sums.items()},
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore the return value of `state`."""
        self._clear()
        self.num_tokens = int(state["num_tokens"])
        self._rows = int(state["rows"])
        self._term_weights = dict(state["term_weights"])
        self._sums = {
            name: torch.tensor(value, dtype=torch.float32, device=device)
            for name, value in state["sums"].items()
        }


def _total(states: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Tensor], int]:
    """Add the sums and row counts of several processes."""
    sums: dict[str, Tensor] = {}
    for state in states:
        for name, value in state["sums"].items():
            tensor = torch.tensor(value, dtype=torch.float32)
            sums[name] = sums[name] + tensor if name in sums else tensor
    return sums, sum(state["rows"] for state in states)


class RunLog:
    """`log.jsonl`: one JSON object per logged step, without duplicates."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: LogStep) -> None:
        """Append one row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    def truncate(self, step: int) -> None:
        """Drop the rows after `step`, which a resumed run writes again."""
        if not self.path.exists():
            return
        kept = [row for row in read_log(self.path) or () if row.step <= step]
        write_text(self.path, "".join(map(_line, kept)))


def _line(row: LogStep) -> str:
    return json.dumps(row.to_json(), allow_nan=False) + "\n"
