"""Speed and memory of the student, its exports and its teachers, each in a process of its own."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collegium.console import OnProgress
from collegium.errors import ExportError
from collegium.export.process import run_foreign
from collegium.storage.records import MeasuredModel, Speed

BATCH_SIZES = (1, 8)


@dataclass(frozen=True)
class Served:
    """A model that could be served."""

    name: str
    kind: str
    """`student`, `export` or `teacher`."""
    source: Mapping[str, Any]
    """Its location, as `foreign.load` reads it."""
    bits_per_byte: float | None = None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What each model does in a round."""

    vocab_size: int
    """Ids below it are read."""
    prompt_tokens: int
    new_tokens: int
    threads: int


def measure_models(
    models: Sequence[Served],
    workload: Workload,
    *,
    rounds: int,
    advance: OnProgress = lambda done, total: None,
) -> list[MeasuredModel]:
    """Time every model `rounds` times, in turn, and return medians over the rounds.

    A new process for each model and round: no model finds the memory, caches or threads of another,
    and a slow phase of the machine meets all of them. A model that cannot be loaded gets a note.
    """
    answers: dict[str, list[dict[str, Any]]] = {model.name: [] for model in models}
    notes: dict[str, str] = {}
    advance(0, rounds * len(models))
    for number in range(rounds):
        for index, model in enumerate(models):
            if model.name not in notes:
                try:
                    answers[model.name].append(_measure(model, workload))
                except ExportError as error:
                    notes[model.name] = str(error)
            advance(number * len(models) + index + 1, rounds * len(models))
    return [_record(model, answers[model.name], notes.get(model.name)) for model in models]


def _measure(model: Served, workload: Workload) -> dict[str, Any]:
    request = {
        "task": "measure",
        "model": dict(model.source),
        "vocab_size": workload.vocab_size,
        "prompt_tokens": workload.prompt_tokens,
        "new_tokens": workload.new_tokens,
        "batch_sizes": list(BATCH_SIZES),
    }
    return run_foreign(request, where=model.name, threads=workload.threads)


def _record(model: Served, answers: Sequence[dict[str, Any]], note: str | None) -> MeasuredModel:
    values: dict[str, Any] = {"name": model.name, "kind": model.kind, "note": note}
    values["bytes"] = bytes_of(model.source)
    values["bits_per_byte"] = model.bits_per_byte
    if answers and note is None:
        for key in ("peak_bytes", "first_token_s"):
            values[key] = statistics.median(answer[key] for answer in answers)
        values["peak_bytes"] = round(values["peak_bytes"])
        values["speeds"] = {
            str(size): Speed(
                prefill_tokens_per_s=statistics.median(a["speeds"][str(size)][0] for a in answers),
                decode_tokens_per_s=statistics.median(a["speeds"][str(size)][1] for a in answers),
            )
            for size in BATCH_SIZES
        }
    return MeasuredModel(**values)


def bytes_of(source: Mapping[str, Any]) -> int:
    """Return the size of the files that hold the weights of a model."""
    folder = Path(source["folder"])
    if file := source.get("file"):
        return sum(path.stat().st_size for path in folder.glob(f"{file}*"))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
