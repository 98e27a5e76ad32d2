"""Tiny training runs for tests, importable by child processes that are killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from collegium.distributions import LIVE, Answer, DenseRows
from collegium.fusion.fuse import Fusion
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.progress import TrainingProgress
from collegium.train.trainer import DistillTrainer, TrainOptions, training_arguments
from collegium.types import IGNORE, Batch, Rows
from tiny import tiny_model

VOCAB = 24
MODEL = {"width": 8, "num_attention_heads": 2, "num_key_value_heads": 1}


def small_model(seed: int = 0, **config: object) -> Any:
    """Return a model of a few hundred parameters."""
    return tiny_model(VOCAB, seed=seed, **(MODEL | config))  # type: ignore[arg-type]


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of two packed documents each, with varying numbers of untrained tokens."""

    def __init__(self, num: int = 12, length: int = 10) -> None:
        generator = torch.Generator().manual_seed(5)
        self.rows = []
        for number in range(num):
            ids = torch.randint(VOCAB, (length,), generator=generator)
            cut = 3 + number % 4
            position = torch.cat([torch.arange(cut), torch.arange(length - cut)])
            labels = ids.clone()
            labels[: number % 3] = IGNORE
            sample = torch.full((length,), 2 * number)
            sample[cut:] += 1
            self.rows.append(
                {"input_ids": ids, "position_ids": position, "labels": labels, "sample_ids": sample}
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.rows[number]


def stack(examples: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Collate windows of one length."""
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


class FakeTeacher:
    """Dense logits that depend only on the label; NaN for `bad_sample` from call `bad_call` on."""

    capabilities = LIVE

    def __init__(self, name: str, *, bad_call: int | None = None, bad_sample: int = -1) -> None:
        self.name = name
        self.num_calls = 0
        self._bad_call, self._bad_sample = bad_call, bad_sample

    def score(self, batch: Batch, rows: Rows, taps: Any = ()) -> Answer:
        self.num_calls += 1
        logits_NV = torch.nn.functional.one_hot(rows.labels, VOCAB).float() * 2
        if self._bad_call is not None and self.num_calls >= self._bad_call:
            logits_NV[rows.samples == self._bad_sample] = float("nan")
        return Answer(self.name, DenseRows(logits_NV))


def trainer(
    folder: Path,
    *,
    model: Any = None,
    teachers: Any = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 3,
    **more: Any,
) -> DistillTrainer:
    """Return a trainer: 8 steps of two micro-batches, with dropout, so that RNG states matter."""
    settings: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 2,
        "save_steps": 3,
        "learning_rate": 1e-2,
    }
    more.setdefault("train_dataset", Windows())
    more.setdefault("callbacks", [TrainingProgress(quiet=True)])
    return DistillTrainer(
        model or small_model(attention_dropout=0.2),
        [small_model(1), small_model(2)] if teachers is None else teachers,
        training_arguments(
            TrainOptions(**(settings | dict(options or {}))), output_dir=folder, seed=seed
        ),
        data_collator=more.pop("data_collator", stack),
        **more,
    )


def objective(**options: Any) -> Objective:
    """Return an objective over the default fusion of the teachers."""
    return Objective(ObjectiveOptions(**options), Fusion())


def run(
    folder: Path, *, resume: bool, before: Callable[[DistillTrainer], None] | None = None
) -> None:
    """Train from scratch or from the newest checkpoint, and save the final student."""
    torch.set_num_threads(1)
    made = trainer(folder)
    if before is not None:
        before(made)
    made.train(resume_from_checkpoint=resume)
    made.save_student(folder / "final")


def run_until_killed(folder: Path, resume: bool, site: str, count: int) -> None:
    """Send SIGKILL to this process at the `count`-th call of `site`."""
    calls = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return counted

    def before(made: DistillTrainer) -> None:
        if site == "step":
            made.training_step = wrap(made.training_step)  # type: ignore[method-assign]
        else:
            setattr(os, site, wrap(getattr(os, site)))

    run(folder, resume=resume, before=before)


def run_until_signal(folder: Path, step: int) -> None:
    """Send SIGINT to this process in the middle of a step."""

    def before(made: DistillTrainer) -> None:
        inner = made.training_step

        def stepped(*arguments: Any, **named: Any) -> Any:
            first_half = made.accelerator.sync_gradients is False
            if made.state.global_step + 1 == step and first_half:
                os.kill(os.getpid(), signal.SIGINT)
            return inner(*arguments, **named)

        made.training_step = stepped  # type: ignore[method-assign]

    run(folder, resume=False, before=before)
