"""What a study reads off a run folder or a preflight, and what it says about all of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collegium.run_folder import read_json

Values = dict[str, float | None]


@dataclass(frozen=True)
class Found:
    """One row of a study: measures by name, and further levels that the run itself brought."""

    values: Values
    levels: Mapping[str, str] = field(default_factory=dict)


def run_row(folder: Path) -> Found:
    """The measures of a finished run: its student, its fused target, its cache, its time."""
    rows = read_json(folder / "results.json")
    student = next(row for row in rows if row["kind"] == "student")
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
    return Found(values)


def preflight_rows(report: Mapping[str, Any]) -> list[Found]:
    """One row per fusion that a preflight compared, named as it is there."""
    found = []
    for entry in report["fusions"]:
        values: Values = {
            "calibration_nll": entry["nll"],
            "rank_correlation": entry.get("rank_correlation"),
            "best_teacher_share": entry.get("best_teacher_share"),
            "regret": (entry.get("regret") or {}).get("constant"),
        }
        levels = {"fusion": family(entry), "calibration": entry["calibration"]}
        found.append(Found(values, levels))
    return found


def family(entry: Mapping[str, Any]) -> str:
    """A fusion without its fitted numbers, so that those of two preflights can be compared: `gate, linear`."""
    weighting = entry["fusion"]["weighting"]
    chosen = ("form", "granularity", "eta", "decay")
    options = [
        f"{key}={weighting[key]}"
        for key in chosen
        if key in weighting and weighting["name"] != "gate"
    ]
    name = weighting["name"] + (f"({', '.join(options)})" if options else "")
    return f"{name}, {entry['fusion']['pool']}"


def _bytes_per_token(cache: Path) -> float | None:
    """Of all folders that a student reads: one, or one for each teacher."""
    manifests = sorted(cache.rglob("manifest.json"))
    found = [read_json(path) for path in manifests if path.parent.name != "calibration"]
    sized = [m for m in found if m.get("num_targets")]
    return sum(m["num_bytes"] / m["num_targets"] for m in sized) if sized else None


def _tokens_per_s(log: Path) -> float | None:
    """Median over the logged steps."""
    if not log.is_file():
        return None
    lines = [
        json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    speeds = [line["tokens_per_s"] for line in lines if line.get("tokens_per_s")]
    return statistics.median(speeds) if speeds else None


@dataclass(frozen=True)
class Summary:
    """One measure of one setting over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """None where no seed has it."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None for fewer than two seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def summarize(rows: Sequence[Mapping[str, Any]], measure: str) -> Summary:
    """The values of a measure in these rows, those that are known."""
    found = (row["values"].get(measure) for row in rows)
    return Summary(tuple(value for value in found if value is not None))


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation in [-1, 1], equal values sharing the mean of their ranks; None where it is not defined.

    rho = cov(rank x, rank y) / (sd(rank x) sd(rank y)).
    """
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return statistics.correlation(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    below = [sum(other < value for other in values) for value in values]
    equal = [sum(other == value for other in values) for value in values]
    return [b + (e - 1) / 2 for b, e in zip(below, equal, strict=True)]
