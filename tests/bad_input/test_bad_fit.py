"""Valid parts that do not fit together or this machine: rows 18, 21, 22, 26, 27, 67 and 78."""

from __future__ import annotations

import shutil

import pytest
import torch

from bad_input_bench import Bench
from collegium.config.recipe import load_recipe
from collegium.errors import RecipeError
from collegium.run.checks import _check_distinct, _teachers
from collegium.run.context import RunContext
from collegium.run.problems import CheckReport
from refusals import refused

HERE = "teachers.code"


@pytest.mark.parametrize(
    ("cache", "where"),
    [
        ("{enabled: true, targets: {name: top_k, k: 401}}", "cache.targets.k"),
        ("{enabled: true, path: run.yaml}", "cache.path"),
    ],
    ids=["k", "path"],
)
def test_18_an_impossible_cache(cache: str, where: str, bench: Bench) -> None:
    bench.refused(where, f"cache={cache}")
    assert bench.accepted("cache={enabled: true, targets: {name: top_k, k: 400}}")


def test_22_several_processes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    bench.refused("MASTER_ADDR, MASTER_PORT")


def test_26_the_same_weights_twice(bench: Bench) -> None:
    shutil.copytree("zoo/code", "zoo/copy")
    bench.refused("teachers.code and teachers.again", "teachers.again.model=zoo/copy")


def test_26_the_same_hub_id_twice(bench: Bench) -> None:
    """Weights are compared only if they are local, names always."""
    twice = "teachers={a: {model: who/what}, b: {model: who/what}}"
    with refused(RecipeError, "teachers.a and teachers.b"):
        _check_distinct(_teachers(RunContext(load_recipe("run.yaml", [twice]))), CheckReport())
    other = "teachers={a: {model: who/what}, b: {model: who/what, revision: v2}}"
    _check_distinct(_teachers(RunContext(load_recipe("run.yaml", [other]))), CheckReport())


def test_27_the_student_is_a_teacher(bench: Bench) -> None:
    lines = bench.accepted("student={model: zoo/code}")
    assert lines[-1] == (
        "warning: student: equals teachers.code; its distillation loss to that teacher starts at 0"
    )


@pytest.mark.parametrize("backend", ["compiled", "triton"])
def test_21_a_backend_that_cannot_run_here(
    backend: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium.kernels.backends.find_spec", lambda name: None)
    monkeypatch.setattr("collegium.kernels.compiled.shutil.which", lambda name: None)
    bench.refused("objective.backend", f"objective={{backend: {backend}}}")


@pytest.mark.parametrize(
    ("override", "where"),
    [("teachers.code.device=cuda:7", HERE), ("student.device=cuda:7", "student")],
)
def test_78_no_such_device(
    override: str, where: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    bench.refused(f"{where}.device", override)


def test_78_no_bfloat16(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    bench.refused("train.bf16", "train.bf16=true")


@pytest.mark.parametrize("where", ["student", HERE])
def test_78_attention_that_is_not_installed(
    where: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "transformers.utils.import_utils.is_flash_attn_2_available"
    monkeypatch.setattr(target, lambda: False)
    bench.refused(f"{where}.attention", f"{where}.attention=flash_attention_2")


@pytest.mark.parametrize(
    ("features", "where"),
    [
        ("{num_layers: 9}", "objective.features.num_layers"),
        ("{layers: {layer_9: layer_0}}", "objective.features.layers"),
    ],
    ids=["num_layers", "layers"],
)
def test_hidden_states_that_do_not_exist(features: str, where: str, bench: Bench) -> None:
    bench.refused(where, f"objective.features={features}")


def test_67_a_window_longer_than_a_models_positions(bench: Bench) -> None:
    bench.refused("data.max_length", "data.max_length=65")
    bench.refused(
        "data.max_length", "data.max_length=129", "student.config.max_position_embeddings=256"
    )
