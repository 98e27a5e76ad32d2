"""Small teachers trained on real text, with strengths known by construction.

runs/zoo/text, tokenizer          as in the demo
runs/zoo/specialists-SEED/NAME    trained on one domain each: the teachers of the demo
runs/zoo/generalists-SEED/NAME    trained on all domains; differ in width, depth, architecture, seed
runs/zoo/contradicting-SEED/liar  a generalist trained on permuted labels in one domain
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from collegium.config.recipe import load_recipe
from collegium.data.pack import PackedDataset
from collegium.demo.run import FULL, Plan, prepare_text, write_teacher_recipe
from collegium.run import pipeline
from collegium.run.folder import RunFolder
from collegium.storage.files import fingerprint
from collegium.study.options import ZooName
from collegium.types import IGNORE, domain_number

ROOT = Path("runs") / "zoo"
PERMUTED_DOMAIN = "drama"
"""The domain in which the contradicting teacher is trained on permuted labels."""
# The regimes differ: routing wins for specialists, constant weights are nearly as good as any
# rule for generalists (docs/results/fusion.md).
GENERALISTS = {"scripture": "wide", "drama": "shallow", "encyclopedia": "neox", "python": "deep"}
"""Domain of a specialist -> name of the generalist with the same architecture."""


def prepare_zoo(zoo: ZooName, seed: int, *, root: Path = ROOT, plan: Plan = FULL) -> Path:
    """Train the missing teachers of a zoo and return the folder of their run folders.

    Raises:
        CollegiumError: the text cannot be downloaded, or the folder is unusable.
    """
    run = RunFolder(root)
    run.make()
    with run.lock():
        prepare_text(run, plan)
        for number, (name, config) in enumerate(_configs(zoo, plan).items()):
            folder = root / f"{zoo}-{seed}" / name
            stage = f"{zoo}-{seed} {name}"
            key = fingerprint([name, dict(config), seed, plan.max_steps])
            if run.is_done(stage, key) and (folder / "student").is_dir():
                continue
            with run.stage(stage, key):
                _train(zoo, plan, folder, {name: config}, seed=_seed(zoo, seed, number))
    return root / f"{zoo}-{seed}"


def _configs(zoo: ZooName, plan: Plan) -> Mapping[str, Mapping[str, Any]]:
    if zoo == "specialists":
        return plan.specialists
    if zoo == "generalists":
        return {
            GENERALISTS.get(domain, domain): config for domain, config in plan.specialists.items()
        }
    return {"liar": next(iter(plan.specialists.values()))}


def _seed(zoo: ZooName, seed: int, number: int) -> int:
    # Generalists read the same text, so each also has its own initialization and data order.
    return {"specialists": 100 + seed, "generalists": 200 + 10 * seed + number}.get(zoo, 300 + seed)


def _train(
    zoo: ZooName, plan: Plan, folder: Path, teacher: Mapping[str, Mapping[str, Any]], *, seed: int
) -> None:
    domains = () if zoo == "specialists" else tuple(plan.specialists)
    file = write_teacher_recipe(
        plan, folder.parent.parent, folder, teacher, seed=seed, domains=domains
    )
    if zoo != "contradicting":
        pipeline.train(load_recipe(file))
        return
    _train_contradicting(file)


def _train_contradicting(file: Path) -> None:
    """Train with plain cross-entropy, with the labels of one domain permuted."""
    # Imported here: loading the trainer takes longer than a whole `collegium check`.
    from collegium.run.context import RunContext
    from collegium.train.objective import Objective
    from collegium.train.options import training_arguments
    from collegium.train.trainer import DistillTrainer

    recipe = load_recipe(file)
    context = RunContext(recipe)
    student = context.new_student()
    folder = recipe.output_dir
    trainer = DistillTrainer(
        model=student,
        args=training_arguments(
            recipe.train,
            output_dir=folder / "train",
            seed=recipe.seed,
            on_cpu=student.device.type == "cpu",
        ),
        train_dataset=PermutedLabels(
            context.datasets["train"], PERMUTED_DOMAIN, context.vocab_size, seed=recipe.seed
        ),
        objective=Objective(recipe.objective, None),
        processing_class=context.tokenizer,
    )
    trainer.train()
    trainer.save_student(folder / "student")


class PermutedLabels(Dataset[dict[str, torch.Tensor]]):
    """Windows with labels pi(y) in one domain, pi a permutation of the vocabulary.

    Inputs and the labels of other domains are unchanged.
    """

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
        # IGNORE is negative: clamped for the lookup, and kept by the mask.
        permuted = self.permutation_V[labels.clamp(min=0)]
        return {**item, "labels": torch.where(is_wrong, permuted, labels)}
