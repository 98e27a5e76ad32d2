"""Sound parts that do not fit together or not this machine, from the command line: rows 18, 21, 22, 26, 27, 67 and 78."""

from __future__ import annotations

import shutil

import pytest
import torch

from bad_input_bench import Bench
from collegium.checks import CheckReport, _check_distinct
from collegium.errors import RecipeError
from collegium.models import weights_digest
from collegium.recipe import load_recipe

HERE = "teachers.code"


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        (
            "{enabled: true, targets: {name: top_k, k: 401}}",
            "cache.targets.k: got 401; must be at most 400, the size of the vocabulary",
        ),
        (
            "{enabled: true, path: run.yaml}",
            "cache.path: got run.yaml, which is a file; must be a folder",
        ),
    ],
)
def test_18_a_cache_that_cannot_be(cache: str, expected: str, bench: Bench) -> None:
    bench.refused(expected, f"cache={cache}")
    assert bench.accepted("cache={enabled: true, targets: {name: top_k, k: 400}}")


def test_22_several_processes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    bench.refused("WORLD_SIZE: got 4; must be 1; start a single process, without torchrun")


def test_26_the_same_weights_twice(bench: Bench) -> None:
    shutil.copytree("zoo/code", "zoo/copy")
    bench.refused(
        f"teachers.code and teachers.again are the same weights (sha256 {weights_digest('zoo/code')[:12]}...)"
        "; must differ; remove one",
        "teachers.again.model=zoo/copy",
    )


def test_26_the_same_name_of_the_hub_twice(bench: Bench) -> None:
    """Only where the weights are at hand can they be compared; names can be always."""
    twice = "teachers={a: {model: who/what}, b: {model: who/what}}"
    with pytest.raises(RecipeError, match=r"^teachers\.a and teachers\.b are the same weights"):
        _check_distinct(load_recipe("run.yaml", [twice]), CheckReport())
    other = "teachers={a: {model: who/what}, b: {model: who/what, revision: v2}}"
    _check_distinct(load_recipe("run.yaml", [other]), CheckReport())


def test_27_the_student_is_a_teacher(bench: Bench) -> None:
    lines = bench.accepted("student={model: zoo/code}")
    assert lines[-1] == (
        "warning: student: equals teachers.code; its distillation loss to that teacher starts at 0"
    )


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("compiled", "must find a C++ compiler; install g++ or use torch"),
        ("triton", "must find Triton; install triton or use torch"),
    ],
)
def test_21_a_backend_that_cannot_run_here(
    backend: str, message: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium.kernels.backends.find_spec", lambda name: None)
    monkeypatch.setattr("collegium.kernels.compiled.shutil.which", lambda name: None)
    bench.refused(
        f"objective.backend: got {backend}; {message}", f"objective={{backend: {backend}}}"
    )


@pytest.mark.parametrize(
    ("override", "where"),
    [("teachers.code.device=cuda:7", HERE), ("student.device=cuda:7", "student")],
)
def test_78_no_such_device(
    override: str, where: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    bench.refused(
        f"{where}.device: got cuda:7, and 1 CUDA devices were found; must be a device of this machine; set "
        "`device: cpu`",
        override,
    )


def test_78_no_bfloat16(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    bench.refused(
        "train.bf16: got true, and this CUDA device has no bfloat16; must be false here; remove it",
        "train.bf16=true",
    )


@pytest.mark.parametrize("where", ["student", HERE])
def test_78_attention_that_is_not_installed(
    where: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = "transformers.utils.import_utils.is_flash_attn_2_available"
    monkeypatch.setattr(found, lambda: False)
    bench.refused(
        f"{where}.attention: got flash_attention_2, and the package flash-attn is not installed or finds "
        "no CUDA device; must be installed; set `attention: auto`",
        f"{where}.attention=flash_attention_2",
    )


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (
            "{num_layers: 9}",
            "features.num_layers: got 9; must be at most 2, the layers of the smallest model; lower it",
        ),
        (
            "{layers: {layer_9: layer_0}}",
            "features.layers: got `layer_9`; must be a tap of the model; did you mean `layer_1`?",
        ),
    ],
)
def test_hidden_states_that_do_not_exist(features: str, expected: str, bench: Bench) -> None:
    bench.refused(expected, f"objective.features={features}")


def test_67_a_window_longer_than_the_positions_of_a_model(bench: Bench) -> None:
    bench.refused(
        "data.max_length: got 65; must be at most 64, the max_position_embeddings of student; lower it",
        "data.max_length=65",
    )
    bench.refused(
        "data.max_length: got 129; must be at most 128, the max_position_embeddings of teachers.scripture; "
        "lower it",
        "data.max_length=129",
        "student.config.max_position_embeddings=256",
    )
