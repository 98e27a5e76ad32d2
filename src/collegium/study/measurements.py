"""Measures read from run folders and preflights, and their statistics over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collegium.storage.files import read_json

Values = dict[str, float | None]


@dataclass(frozen=True)
class Measurement:
    """Measures of one study row by name, and levels that the run itself adds."""

    values: Values
    levels: Mapping[str, str] = field(default_factory=dict)


def run_row(folder: Path) -> Measurement:
    """Read the measures of a finished run: student, fused target, cache size and time."""
    rows = read_json(folder / "results.json")
    student = next(row for row in rows if row["kind"] == "student")
    # A run without teachers has no fused target.
    fused = next((row for row in rows if row["kind"] == "fused"), {})
    values: Values = {
        "fused_nll": fused.get("nll"),
        "student_nll": student["nll"],
        "student_perplexity": student["perplexity"],
        "student_ece": student["ece"],
        "student_overconfidence": student["overconfidence"],
        "student_kl": student["kl_to_fused"],
        "bytes_per_token": _bytes_per_token(folder / "cache"),
        "tokens_per_s": _tokens_per_s(folder / "train" / "log.jsonl"),
        "train_seconds": student["train_seconds"],
    }
    for domain, scores in student["domains"].items():
        values[f"student_nll@{domain}"] = scores["nll"]
        values[f"student_perplexity@{domain}"] = scores["perplexity"]
    for domain, scores in fused.get("domains", {}).items():
        values[f"fused_nll@{domain}"] = scores["nll"]
    return Measurement(values)


def preflight_rows(report: Mapping[str, Any]) -> list[Measurement]:
    """Return one row per fusion that a preflight compared, with its name as a level."""
    measurements = []
    for entry in report["fusions"]:
        values: Values = {
            "calibration_nll": entry["nll"],
            "rank_correlation": entry.get("rank_correlation"),
            "best_teacher_share": entry.get("best_teacher_share"),
            "regret": (entry.get("regret") or {}).get("constant"),
        }
        levels = {"fusion": family(entry), "calibration": entry["calibration"]}
        measurements.append(Measurement(values, levels))
    return measurements


def family(entry: Mapping[str, Any]) -> str:
    """Name a fusion without its fitted numbers, such as `gate, linear`."""
    # Fitted numbers differ between seeds, but the seeds of a setting must share a name.
    weighting = entry["fusion"]["weighting"]
    configured = ("form", "granularity", "eta", "decay")
    options = [
        f"{key}={weighting[key]}"
        for key in configured
        if key in weighting and weighting["name"] != "gate"
    ]
    name = weighting["name"] + (f"({', '.join(options)})" if options else "")
    return f"{name}, {entry['fusion']['pool']}"


def _bytes_per_token(cache: Path) -> float | None:
    # A fused cache has one manifest, per-teacher caches have one each. A student reads them all.
    paths = sorted(cache.rglob("manifest.json"))
    # Only preflight reads the calibration split.
    manifests = [read_json(path) for path in paths if path.parent.name != "calibration"]
    sized = [m for m in manifests if m.get("num_targets")]
    return sum(m["num_bytes"] / m["num_targets"] for m in sized) if sized else None


def _tokens_per_s(log: Path) -> float | None:
    # The median over logged steps ignores a slow first step.
    if not log.is_file():
        return None
    lines = [
        json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    speeds = [line["tokens_per_s"] for line in lines if line.get("tokens_per_s")]
    return statistics.median(speeds) if speeds else None


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


def summarize(rows: Sequence[Mapping[str, Any]], measure: str) -> Summary:
    """Collect the values of a measure in these rows, without missing ones."""
    values = (row["values"].get(measure) for row in rows)
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
