"""Small teachers on real text whose strengths are known, because they were made so.

runs/zoo/text, tokenizer          as in the demo
runs/zoo/specialists-SEED/NAME    each has read one domain: the demo's own teachers
runs/zoo/generalists-SEED/NAME    each has read all domains; width, depth, architecture and seed differ
runs/zoo/contradicting-SEED/liar  as a generalist, but in one domain every label stands for another token
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from collegium import pipeline
from collegium.data.pack import PackedDataset
from collegium.demo.run import FULL, Plan, prepare_text, write_teacher_recipe
from collegium.recipe import load_recipe
from collegium.run_folder import RunFolder, fingerprint
from collegium.study.options import ZooName
from collegium.types import IGNORE, domain_number

ROOT = Path("runs") / "zoo"
LIE = "drama"
"""The domain in which the contradicting teacher has learned a permuted vocabulary."""
NAMES = {"scripture": "wide", "drama": "shallow", "encyclopedia": "neox", "python": "deep"}
"""Architecture of the specialist of a domain -> name of the generalist that shares it."""


def prepare_zoo(zoo: ZooName, seed: int, *, root: Path = ROOT, plan: Plan = FULL) -> Path:
    """Train the teachers of a zoo that are missing; returns the folder that holds one run folder per teacher.

    Raises:
        CollegiumError: the text cannot be fetched, or the folder cannot be used.
    """
    run = RunFolder(root)
    run.make()
    with run.lock():
        prepare_text(run, plan)
        for number, (name, config) in enumerate(_configs(zoo, plan).items()):
            place = root / f"{zoo}-{seed}" / name
            stage = f"{zoo}-{seed} {name}"
            key = fingerprint([name, dict(config), seed, plan.max_steps])
            if run.is_done(stage, key) and (place / "student").is_dir():
                continue
            with run.stage(stage, key):
                _train(zoo, plan, place, {name: config}, seed=_seed(zoo, seed, number))
    return root / f"{zoo}-{seed}"


def _configs(zoo: ZooName, plan: Plan) -> Mapping[str, Mapping[str, Any]]:
    if zoo == "specialists":
        return plan.specialists
    if zoo == "generalists":
        return {NAMES.get(domain, domain): config for domain, config in plan.specialists.items()}
    return {"liar": next(iter(plan.specialists.values()))}


def _seed(zoo: ZooName, seed: int, number: int) -> int:
    """Teachers of one zoo that have read the same differ in their start and the order of their text as well."""
    return {"specialists": 100 + seed, "generalists": 200 + 10 * seed + number}.get(zoo, 300 + seed)


def _train(
    zoo: ZooName, plan: Plan, place: Path, teacher: Mapping[str, Mapping[str, Any]], *, seed: int
) -> None:
    domains = () if zoo == "specialists" else tuple(plan.specialists)
    file = write_teacher_recipe(
        plan, place.parent.parent, place, teacher, seed=seed, domains=domains
    )
    if zoo != "contradicting":
        pipeline.train(load_recipe(file))
        return
    _train_liar(file)


def _train_liar(file: Path) -> None:
    """Plain cross-entropy, with the labels of one domain permuted."""
    # imported late: it takes longer than a whole check
    from collegium.train.objective import Objective
    from collegium.train.options import training_arguments
    from collegium.train.trainer import DistillTrainer
    from collegium.workspace import Workspace

    recipe = load_recipe(file)
    workspace = Workspace(recipe)
    student = workspace.new_student()
    place = recipe.output_dir
    trainer = DistillTrainer(
        model=student,
        args=training_arguments(
            recipe.train,
            output_dir=place / "train",
            seed=recipe.seed,
            on_cpu=student.device.type == "cpu",
        ),
        train_dataset=PermutedLabels(
            workspace.datasets["train"], LIE, workspace.vocab_size, seed=recipe.seed
        ),
        objective=Objective(recipe.objective, None),
        processing_class=workspace.tokenizer,
    )
    trainer.train()
    trainer.save_student(place / "student")


class PermutedLabels(Dataset[dict[str, torch.Tensor]]):
    """Windows in which every label y of one domain is pi(y), for one permutation pi of the vocabulary; the inputs stay."""

    def __init__(self, dataset: PackedDataset, domain: str, vocab_size: int, *, seed: int) -> None:
        self._dataset = dataset
        self._domain = domain_number(domain)
        generator = torch.Generator().manual_seed(seed)
        self.permutation_V = torch.randperm(vocab_size, generator=generator)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = self._dataset[index]
        labels = item["labels"]
        is_wrong = (item["domain_ids"] == self._domain) & (labels != IGNORE)
        permuted = self.permutation_V[labels.clamp(min=0)]
        return {**item, "labels": torch.where(is_wrong, permuted, labels)}
