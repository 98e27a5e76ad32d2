"""Digests of all files of a set of small runs: the proof that a refactoring changes nothing.

    python benchmarks/fingerprints.py run FOLDER [--source SRC] > after.json
    python benchmarks/fingerprints.py compare before.json after.json

The runs: `demo --quick`, and on its teachers one run with each kind of cache, one with features, a
conflict policy and a route, and three live ones over further pools, divergences and policies. They
use one thread, because sums that are split over threads round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMON = """
name: {name}
output_dir: runs/{name}
seed: 3
student:
  config:
    {{model_type: llama, hidden_size: 64, intermediate_size: 160, num_hidden_layers: 2,
    num_attention_heads: 4, num_key_value_heads: 4, max_position_embeddings: 128,
    tie_word_embeddings: true}}
  tokenizer: runs/demo-quick/tokenizer
teachers:
  python: {{model: runs/demo-quick/teachers/python/student}}
  reference: {{model: runs/demo-quick/teachers/reference/student}}
  tables: {{model: runs/demo-quick/teachers/tables/student}}
data:
  train:
    - {{path: runs/demo-quick/text/python.jsonl, domain: python}}
    - {{path: runs/demo-quick/text/reference.jsonl, domain: reference}}
    - {{path: runs/demo-quick/text/tables.jsonl, domain: tables}}
  max_length: 128
  max_train_tokens: 20000
  max_calibration_tokens: 4000
  max_validation_tokens: 4000
train:
  {{learning_rate: 4e-3, max_steps: 30, per_device_train_batch_size: 4,
  gradient_accumulation_steps: 2, warmup_steps: 5, logging_steps: 5, save_steps: 20}}
preflight: {{max_tokens: 3000, batch_size: 16, candidates: standard}}
"""
RUNS = {
    "fused-samples": """
fusion: {weighting: prefix_likelihood}
cache: {enabled: true, kind: fused}
evaluate: {controls: [ce_only, best_single], batch_size: 16}
""",
    "fused-top-k": """
fusion:
  weighting: {name: entropy, granularity: sequence}
  pool: log_linear
  pooled_temperature: 1.2
cache: {enabled: true, kind: fused, targets: {name: top_k, k: 20}}
evaluate: {controls: [], batch_size: 16}
""",
    "per-teacher": """
fusion: {weighting: prefix_likelihood, temperatures: {python: 1.5}}
cache: {enabled: true, kind: per_teacher, temperatures: [1.5]}
evaluate: {controls: [uniform], batch_size: 16}
""",
    "per-teacher-features": """
fusion: {weighting: uniform}
cache: {enabled: true, kind: per_teacher, features: {rank: 32}}
objective: {features: {num_layers: 2, layers: uniform}}
evaluate: {controls: [], batch_size: 16}
""",
    "route": """
fusion:
  weighting: {name: route, default: python, domains: {tables: tables}}
  conflict: {name: target_correction}
objective: {kd_ratio: 0.8, features: {loss: cosine, weight: 0.5}}
evaluate: {controls: [], batch_size: 16}
""",
    "live-reverse": """
fusion:
  weighting: {name: entropy, form: inverse}
  pool: log_linear
  temperatures: {tables: 0.8}
  conflict: {name: truth_fallback}
objective: {kd_ratio: 0.7, divergence: reverse_kl, features: {}}
evaluate: {controls: [], batch_size: 16}
""",
    "live-forward": """
fusion:
  weighting: consensus
  pool: power_mean
  pooled_temperature: 0.9
  conflict: {name: consistent_subset}
objective: {kd_ratio: 0.9, temperature: 2.0}
evaluate: {controls: [], batch_size: 16}
""",
    "live-auto": """
objective: {kd_ratio: 0.9, divergence: {name: skewed_forward_kl, skew: 0.2}}
evaluate: {controls: [entropy], batch_size: 16}
""",
}
NAMES = {
    "recipe.json",
    "results.json",
    "preflight.json",
    "log.jsonl",
    "model.safetensors",
    "manifest.json",
    "features.json",
}
TIMES = {"seconds", "tokens_per_s", "train_seconds", "started"}


def without_times(value: Any) -> Any:
    """Remove the fields that differ between two runs of the same code."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def digest(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        texts = data.splitlines() if path.suffix == ".jsonl" else [data]
        lines = [json.dumps(without_times(json.loads(text)), sort_keys=True) for text in texts]
        data = "\n".join(lines).encode()
    return hashlib.sha256(data).hexdigest()


def run(folder: Path, source: Path | None, only: list[str]) -> dict[str, str]:
    """Run everything in `folder`; return the digests of the files by their path."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if source is not None:
        env["PYTHONPATH"] = str(source.resolve())
    folder.mkdir(parents=True, exist_ok=True)

    def command(*arguments: str) -> None:
        print(*arguments, file=sys.stderr, flush=True)
        subprocess.run(
            [sys.executable, "-m", "collegium.cli", *arguments],
            cwd=folder,
            env=env,
            check=True,
            stdout=subprocess.DEVNULL,
        )

    if not only or "demo" in only:
        command("demo", "--quick")
    for name, text in RUNS.items():
        if not only or name in only:
            recipe = folder / f"{name}.yaml"
            recipe.write_text(COMMON.format(name=name) + text, encoding="utf-8")
            command("run", recipe.name)
    runs = folder / "runs"
    return {
        str(path.relative_to(runs)): digest(path)
        for path in sorted(runs.rglob("*"))
        if (path.name in NAMES or path.suffix == ".parquet") and "checkpoint-" not in str(path)
    }


def compare(before: dict[str, str], after: dict[str, str]) -> bool:
    """Print a line for each difference, and return whether there is none."""
    differences = {name for name in before | after if before.get(name) != after.get(name)}
    for name in sorted(differences):
        kind = "new" if name not in before else "gone" if name not in after else "differs"
        print(f"{kind:8} {name}")
    print(f"{len(before) - len(differences & set(before))} of {len(before)} files are equal")
    return not differences


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run")
    runner.add_argument("folder", type=Path)
    runner.add_argument("--source", type=Path, help="src folder of another checkout")
    runner.add_argument("--only", nargs="*", default=[], choices=["demo", *RUNS])
    comparer = commands.add_parser("compare")
    comparer.add_argument("files", type=Path, nargs=2)
    arguments = parser.parse_args()
    if arguments.command == "run":
        print(json.dumps(run(arguments.folder, arguments.source, arguments.only), indent=1))
    else:
        before, after = (json.loads(file.read_text(encoding="utf-8")) for file in arguments.files)
        sys.exit(not compare(before, after))


if __name__ == "__main__":
    main()
