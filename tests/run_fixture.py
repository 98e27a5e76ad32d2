"""A synthetic run folder: four teachers, four domains, a student and two controls."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TEACHERS = ("gutenberg", "newsroom", "encyclopedia", "python-source")
DOMAINS = ("fiction", "news", "wiki", "code")
CONTROLS = ("ce_only", "uniform")
TITLES = {"ce_only": "CE only, equal steps", "uniform": "uniform weights"}
RECIPE = """\
name: specialists
seed: 1
student:
  config: {model_type: llama, hidden_size: 128, num_hidden_layers: 4}
fusion:
  weighting: {name: prefix_likelihood, eta: 0.1, decay: 0.95}
  pool: linear
objective:
  kd_ratio: 0.9
  temperature: 1.0
"""


def write_run(
    folder: Path,
    *,
    teachers: Sequence[str] = TEACHERS,
    domains: Sequence[str] = DOMAINS,
    controls: Sequence[str] = CONTROLS,
    steps: int = 90,
    recipe: str = RECIPE,
) -> Path:
    """Write all files that a report reads, with made-up numbers in the real formats."""
    rng = random.Random(7)
    (folder / "train").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    write_json(folder / "environment.json", _environment())
    write_json(folder / "stages.json", _stages(controls))
    write_json(folder / "preflight.json", _preflight(teachers, domains, rng))
    write_json(folder / "results.json", _results(teachers, domains, controls, rng))
    write_log(folder / "train", [_log(i, steps, teachers, domains, rng) for i in range(steps)])
    for name in controls:
        names = teachers if name != "ce_only" else ()
        lines = [_log(i, steps, names, domains, rng, lag=0.12) for i in range(steps)]
        write_log(folder / "controls" / name.replace("/", "_") / "train", lines)
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_log(folder: Path, lines: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text, encoding="utf-8")


def _environment() -> dict[str, Any]:
    return {
        "python": "3.11.9",
        "platform": "Linux x86_64",
        "processor": "a processor",
        "cpus": 2,
        "packages": {"collegium": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    }


def _stages(controls: Sequence[str]) -> dict[str, Any]:
    times = {"check": 3.2, "preflight": 61.0, "train": 155.2}
    times |= {f"control {name}": 142.0 for name in controls} | {"evaluate": 48.8}
    stages: dict[str, Any] = {
        name: {
            "status": "done",
            "started": f"2026-01-05T10:{i:02d}:00Z",
            "seconds": s,
            "note": None,
        }
        for i, (name, s) in enumerate(times.items())
    }
    stages["report"] = {
        "status": "running",
        "started": "2026-01-05T10:30:00Z",
        "seconds": None,
        "note": None,
    }
    return stages


def _preflight(
    teachers: Sequence[str], domains: Sequence[str], rng: random.Random
) -> dict[str, Any]:
    measures = {}
    for i, name in enumerate(teachers):
        by_domain = {
            d: 4.3 + (0.0 if i == j else 1.7) + 0.3 * rng.random() for j, d in enumerate(domains)
        }
        nll = sum(by_domain.values()) / max(1, len(by_domain))
        measures[name] = {
            "nll": nll,
            "perplexity": math.exp(nll),
            "entropy": nll - 1.2,
            "ece": 0.05 + 0.1 * rng.random(),
            "overconfidence": 1.2,
            "temperature": 1.4 + 0.2 * rng.random(),
            "top1": 0.18 + 0.05 * rng.random(),
            "domains": by_domain,
        }
    size = len(teachers)
    jsd = [[0.0 if i == j else 0.2 + 0.03 * abs(i - j) for j in range(size)] for i in range(size)]
    top1 = [[0.0 if i == j else 0.5 + 0.04 * abs(i - j) for j in range(size)] for i in range(size)]
    rules: list[dict[str, Any]] = [
        {"name": "domain_weights", "weights": {d: {t: 0.5 for t in teachers} for d in domains}},
        {"name": "uniform"},
        {"name": "entropy", "form": "softmax", "tau": 0.25},
        {"name": "gate", "offsets": {name: -0.1 for name in teachers}, "entropy": 0.5},
    ]
    ways = ("pooled", "raw", "temperatures", "temperatures+pooled")
    fusions = [
        {
            "name": rule["name"],
            "nll": 4.58 + 0.2 * i,
            "fusion": {"weighting": rule, "pool": "linear", "temperatures": {}},
            "calibration": way,
            "domains": {},
            "is_chosen": i == 0,
            "interval": [4.5 + 0.2 * i, 4.66 + 0.2 * i],
            "interval_to_chosen": [0.19 * i, 0.21 * i],
            "best_teacher_share": 0.6 - 0.1 * i,
            "rank_correlation": None if rule["name"] == "uniform" else 0.4 - 0.1 * i,
            "regret": {"constant": -0.3 + 0.2 * i, "per_token": 0.8},
        }
        for i, (rule, way) in enumerate(zip(rules, ways, strict=True))
    ]
    single = min(measures, key=lambda name: measures[name]["nll"], default=None)
    return {
        "num_tokens": 65_536,
        "seconds": 61.0,
        "teachers": measures,
        "disagreement": {"teachers": list(teachers), "jsd": jsd, "top1": top1},
        "fusions": fusions,
        "chosen": {
            "name": rules[0]["name"],
            "nll": 4.58,
            "fusion": fusions[0]["fusion"],
            "weights": {name: 1 / size for name in teachers},
            "leave_one_out": {name: 0.1 * i for i, name in enumerate(teachers)},
        },
        "held_out": _held_out(measures),
        "verdict": ["The chosen fusion is better than any single teacher (4.58 vs. 5.65 nats)."],
        "best_single": {"teacher": single, "nll": measures[single]["nll"]} if single else {},
    }


def _held_out(measures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    def figures(nll: float, gap: float) -> dict[str, Any]:
        halves = {"ece_over": max(0.0, gap) / 10, "ece_under": max(0.0, -gap) / 10}
        gaps = {"entropy": nll - gap, "overconfidence": gap, "ece": abs(gap) / 10, **halves}
        return {"nll": nll, **gaps}

    def whole(measure: Mapping[str, Any], gap: float) -> dict[str, Any]:
        domains = {domain: figures(nll, gap) for domain, nll in measure["domains"].items()}
        return {**figures(measure["nll"], gap), "domains": domains}

    teachers = {
        name: {
            "raw": whole(measure, 1.2),
            "temperature": measure["temperature"],
            "calibrated": whole(measure, 0.1),
        }
        for name, measure in measures.items()
    }
    fused = {**figures(4.6, -0.05), "domains": {}}
    return {"num_tokens": 65_536, "teachers": teachers, "fused": fused}


def _results(
    teachers: Sequence[str], domains: Sequence[str], controls: Sequence[str], rng: random.Random
) -> list[dict[str, Any]]:
    rows = [_row("student (untouched)", "untouched", 8.31, teachers, domains, rng)]
    for i, name in enumerate(teachers):
        rows.append(_row(name, "teacher", 5.4 + 0.12 * i, teachers, domains, rng, best_domain=i))
    if teachers:
        rows.append(_row("fused target", "fused", 4.576, teachers, domains, rng))
    rows.append(_row("student (distilled)", "student", 4.7707, teachers, domains, rng))
    for i, name in enumerate(controls):
        title = f"control: {TITLES.get(name, name)}"
        rows.append(_row(title, "control", 4.8535 + 0.21 * i, teachers, domains, rng))
    return rows


def _row(
    name: str,
    kind: str,
    nll: float,
    teachers: Sequence[str],
    domains: Sequence[str],
    rng: random.Random,
    *,
    best_domain: int | None = None,
) -> dict[str, Any]:
    is_trained = kind in ("student", "control")
    gap = {"teacher": 1.3, "fused": 0.1, "untouched": 0.02}.get(kind, 0.15)
    scores = {}
    for j, domain in enumerate(domains):
        value = nll + rng.uniform(-0.25, 0.25) - (0.9 if best_domain == j else 0.0)
        scores[domain] = {
            "nll": value,
            "perplexity": math.exp(value),
            "bits_per_byte": value / 2.4,
            "num_tokens": 5120,
        }
    entropy = [0.3 + 0.42 * i for i in range(15)]
    bent = (
        0.25 + 0.08 * (best_domain or 0)
        if kind == "teacher"
        else 0.06
        if kind == "student"
        else 0.0
    )
    hit = [max(0.02, 0.92 - bent - 0.06 * i + rng.uniform(-0.02, 0.02)) for i in range(15)]
    sure = [(i + 0.5) / 15 for i in range(15)]
    right = [min(1.0, max(0.0, c - bent * c)) for c in sure]
    empty = {14} if kind == "teacher" else set()
    return {
        "name": name,
        "kind": kind,
        "num_parameters": 2_561_280
        if kind == "teacher"
        else None
        if kind == "fused"
        else 1_102_464,
        "nll": nll,
        "perplexity": math.exp(nll),
        "bits_per_byte": nll / 2.4,
        "entropy": nll - gap,
        "overconfidence": gap,
        "ece": 0.02 + gap / 12,
        "top1": 0.31 - 0.02 * (nll - 4.5),
        "kl_to_fused": None if kind == "fused" else max(0.0, nll - 4.3),
        "agreement_fused": None if kind == "fused" else max(0.05, 0.62 - 0.1 * (nll - 4.5)),
        "agreement": {t: 0.3 + 0.2 * rng.random() for t in teachers} if kind != "teacher" else {},
        "acceptance": {
            t: {"value": 0.6 - 0.05 * i, "interval": [0.59 - 0.05 * i, 0.61 - 0.05 * i]}
            for i, t in enumerate(teachers)
            if kind not in ("teacher", "fused")
        },
        "num_tokens": 20_480,
        "num_bytes": 61_234,
        "steps": 900 if is_trained else None,
        "train_tokens": 1_843_200 if is_trained else None,
        "train_seconds": {"student": 155.2, "control": 142.0}.get(kind),
        "domains": scores,
        "reliability": {
            "confidence": [None if i in empty else c for i, c in enumerate(sure)],
            "accuracy": [None if i in empty else a for i, a in enumerate(right)],
            "count": [0 if i in empty else 1000 for i in range(15)],
        },
        "entropy_bins": {"entropy": entropy, "accuracy": hit, "nll": entropy, "count": [1365] * 15},
    }


def _log(
    i: int,
    steps: int,
    teachers: Sequence[str],
    domains: Sequence[str],
    rng: random.Random,
    *,
    lag: float = 0.0,
) -> dict[str, Any]:
    done = (i + 1) / steps
    size = len(teachers)
    ce = 4.5 + lag * (1 + len(teachers)) + 4.0 * math.exp(-4 * done) + rng.uniform(-0.08, 0.08)
    kd = 0.6 + 3.2 * math.exp(-4 * done) + rng.uniform(-0.05, 0.05)
    raw = [1 + 0.3 * math.sin(3 * done + k) for k in range(size)]
    terms = {"kd": kd, "ce": ce} if size else {"ce": ce}
    shares = {"kd": 0.9 - 0.2 * done, "ce": 0.1 + 0.2 * done} if size else {"ce": 1.0}
    by_domain = {
        d: {t: (0.8 if j == k else 0.2 / max(1, size - 1)) for k, t in enumerate(teachers)}
        for j, d in enumerate(domains)
    }
    return {
        "step": 10 * (i + 1),
        "epoch": 6 * done,
        "loss": 0.9 * kd + 0.1 * ce if size else ce,
        "learning_rate": 1e-3 * (1 - done),
        "grad_norm": 0.8,
        "tokens_per_s": (11_900 if size else 13_000) + rng.uniform(-400, 400),
        "num_tokens": 20_480 * (i + 1),
        "terms": terms,
        "term_weights": {"kd": 0.9, "ce": 0.1},
        "grad_shares": shares,
        "teacher_weights": {t: raw[k] / sum(raw) for k, t in enumerate(teachers)},
        "domain_weights": by_domain if size else {},
        "conflict": _conflict(domains, done) if size > 1 else {},
    }


def _conflict(domains: Sequence[str], done: float) -> dict[str, Any]:
    rates = {"disagreement": 0.2 + 0.1 * done, "applied": 0.1}
    return {**rates, "domains": {domain: rates for domain in domains}}
