"""The compute, memory and time that `check` prints, against counts and measured peaks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import peak_memory
from collegium.config.recipe import load_recipe
from collegium.models.loading import load_model
from collegium.models.options import ModelOptions
from collegium.report.formats import amount
from collegium.run import estimates
from collegium.run.context import RunContext
from collegium.run.estimates import estimate_lines, estimate_warnings
from collegium.run.memory import MemoryPlan, StageMemory
from collegium.types import IGNORE
from memory_cases import CASES, WARM, write_case
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


def test_compute(zoo: Path, tmp_path: Path) -> None:
    student, teachers = count(zoo, "scripture"), count(zoo, "scripture") + count(zoo, "code")
    model = f"student={{model: {zoo}/scripture}}"
    context = context_of(zoo, tmp_path, model, "train.gradient_accumulation_steps=3")
    models, compute = estimate_lines(MemoryPlan(context))[:2]
    sizes = f"scripture {amount(student)}, code {amount(count(zoo, 'code'))}"
    assert models == f"models: student {amount(student)} parameters; teachers {sizes}"
    tokens = num_tokens(context)
    # 4 steps of 3 micro-batches of 4 windows.
    trained = 4 * 3 * 4 * tokens / len(context.datasets["train"])
    assert compute == (
        f"compute: {6 * student * trained:.1e} FLOP to train on {amount(trained)} tokens, "
        f"{2 * teachers * trained:.1e} FLOP for the teachers on {amount(trained)}"
    )


def test_a_cache_reads_the_text_once(zoo: Path, tmp_path: Path) -> None:
    context = context_of(zoo, tmp_path, "cache.enabled=true", "train.max_steps=1000")
    teachers, tokens = count(zoo, "scripture") + count(zoo, "code"), num_tokens(context)
    assert estimate_lines(MemoryPlan(context))[1].endswith(
        f" tokens, {2 * teachers * tokens:.1e} FLOP for the teachers on {amount(tokens)}"
    )


def test_teachers_that_no_term_reads_cost_nothing(zoo: Path, tmp_path: Path) -> None:
    context = context_of(zoo, tmp_path, "objective={kd_ratio: 0}")
    assert estimate_lines(MemoryPlan(context))[1].endswith(" tokens")


LARGE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}


def train_memory(zoo: Path, folder: Path, *overrides: str) -> StageMemory:
    large = f"student.config={json.dumps(LARGE)}"
    plan = MemoryPlan(context_of(zoo, folder, large, *overrides))
    return next(stage for stage in plan.stages if stage.stage == "train")


@pytest.mark.parametrize(
    ("change", "part", "factor"),
    [
        ("train.optim=sgd", "optimizer", 0.0),
        ("student.dtype=bfloat16", "weights", 0.5),
        ("train.bf16=true", "weights", 1.0),
    ],
)
def test_memory_follows_the_options(
    zoo: Path, tmp_path: Path, change: str, part: str, factor: float
) -> None:
    before = train_memory(zoo, tmp_path).parts.get(part, 0)
    after = train_memory(zoo, tmp_path, change).parts.get(part, 0)
    assert before > 0
    assert after == pytest.approx(factor * before, rel=0.01)


SAMPLED = ("live", "labels only")
"""Recipes that are measured without `--all`: each takes some seconds."""


@pytest.mark.skipif(sys.platform != "linux", reason="measures a fork")
def test_memory_is_within_a_quarter_of_the_measured_peak(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    names = list(CASES) if request.config.getoption("--all") else SAMPLED
    files = {name: write_case(tmp_path / name.replace(" ", "_"), **CASES[name]) for name in names}
    planned: dict[str, int] = {}
    for name, file in files.items():
        stages = MemoryPlan(RunContext(load_recipe(file))).stages
        # The stages of `collegium train` with a named fusion.
        planned[name] = max(s.num_bytes for s in stages if s.stage in ("cache", "train"))
    warm = [write_case(tmp_path / name, **WARM) for name in ("warm", "baseline")]
    arguments = [str(part) for file in (*warm, *files.values()) for part in ("train", file)]
    script = Path(peak_memory.__file__)
    result = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=True
    )
    # The baseline has the code of all libraries in memory, and next to no tensors.
    baseline, *peaks = map(int, result.stdout.split())
    assert len(peaks) == len(planned), result.stderr
    for (name, size), peak in zip(planned.items(), peaks, strict=True):
        assert peak > 0, result.stderr
        assert size == pytest.approx(peak - baseline, rel=0.25), name


def test_a_run_that_does_not_fit_names_what_would_help(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = f"student.config={json.dumps(LARGE)}"
    more = ("data.max_length=64", "train.per_device_train_batch_size=16")
    plan = MemoryPlan(context_of(zoo, tmp_path, large, *more))
    assert estimate_warnings(plan) == []
    stage = next(stage for stage in plan.stages if stage.stage == "train")
    monkeypatch.setattr(estimates, "free_bytes", lambda device: stage.num_bytes)
    (line,) = [line for line in estimate_warnings(plan) if "train takes about" in line]
    assert line.count(" saves ") == 3
    savings = dict(estimates._savings(plan, stage))
    assert len(savings) > 4
    for key, saving in savings.items():
        overrides = [part.replace(": ", "=") for part in key.split(" with ")]
        if len(overrides) == 2:
            overrides[1] = f"train.{overrides[1]}"
        changed = MemoryPlan(context_of(zoo, tmp_path, large, *more, *overrides)).stages
        lowered = stage.num_bytes - next(s.num_bytes for s in changed if s.stage == "train")
        # Another moment of the stage may be the largest then.
        assert -1e5 <= lowered <= 1.2 * saving + 1e5, key
    assert max(savings.values()) > stage.num_bytes / 10
