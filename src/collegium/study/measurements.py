"""Measures read from run folders and preflights, and their statistics over seeds."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from collegium.evaluate.tasks import TASK_METRICS
from collegium.preflight.weight_quality import rank_correlation
from collegium.report.formats import fixed, percent, perplexity, whole
from collegium.report.task_tables import TITLES
from collegium.storage import records


@dataclass(frozen=True)
class Measure:
    """A measure of a study: its label, and how a table writes it."""

    label: str
    is_lower_better: bool = False
    write: Callable[[float | None], str] = fixed
    digits: int = 3
    """Digits of its standard deviation."""


_coarse = partial(fixed, digits=1)
MEASURES = {
    # Of a finished run
    "fused_nll": Measure("NLL of the fused target", True),
    "student_nll": Measure("NLL of the student", True),
    "student_perplexity": Measure("perplexity of the student", True, perplexity, 1),
    "student_bits_per_byte": Measure("bits per byte of the student", True),
    "student_ece": Measure("ECE of the student"),
    "student_agreement": Measure("agreement with the fused target", False, percent, 3),
    "student_parameters": Measure("parameters", False, whole, 0),
    "student_overconfidence": Measure("NLL − H of the student"),
    "student_kl": Measure("KL(fused target, student)", True),
    "student_bleu": Measure("BLEU of continuations", False, _coarse, 1),
    "student_rouge_l": Measure("ROUGE-L of continuations (legacy)", False, percent, 3),
    "student_distinct_2": Measure("distinct bigrams of continuations", False, percent, 3),
    "student_repetition": Measure("repetition in continuations", True, percent, 3),
    "bytes_per_token": Measure("bytes per target", False, _coarse, 1),
    "tokens_per_s": Measure("target tokens per second", False, _coarse, 1),
    "train_seconds": Measure("seconds of training", False, _coarse, 1),
    # Of a fusion that a preflight compared
    "calibration_nll": Measure("NLL of the fused target on the calibration split", True),
    "rank_correlation": Measure("rank correlation of weight and −NLL"),
    "best_teacher_share": Measure("P(highest weight = best teacher)"),
    "regret": Measure("regret against the best constant weights", True),
}
"""`NAME@DOMAIN` is the value on one domain. Tasks have the measures `task_TASK_METRIC` besides."""
# results.json has other measures per domain as well, but studies read only these.
BY_DOMAIN = ("fused_nll", "student_nll", "student_perplexity")


TASK_MODELS = {
    "": ("student", "student"),
    "fused_": ("fused", "fused target"),
    "teacher_": ("teacher", "best teacher"),
}
"""Prefix of a measure of tasks -> kind of the models that it is the highest score of, and label."""
_TASK_MEASURE = re.compile(rf"({'|'.join(TASK_MODELS)})task_(.+)_({'|'.join(TASK_METRICS)})")


def find_measure(name: str) -> Measure | None:
    """Return a measure by its name without a domain, None if there is none."""
    if (match := _TASK_MEASURE.fullmatch(name)) is None:
        return MEASURES.get(name)
    prefix, task, metric = match.groups()
    model = f" of the {TASK_MODELS[prefix][1]}" if prefix else ""
    unit = "" if metric == "bleu" else ", %"
    return Measure(f"{task}: {TITLES[metric]}{model}{unit}", False, _coarse, 1)


def measure_of(name: str) -> Measure:
    """Return the measure that a study names, which may be on one domain."""
    measure = find_measure(name.partition("@")[0])
    assert measure is not None
    return measure


def measure_label(name: str) -> str:
    """Return the label of a measure, such as `NLL of the student on code`."""
    _, at, domain = name.partition("@")
    return measure_of(name).label + (f" on {domain}" if at else "")


def run_values(folder: Path) -> records.Numbers:
    """Read the measures of a finished run: student, fused target, cache size and time."""
    rows = records.read_record(folder / "results.json", list[records.ResultRow]) or []
    student = next(row for row in rows if row.kind == "student")
    # A run without teachers has no fused target.
    fused = next((row for row in rows if row.kind == "fused"), records.ModelScores())
    values = {
        "fused_nll": fused.nll,
        "student_nll": student.nll,
        "student_perplexity": student.perplexity,
        "student_bits_per_byte": student.bits_per_byte,
        "student_ece": student.ece,
        "student_agreement": student.agreement_fused,
        "student_parameters": student.num_parameters,
        "student_overconfidence": student.overconfidence,
        "student_kl": student.kl_to_fused,
        "bytes_per_token": _bytes_per_token(folder),
        "tokens_per_s": _tokens_per_s(folder),
        "train_seconds": student.train_seconds,
    }
    generated = records.read_record(folder / "generation.json", records.TaskResults)
    for row in generated.rows if generated else ():
        if row.kind == "student":
            values |= {f"student_{name}": score.value for name, score in row.scores.items()}
    for path in sorted((folder / "tasks").glob("*.json")):
        values |= _task_values(path.stem, records.open_record(path, records.TaskResults))
    for domain, score in student.domains.items():
        values[f"student_nll@{domain}"] = score.nll
        values[f"student_perplexity@{domain}"] = score.perplexity
    for domain, score in fused.domains.items():
        values[f"fused_nll@{domain}"] = score.nll
    return values


def _task_values(task: str, results: records.TaskResults) -> Iterator[tuple[str, float | None]]:
    for prefix, (kind, _) in TASK_MODELS.items():
        scores: dict[str, list[float]] = {}
        for row in results.rows:
            for metric, score in row.scores.items() if row.kind == kind else ():
                factor = 1 if metric == "bleu" else 100
                scores.setdefault(metric, []).append(factor * (score.value or 0.0))
        for metric, values in scores.items():
            yield f"{prefix}task_{task}_{metric}", max(values)


def preflight_values(
    report: records.PreflightReport,
) -> Iterator[tuple[dict[str, str], records.Numbers]]:
    """Yield the levels and measures of each fusion that a preflight compared."""
    for candidate in report.fusions:
        values = {
            "calibration_nll": candidate.nll,
            "rank_correlation": candidate.rank_correlation,
            "best_teacher_share": candidate.best_teacher_share,
            "regret": (candidate.regret or {}).get("constant"),
        }
        yield {"fusion": family(candidate), "calibration": candidate.calibration or ""}, values


def family(candidate: records.CandidateFusion) -> str:
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
    paths = [path for path in paths if path.parent.name != "calibration"]
    manifests = [records.open_record(path, dict[str, Any]) for path in paths]
    sized = [m for m in manifests if m.get("num_targets")]
    return sum(m["num_bytes"] / m["num_targets"] for m in sized) if sized else None


def _tokens_per_s(folder: Path) -> float | None:
    # The median over logged steps ignores a slow first step.
    log = records.read_log(folder / "train" / "log.jsonl") or ()
    speeds = [line.tokens_per_s for line in log if line.tokens_per_s]
    return statistics.median(speeds) if speeds else None


def by_setting(
    rows: Sequence[records.StudyRow], factors: Sequence[str]
) -> dict[str, list[records.StudyRow]]:
    """Group the rows by setting, named by its levels, in order of first appearance."""
    groups: dict[str, list[records.StudyRow]] = {}
    for row in rows:
        name = " · ".join(row.levels[factor] for factor in factors if factor in row.levels)
        groups.setdefault(name, []).append(row)
    return groups


def seed_values(rows: Sequence[records.StudyRow], measure: str) -> list[float]:
    """Return the values of a measure in these rows, one per seed, without missing ones."""
    values = (row.values.get(measure) for row in rows)
    return [value for value in values if value is not None]


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation in [-1, 1], or None where it is not defined.

    rho = cov(rank x, rank y) / (sd(rank x) sd(rank y)). Ties share the mean of their ranks.
    """
    # Two points always give +1 or -1.
    if len(x) < 3:
        return None
    columns = torch.tensor([x, y], dtype=torch.float64)[..., None]
    return rank_correlation(columns[0], -columns[1])
