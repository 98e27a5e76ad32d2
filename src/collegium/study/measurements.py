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

from collegium.config.recipe import Recipe
from collegium.evaluate.tasks import TASK_METRICS
from collegium.losses.row_terms import CrossEntropyTerm, RouterTerm
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
    "teacher_passes": Measure(
        "teacher passes per trained token", True, partial(fixed, digits=2), 2
    ),
    "objective": Measure("objective at the end of training"),
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


def run_values(recipe: Recipe) -> records.Numbers:
    """Read the measures of a finished run: student, fused target, cache size and cost."""
    folder = recipe.output_dir
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
        "bytes_per_token": _bytes_per_token(recipe),
        "tokens_per_s": _tokens_per_s(folder),
        "train_seconds": student.train_seconds,
        "teacher_passes": teacher_passes(recipe, student.steps, student.train_tokens),
        "objective": _final_objective(folder),
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


def teacher_passes(recipe: Recipe, steps: int | None, train_tokens: int | None) -> float | None:
    """Return the target tokens that teachers read for a student over those that it trained on.

    K live teachers give K, less for steps without a term that reads them. A cache is read many
    times but costs one pass per teacher and token of the corpus, whatever the number of students.
    """
    placed = [one.term for one in recipe.objective.placed_terms()]
    terms = [term for term in placed if not isinstance(term, CrossEntropyTerm | RouterTerm)]
    if not recipe.teachers or not terms:
        return 0.0
    if recipe.cache.enabled:
        cached = sum(manifest["num_targets"] for manifest in _cache_manifests(recipe))
        passes = len(recipe.teachers) if recipe.cache.kind == "fused" else 1
        return passes * cached / train_tokens if cached and train_tokens else None
    if not steps:
        return None
    active = sum(any(term.factor_at(step, steps) > 0 for term in terms) for step in range(steps))
    return len(recipe.teachers) * active / steps


def _bytes_per_token(recipe: Recipe) -> float | None:
    # A fused cache has one manifest, per-teacher caches have one each. A student reads them all.
    sized = [one for one in _cache_manifests(recipe) if one["num_targets"]]
    return sum(one["num_bytes"] / one["num_targets"] for one in sized) if sized else None


def _cache_manifests(recipe: Recipe) -> list[Mapping[str, Any]]:
    """Return the manifests of the caches of the training split, of the teachers of the recipe."""
    root = recipe.cache.path or recipe.output_dir / "cache"
    folders = [root / "teachers" / name / "train" for name in recipe.teachers]
    if recipe.cache.kind == "fused":
        folders = [root]
    read = (records.read_record(path / "manifest.json", dict[str, Any]) for path in folders)
    return [manifest for manifest in read if manifest]


def _final_objective(folder: Path) -> float | None:
    # The mean over the last tenth of the run: a single logged step is noisy.
    log = records.read_log(folder / "train" / "log.jsonl") or ()
    losses = [line.loss for line in log if line.loss is not None]
    return statistics.fmean(losses[-max(1, len(losses) // 10) :]) if losses else None


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
