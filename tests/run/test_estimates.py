"""The compute and memory that `check` prints, against counts of parameters and windows."""

from __future__ import annotations

from pathlib import Path

import pytest

from collegium.config.recipe import load_recipe
from collegium.models.loading import load_model
from collegium.models.options import ModelOptions
from collegium.report.formats import amount
from collegium.run.context import RunContext
from collegium.run.estimates import estimate_lines
from collegium.types import IGNORE
from tiny_run import recipe_text, write_zoo


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


def context_of(zoo: Path, folder: Path, *overrides: str) -> RunContext:
    file = folder / "recipe.yaml"
    file.write_text(recipe_text(zoo), encoding="utf-8")
    return RunContext(load_recipe(file, overrides))


def count(zoo: Path, name: str) -> int:
    model = load_model(ModelOptions(model=str(zoo / name), device="cpu"), where=name)
    return sum(parameter.numel() for parameter in {*model.parameters()})


def num_tokens(context: RunContext) -> int:
    """Tokens of all training documents, counted once: the targets, and the first of each."""
    dataset = context.datasets["train"]
    targets = sum(int((window["labels"] != IGNORE).sum()) for window in dataset)
    return targets + len(dataset.sample_names)


def test_compute_and_memory(zoo: Path, tmp_path: Path) -> None:
    student, teachers = count(zoo, "scripture"), count(zoo, "scripture") + count(zoo, "code")
    model = f"student={{model: {zoo}/scripture}}"
    context = context_of(zoo, tmp_path, model, "train.gradient_accumulation_steps=3")
    models, compute, memory = estimate_lines(context)
    sizes = f"scripture {amount(student)}, code {amount(count(zoo, 'code'))}"
    assert models == f"models: student {amount(student)} parameters; teachers {sizes}"
    tokens = num_tokens(context)
    # 4 steps of 3 micro-batches of 4 windows.
    trained = 4 * 3 * 4 * tokens / len(context.datasets["train"])
    assert compute == (
        f"compute: {6 * student * trained:.1e} FLOP to train on {amount(trained)} tokens, "
        f"{2 * teachers * trained:.1e} FLOP for the teachers on {amount(trained)}"
    )
    assert memory.startswith(f"memory: {4 * 4 * student / 1e9:.1f} GB ")


def test_a_cache_reads_the_text_once(zoo: Path, tmp_path: Path) -> None:
    context = context_of(zoo, tmp_path, "cache.enabled=true", "train.max_steps=1000")
    teachers, tokens = count(zoo, "scripture") + count(zoo, "code"), num_tokens(context)
    assert estimate_lines(context)[1].endswith(
        f" tokens, {2 * teachers * tokens:.1e} FLOP for the teachers on {amount(tokens)}"
    )


def test_teachers_that_no_term_reads_cost_nothing(zoo: Path, tmp_path: Path) -> None:
    context = context_of(zoo, tmp_path, "objective={kd_ratio: 0}")
    assert estimate_lines(context)[1].endswith(" tokens")


@pytest.mark.parametrize(
    ("change", "factor"),
    [("train.optim=sgd", 1 / 2), ("student.dtype=bfloat16", 1 / 2), ("train.bf16=true", 1)],
)
def test_memory_follows_the_optimizer_and_the_type(
    zoo: Path, tmp_path: Path, change: str, factor: float
) -> None:
    large = "student.config={model_type: llama, hidden_size: 2048, num_hidden_layers: 8}"
    sizes = []
    for overrides in ((large,), (large, change)):
        line = estimate_lines(context_of(zoo, tmp_path, *overrides))[2]
        sizes.append(float(line.split()[1]))
    assert sizes[0] > 5
    assert sizes[1] == pytest.approx(factor * sizes[0], abs=0.11)
