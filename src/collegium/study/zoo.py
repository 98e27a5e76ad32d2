"""Small teachers trained on real text, with strengths known by construction.

runs/zoo/text, tokenizer          as in the demo
runs/zoo/specialists-SEED/NAME    trained on one domain each: the teachers of the demo
runs/zoo/generalists-SEED/NAME    trained on all domains; differ in width, depth, architecture, seed
runs/zoo/contradicting-SEED/liar  a generalist trained on permuted labels in one domain
runs/zoo/scaling-SEED/NAME        `fifth`, one more generalist; `long`, trained five times as long
runs/zoo/generations-SEED/early   the last specialist after a quarter of its steps
runs/zoo/tasks                    text of five tasks
runs/zoo/tasks-SEED/NAME          `long`, fine-tuned on one task each; `start`, a smaller generalist
                                  trained as long, which students start from
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from collegium.config.recipe import Recipe
from collegium.data.windows import PackedDataset
from collegium.demo.run import (
    FULL,
    HERE,
    Plan,
    ensure,
    llama_like,
    prepare_text,
    read_values,
    write_recipe,
    write_teacher_recipe,
)
from collegium.demo.smollm2 import prepare_smollm2
from collegium.models.loading import load_tokenizer
from collegium.run import pipeline
from collegium.run.artifacts import Student
from collegium.run.context import RunContext
from collegium.run.controls import main_variant
from collegium.run.folder import RunFolder
from collegium.study.options import ZooName
from collegium.study.task_text import TASKS, write_task
from collegium.types import IGNORE, domain_number

ROOT = Path("runs") / "zoo"
PERMUTED_DOMAIN = "drama"
"""The domain in which the contradicting teacher is trained on permuted labels."""
# The regimes differ: routing wins for specialists, constant weights are nearly as good as any
# rule for generalists (docs/results/fusion.md).
GENERALISTS = {"scripture": "wide", "drama": "shallow", "encyclopedia": "neox", "python": "deep"}
"""Domain of a specialist -> name of the generalist with the same architecture."""
TASK_STEPS = 600
"""Steps of the fine-tuning on a task."""


def prepare_zoo(zoo: ZooName, seed: int, *, root: Path = ROOT, plan: Plan = FULL) -> None:
    """Train the missing teachers of a zoo.

    Raises:
        CollegiumError: the text cannot be downloaded, or the folder is unusable.
    """
    if zoo == "smollm2":
        prepare_smollm2()  # the same for all seeds
        return
    run = RunFolder(root)
    run.make()
    with run.lock():
        prepare_text(run, plan)
        _prepare_teachers(run, zoo, seed, plan)
        if zoo == "tasks":
            _prepare_teachers(run, "scaling", seed, plan, names=["long"])
            _prepare_task_teachers(run, seed)


def _prepare_teachers(
    run: RunFolder, zoo: ZooName, seed: int, plan: Plan, *, names: Sequence[str] = ()
) -> None:
    """Train the missing teachers, all or those of these names, on the text of the demo."""
    train = _train_contradicting if zoo == "contradicting" else pipeline.train
    for one in _teachers(zoo, plan, seed):
        if names and one.name not in names:
            continue
        folder = run.path / f"{zoo}-{seed}" / one.name
        size = replace(plan, max_steps=round(plan.max_steps * one.length))
        recipe = write_teacher_recipe(size, folder, one.config, seed=one.seed, domains=one.domains)
        inputs, make = [one.name, dict(one.config), seed, size.max_steps], partial(train, recipe)
        ensure(run, f"{zoo}-{seed} {one.name}", inputs, folder / "student", make)


def _prepare_task_teachers(run: RunFolder, seed: int) -> None:
    """Write the text of the tasks, and fine-tune one teacher on each."""
    base, text = run.path / f"scaling-{seed}" / "long" / "student", run.path / "tasks"
    wheels = [[task.name, [wheel.file for wheel in task.wheels]] for task in TASKS.values()]

    def write_tasks() -> None:
        tokenizer = load_tokenizer(str(run.path / "tokenizer"), where="tokenizer")
        for task in TASKS.values():
            write_task(task, text, tokenizer)

    ensure(run, "tasks", wheels, text, write_tasks)
    for number, name in enumerate(TASKS):
        folder = run.path / f"tasks-{seed}" / name
        values = read_values(HERE / "demo-teacher.yaml", "runs/demo", run.path.as_posix())
        values |= {"name": f"task-{name}", "output_dir": folder.as_posix()}
        values |= {"seed": 600 + 10 * seed + number, "student": {"model": base.as_posix()}}
        values["data"]["train"] = [{"path": str(text / f"{name}.jsonl"), "domain": name}]
        values["train"] |= {"learning_rate": 2e-3, "max_steps": TASK_STEPS}
        recipe = write_recipe(run.path / "recipes" / f"tasks-{seed}-{name}.yaml", values)
        make = partial(pipeline.train, recipe)
        ensure(run, f"tasks-{seed} {name}", [name, seed, TASK_STEPS], folder / "student", make)


@dataclass(frozen=True)
class _ZooTeacher:
    name: str
    config: Mapping[str, Any]
    """Its transformers config."""
    seed: int
    """Seed of its weights and data order."""
    domains: Sequence[str]
    """Domains of its text."""
    length: float = 1.0
    """Its steps, as a multiple of those of the others."""


def _teachers(zoo: ZooName, plan: Plan, seed: int) -> Iterator[_ZooTeacher]:
    domains, configs = tuple(plan.specialists), plan.specialists
    first = next(iter(configs.values()))
    if zoo == "contradicting":
        yield _ZooTeacher("liar", first, 300 + seed, domains)
    elif zoo == "scaling":
        yield _ZooTeacher("fifth", first, 400 + seed, domains)
        # As the first generalist.
        yield _ZooTeacher("long", first, 200 + 10 * seed, domains, length=5)
    elif zoo == "generations":
        yield _ZooTeacher("early", configs[domains[-1]], 100 + seed, domains[-1:], length=0.25)
    elif zoo == "tasks":
        start = llama_like("llama", width=96, layers=3, heads=4)
        yield _ZooTeacher("start", start, 500 + seed, domains, length=5)
    elif zoo == "specialists":
        for domain in domains:
            yield _ZooTeacher(domain, configs[domain], 100 + seed, [domain])
    else:
        for number, domain in enumerate(domains):
            # The same text for all, so each has its own initialization and data order as well.
            name = GENERALISTS.get(domain, domain)
            yield _ZooTeacher(name, configs[domain], 200 + 10 * seed + number, domains)


def _train_contradicting(recipe: Recipe) -> None:
    """Train with plain cross-entropy, with the labels of one domain permuted."""
    context = RunContext(recipe)
    student = Student(context, main_variant(recipe, None))
    trainer = student.trainer(student.output_dir)
    trainer.train_dataset = PermutedLabels(
        context.datasets["train"], PERMUTED_DOMAIN, context.vocab_size, seed=recipe.seed
    )
    trainer.train()
    trainer.save_student(student.path)


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
