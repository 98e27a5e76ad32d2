"""Run the demo with several seeds and all controls, and print the table of docs/results/demo.md.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --out runs/demo-seeds

Each seed has its own teachers, student initialization and data order. Text, tokenizer and document
split are shared. Finished seeds are skipped. Keep the machine idle, as the table includes seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

CONTROLS = ["ce_only", "ce_only_equal_compute", "best_single", "uniform", "entropy"]
KINDS = ["untouched", "teacher", "fused", "control", "student"]
COLUMNS = {
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "overconfidence": "NLL - H",
    "ece": "ECE",
    "kl_to_fused": "KL to fused",
    "agreement_fused": "agreement",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/demo-seeds"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    folders = [run_seed(options.out, seed, quick=options.quick) for seed in options.seeds]
    table = markdown(folders)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table)


def run_seed(out: Path, seed: int, *, quick: bool) -> Path:
    """Run the demo for one seed in its own folder, and return the folder."""
    # Imported here, so that `--help` does not load PyTorch.
    from collegium.demo.run import run_demo

    folder = out / f"seed-{seed}"
    if not (folder / "report.html").is_file():
        # The text does not depend on the seed, so a copy saves the download.
        first = next((other for other in sorted(out.glob("seed-*")) if other != folder), None)
        if first is not None and not (folder / "text").exists():
            shutil.copytree(first / "text", folder / "text")
        run_demo(quick=quick, output_dir=folder, seed=seed, controls=CONTROLS)
    return folder


def markdown(folders: list[Path]) -> str:
    """Return mean and standard deviation over seeds for each row, and the NLL gaps per seed."""
    runs = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    by_name: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for row in run:
            by_name.setdefault(_stable_name(row), []).append(row)
    rows = sorted(by_name.values(), key=lambda group: KINDS.index(group[0]["kind"]))
    lines = ["| model | parameters | steps | " + " | ".join(COLUMNS.values()) + " | seconds |"]
    lines.append("|---|" + "---:|" * (len(COLUMNS) + 3))
    for group in rows:
        cells = [
            _stable_name(group[0]),
            _count(group[0]["num_parameters"]),
            _count(group[0]["steps"]),
        ]
        cells += [_spread([row[key] for row in group]) for key in COLUMNS]
        cells.append(_spread([row["train_seconds"] for row in group], digits=0))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_paired(by_name)]
    return "\n".join(lines) + "\n"


def _paired(by_name: dict[str, list[dict[str, Any]]]) -> list[str]:
    # Paired by seed: controls of a seed share its teachers, start and data order with the student.
    student = next(rows for rows in by_name.values() if rows[0]["kind"] == "student")
    lines = [
        "| compared with | its NLL minus the NLL of the student, per seed | mean |",
        "|---|---|---:|",
    ]
    for name, rows in by_name.items():
        if rows[0]["kind"] in ("control", "fused", "teacher"):
            gaps = [row["nll"] - ours["nll"] for row, ours in zip(rows, student, strict=True)]
            cells = ", ".join(f"{gap:+.3f}" for gap in gaps)
            lines.append(f"| {name} | {cells} | {statistics.fmean(gaps):+.3f} |")
    return lines


def _stable_name(row: dict[str, Any]) -> str:
    # Controls carry details that vary by seed: the best single teacher and the compute ratio.
    return row["name"].partition(" (")[0] if row["kind"] == "control" else row["name"]


def _spread(values: list[float | None], digits: int = 3) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    mean = statistics.fmean(numbers)
    if abs(mean) >= 20:
        digits = min(digits, 1)
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


if __name__ == "__main__":
    main()
