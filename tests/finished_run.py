"""A finished run without training: its student, control and teachers are random tiny models.

Its folder has what the commands after a run read: recipe, sealed student, stages, results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import tiny
from collegium.config.recipe import dump_recipe, load_recipe
from collegium.options import plain
from collegium.storage.records import Stage
from collegium.storage.stages import STAGES, digests_of, sealed
from collegium.train import checkpoint
from run_fixture import write_run
from tiny_run import recipe_text, write_zoo

TEACHERS = ("scripture", "code")


def decided(folder: Path) -> Path:
    """Scale the matrices of a saved model: a random one of this size has near ties."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    return folder


def write_finished(root: Path, *overrides: str, chat: bool = False) -> Path:
    """Write the zoo and a finished run of it. Return the run folder."""
    write_zoo(root)
    for name in TEACHERS:
        decided(root / name)
    folder = write_run(root / "run", teachers=TEACHERS, domains=TEACHERS, controls=("ce_only",))
    (root / "recipe.yaml").write_text(recipe_text(root), encoding="utf-8")
    recipe = load_recipe(root / "recipe.yaml", ["fusion={weighting: uniform}", *overrides])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (folder / "recipe.json").write_text(json.dumps(plain(recipe), default=str), encoding="utf-8")

    def fill(seed: int) -> Any:
        return lambda place: decided(tiny.save_tiny(place, seed=seed, chat=chat))

    checkpoint.write(folder / "student", fill(5))
    checkpoint.write(folder / "controls" / "ce_only" / "student", fill(6))
    files = [path for path in (folder / "student").iterdir() if path.is_file()]
    results = Stage(status="done", files=digests_of(folder, [folder / "results.json"]))
    train = Stage(status="done", files=digests_of(folder, files))
    stages = {"train": train, "evaluate": results}
    entries = {name: sealed(name, one).to_json() for name, one in stages.items()}
    (folder / STAGES).write_text(json.dumps(entries), encoding="utf-8")
    return folder
