"""Loss statistics accumulated between two rows of the training log, and the log itself.

Shapes: N rows, K teachers, M domains.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from collegium.errors import TrainingError
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
        for kind, values in {"terms": loss.terms, "grad_norms": loss.grad_norms}.items():
            for name, value in values.items():
                self._add(f"{kind}/{name}", value)
        if loss.teacher_weights_KN is not None:
            self._add("teachers", loss.teacher_weights_KN.sum(1))
            self._add_domains("domains", loss.teacher_weights_KN, samples_N)
            ones_N = torch.ones_like(samples_N, dtype=torch.float32)
            self._add_domains("domain_rows", ones_N, samples_N)
        for name, value_N in loss.conflict.items():
            self._add(f"conflict/{name}", value_N.sum())
            self._add_domains(f"conflict_domains/{name}", value_N[None], samples_N)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of an evaluation out of the speed of training."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._started += time.monotonic() - began

    def add_loss(self, value: Tensor) -> None:
        """Add a sum over the rows of the last micro-batch to its loss."""
        self._add("loss", value)

    def _add(self, name: str, value: Tensor) -> None:
        # No `.item()` here: every micro-batch would wait for the device.
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()

    def _add_domains(self, name: str, values: Tensor, samples_N: Tensor) -> None:
        """Sum (..., N) values into (..., M)."""
        if self._sample_domains is None:
            return
        self._sample_domains = self._sample_domains.to(samples_N.device)
        # Not `bincount`, which synchronizes with the device to size its output.
        sums = values.new_zeros(*values.shape[:-1], len(self._domains))
        self._add(name, sums.index_add(-1, self._sample_domains[samples_N], values))

    def row(self) -> LossMeans:
        """Return the means since the last row over all processes, and reset."""
        states, timed_rows = zip(*gather_object([(self.state(), self._timed_rows)]), strict=True)
        total = merged_state(states)
        sums, rows = total["sums"], max(total["rows"], 1)
        norms = _named(sums, "grad_norms/")
        total_norm = sum(norms.values())
        seconds = max(time.monotonic() - self._started, 1e-9)
        teachers = zip(self._teachers, sums.get("teachers", ()), strict=False)
        columns = zip(self._teachers, sums.get("domains", ()), strict=False)
        conflict: dict[str, Any] = {n: x / rows for n, x in _named(sums, "conflict/").items()}
        rates = {name: value[0] for name, value in _named(sums, "conflict_domains/").items()}
        if rates:
            conflict["domains"] = self._by_domain(sums, rates)
        row = LossMeans(
            loss=sums.get("loss", 0.0) / rows,
            tokens_per_s=sum(timed_rows) / seconds,
            num_tokens=total["num_tokens"],
            terms={name: value / rows for name, value in _named(sums, "terms/").items()},
            term_weights=total["term_weights"],
            grad_shares={n: x / total_norm for n, x in norms.items()} if total_norm > 0 else {},
            teacher_weights={name: value / rows for name, value in teachers},
            domain_weights=self._by_domain(sums, dict(columns)),
            conflict=ConflictEffect.model_validate(conflict),
        )
        self._clear()
        return row

    def _by_domain(
        self, sums: Mapping[str, Any], columns: Mapping[str, Sequence[float]]
    ) -> dict[str, dict[str, float]]:
        """Means of (M,) sums over the rows of each domain that has some."""
        counts = zip(self._domains, sums.get("domain_rows", ()), strict=False)
        return {
            domain: {name: column[m] / count for name, column in columns.items()}
            for m, (domain, count) in enumerate(counts)
            if count > 0
        }

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


def merged_state(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sum of the states of all processes, which rank 0 resumes from."""
    sums: dict[str, Tensor] = {}
    num_tokens = rows = 0
    weights: dict[str, float] = {}
    for one in states:
        num_tokens, rows = num_tokens + one["num_tokens"], rows + one["rows"]
        weights = weights or one["term_weights"]
        for name, value in one["sums"].items():
            tensor = torch.tensor(value, dtype=torch.float32)
            sums[name] = sums[name] + tensor if name in sums else tensor
    plain = {name: total.tolist() for name, total in sums.items()}
    return {"num_tokens": num_tokens, "rows": rows, "term_weights": weights, "sums": plain}


def _named(sums: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): value for n, value in sums.items() if n.startswith(prefix)}


@dataclass(frozen=True)
class RunLog:
    """`log.jsonl`: one JSON object per logged step, without duplicates."""

    path: Path

    def append(self, row: LogStep) -> None:
        """Append one row. Raises TrainingError if the folder was deleted."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(row))
        except FileNotFoundError as error:
            raise TrainingError(
                f"{self.path.parent}: was deleted or moved during training; must stay in place; "
                "run the same command again"
            ) from error

    def restore(self, checkpoint: Path | None, step: int) -> None:
        """Start with the rows up to `step`, from the verified copy in its checkpoint if it has one.

        Later rows are dropped: a resumed run writes them again.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A link would lead the rows into a file of somebody else.
        if self.path.is_symlink():
            self.path.unlink()
        copy = None if checkpoint is None else read_log(checkpoint / self.path.name)
        rows = copy if copy is not None else read_log(self.path)
        if rows is not None:
            kept = [row for row in rows if row.step <= step]
            write_text(self.path, "".join(map(_line, kept)))

    def copy_to(self, checkpoint: Path) -> None:
        """Copy the log into a checkpoint, whose manifest protects it."""
        if self.path.is_file():
            shutil.copyfile(self.path, checkpoint / self.path.name)


def _line(row: LogStep) -> str:
    return json.dumps(row.to_json(), allow_nan=False) + "\n"
