"""Recover the int4 export of a student whose weights are damaged for 4 bits and nothing else.

    python benchmarks/recovery.py runs/demo --out runs/recovery --factor 100 --steps 100

One column in 32 of the projections behind a norm is `factor` times as large, and its weight of it
as much smaller. The float student computes the same, while a group of 32 weights with such an
outlier has no levels left for the others. Works for students with the layer names of Llama.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from collegium.config.recipe import load_recipe
from collegium.run.exports import export_run
from collegium.storage.records import Verification
from collegium.train.checkpoint import MANIFEST, replace

BEHIND_NORM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
NEEDED = ("cache", "student", "train")
"""Folders of the run. Text and teachers stay where its recipe names them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--factor", type=float, default=100.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=None)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    for path in options.run.iterdir():
        if path.name in NEEDED:
            shutil.copytree(path, options.out / path.name)
        elif path.is_file():
            shutil.copyfile(path, options.out / path.name)
    damage(options.out / "student", options.factor)
    overrides = [f"output_dir={options.out}"]
    if options.learning_rate is not None:
        recover = f"{{steps: {options.steps}, learning_rate: {options.learning_rate}}}"
        overrides.append(f"export.recover={recover}")
    recipe = load_recipe(options.run / "recipe.yaml", overrides)
    info = export_run(recipe, ["torchao-int4"], recover=options.steps)["torchao-int4"]
    print("| torchao-int4 | bits/byte | KL | top-1 agreement |\n|---|---:|---:|---:|")
    if info.recovery is not None:
        print(row("before", info.recovery.before))
        print(row(f"after {options.steps} steps", info.recovery.after))
    else:
        print(row("without recovery", info.verification))


def damage(student: Path, factor: float) -> None:
    """Move scale from the norms of a student to one column of the layers behind them."""
    copied = student.with_name("damaged")
    shutil.copytree(student, copied)
    (copied / MANIFEST).unlink()
    weights = load_file(student / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("layernorm.weight"):
            tensor[3::32] /= factor
        elif any(part in name for part in BEHIND_NORM):
            tensor[:, 3::32] *= factor
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    replace(copied, student)


def row(name: str, measured: Verification) -> str:
    change = measured.bits_per_byte_change
    return f"| {name} | {change:+.4f} | {measured.kl:.4f} | {measured.top1_agreement:.1%} |"


if __name__ == "__main__":
    main()
