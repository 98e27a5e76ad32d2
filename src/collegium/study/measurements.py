"""Measures read from run folders and preflights, and their statistics over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from collegium.report.formats import fixed, perplexity
from collegium.storage.files import read_json
from collegium.storage.records import (
    CandidateFusion,
    ModelScores,
    Number,
    Numbers,
    PreflightReport,
    ResultRow,
    StudyRow,
    read_log,
    read_record,
)

T = TypeVar("T")


class RunParts(NamedTuple):
    """What the measures of a finished run are read from."""

    student: ResultRow
    fused: ModelScores
    folder: Path


@dataclass(frozen=True)
class Measure(Generic[T]):
    """A measure of a study: its label, where it is read, and how a table writes it."""

    label: str
    read: Callable[[T], Number]
    is_lower_better: bool = False
    write: Callable[[float | None], str] = fixed
    digits: int = 3
    """Digits of its standard deviation."""


_coarse = partial(fixed, digits=1)
RUN_MEASURES: dict[str, Measure[RunParts]] = {
    "fused_nll": Measure("NLL of the fused target", attrgetter("fused.nll"), True),
    "student_nll": Measure("NLL of the student", attrgetter("student.nll"), True),
    "student_perplexity": Measure(
        "perplexity of the student", attrgetter("student.perplexity"), True, perplexity, 1
    ),
    "student_ece": Measure("ECE of the student", attrgetter("student.ece")),
    "student_overconfidence": Measure(
        "NLL − H of the student", attrgetter("student.overconfidence")
    ),
    "student_kl": Measure("KL(fused target, student)", attrgetter("student.kl_to_fused"), True),
    "bytes_per_token": Measure(
        "bytes per target", lambda run: _bytes_per_token(run.folder), False, _coarse, 1
    ),
    "tokens_per_s": Measure(
        "target tokens per second", lambda run: _tokens_per_s(run.folder), False, _coarse, 1
    ),
    "train_seconds": Measure(
        "seconds of training", attrgetter("student.train_seconds"), False, _coarse, 1
    ),
}
PREFLIGHT_MEASURES: dict[str, Measure[CandidateFusion]] = {
    "calibration_nll": Measure(
        "NLL of the fused target on the calibration split", attrgetter("nll"), True
    ),
    "rank_correlation": Measure(
        "rank correlation of weight and −NLL", attrgetter("rank_correlation")
    ),
    "best_teacher_share": Measure(
        "P(highest weight = best teacher)", attrgetter("best_teacher_share")
    ),
    "regret": Measure(
        "regret against the best constant weights",
        lambda candidate: (candidate.regret or {}).get("constant"),
        True,
    ),
}
MEASURES: dict[str, Measure[Any]] = {**RUN_MEASURES, **PREFLIGHT_MEASURES}
"""`NAME@DOMAIN` is the value on one domain."""
# results.json has other measures per domain as well, but studies read only these.
BY_DOMAIN = ("fused_nll", "student_nll", "student_perplexity")


def measure_label(name: str) -> str:
    """Return the label of a measure, such as `NLL of the student on code`."""
    base, _, domain = name.partition("@")
    return MEASURES[base].label + (f" on {domain}" if domain else "")


def run_values(folder: Path) -> Numbers:
    """Read the measures of a finished run: student, fused target, cache size and time."""
    rows = read_record(folder / "results.json", list[ResultRow]) or []
    student = next(row for row in rows if row.kind == "student")
    # A run without teachers has no fused target.
    fused = next((row for row in rows if row.kind == "fused"), ModelScores())
    values = dict(_values(RUN_MEASURES, RunParts(student, fused, folder)))
    for domain, score in student.domains.items():
        values[f"student_nll@{domain}"] = score.nll
        values[f"student_perplexity@{domain}"] = score.perplexity
    for domain, score in fused.domains.items():
        values[f"fused_nll@{domain}"] = score.nll
    return values


def _values(measures: Mapping[str, Measure[T]], source: T) -> Numbers:
    return {name: measure.read(source) for name, measure in measures.items()}


def preflight_values(report: PreflightReport) -> Iterator[tuple[dict[str, str], Numbers]]:
    """Yield the levels and measures of each fusion that a preflight compared."""
    for candidate in report.fusions:
        levels = {"fusion": family(candidate), "calibration": candidate.calibration or ""}
        yield levels, _values(PREFLIGHT_MEASURES, candidate)


def family(candidate: CandidateFusion) -> str:
    """Name a fusion without its fitted numbers, such as `gate, linear`."""
    # Fitted numbers differ between seeds, but the seeds of a setting must share a name.
    weighting: Mapping[str, Any] = candidate.fusion["weighting"]
    name = weighting["name"]
    configured = () if name == "gate" else ("form", "granularity", "eta", "decay")
    options = ", ".join(f"{key}={weighting[key]}" for key in configured if key in weighting)
    return f"{f'{name}({options})' if options else name}, {candidate.fusion['pool']}"


def _bytes_per_token(folder: Path) -> float | None:
    # A fused cache has one manifest, per-teacher caches have one each. A student reads them all.
    paths = sorted((folder / "cache").rglob("manifest.json"))
    # Only preflight reads the calibration split.
    manifests = [read_json(path) for path in paths if path.parent.name != "calibration"]
    sized = [m for m in manifests if m.get("num_targets")]
    return sum(m["num_bytes"] / m["num_targets"] for m in sized) if sized else None


def _tokens_per_s(folder: Path) -> float | None:
    # The median over logged steps ignores a slow first step.
    log = read_log(folder / "train" / "log.jsonl") or ()
    speeds = [line.tokens_per_s for line in log if line.tokens_per_s]
    return statistics.median(speeds) if speeds else None


def by_setting(rows: Sequence[StudyRow], factors: Sequence[str]) -> dict[str, list[StudyRow]]:
    """Group the rows by setting, named by its levels, in order of first appearance."""
    groups: dict[str, list[StudyRow]] = {}
    for row in rows:
        name = " · ".join(row.levels[factor] for factor in factors if factor in row.levels)
        groups.setdefault(name, []).append(row)
    return groups


@dataclass(frozen=True)
class Summary:
    """Values of one measure of one setting, one per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Mean, or None if no seed has the measure."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation (n - 1), or None for fewer than two seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def summarize(rows: Sequence[StudyRow], measure: str) -> Summary:
    """Collect the values of a measure in these rows, without missing ones."""
    values = (row.values.get(measure) for row in rows)
    return Summary(tuple(value for value in values if value is not None))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation in [-1, 1], or None where it is not defined.

    rho = cov(rank x, rank y) / (sd(rank x) sd(rank y)). Ties share the mean of their ranks.
    """
    # Constant values have no ranks to correlate, and two points always give +1 or -1.
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return statistics.correlation(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    # Quadratic, which is fine for the few dozen settings of a study.
    below = [sum(other < value for other in values) for value in values]
    equal = [sum(other == value for other in values) for value in values]
    return [b + (e - 1) / 2 for b, e in zip(below, equal, strict=True)]
