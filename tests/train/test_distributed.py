"""Several gloo processes give the loss, gradients and weights of a single one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import distributed_case
from collegium.storage.records import read_log

CASE = Path(distributed_case.__file__)


def run_processes(name: str, folder: Path, count: int = 2) -> None:
    """Run all processes of a case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(CASE), name, str(folder)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
        assert "done" in output


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_wrapped_step_gives_the_gradients_of_one_process(wrapper: str, tmp_path: Path) -> None:
    run_processes(wrapper, tmp_path)


@pytest.mark.slow
# Four processes with shards are part of the test below.
@pytest.mark.parametrize(("prefix", "count"), [("", 2), ("", 4), (distributed_case.SHARDED, 2)])
@pytest.mark.parametrize("source", distributed_case.SOURCES)
def test_several_trainers_give_the_gradients_and_weights_of_one(
    source: str, prefix: str, count: int, tmp_path: Path
) -> None:
    """Over two epochs, with ranks without rows and an uneven last batch, under DDP and FSDP2."""
    if source == "cache":
        distributed_case.build_fused_cache(tmp_path / "cache")
    expected = distributed_case.train(
        source, tmp_path / "one", tmp_path / "cache", batch_size=2, accumulated=2
    )
    run_processes(prefix + source, tmp_path, count)
    compare(load_file(tmp_path / "many.safetensors"), expected)


def compare(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compare what two runs of a case return."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = tensor.abs().max()
        assert scale > 0
        # The meter of the log sums in float32.
        bound = 1e-6 if name == "log" else 1e-12
        assert (actual[name] - tensor).abs().max() <= bound * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", distributed_case.SHARDED])
@pytest.mark.parametrize("source", ["live", "features", "stages", "route"])
def test_sharded_teachers_give_the_gradients_and_weights_of_whole_ones(
    source: str, prefix: str, tmp_path: Path
) -> None:
    """Of a whole student, and of a sharded one. A route may leave a rank without rows."""
    source += distributed_case.SHARDED_TEACHERS
    expected = distributed_case.train(
        source, tmp_path / "one", tmp_path / "cache", batch_size=2, accumulated=2
    )
    run_processes(prefix + source, tmp_path, 2)
    compare(load_file(tmp_path / "many.safetensors"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", distributed_case.SHARDED])
def test_a_run_resumes_with_one_process_and_with_four(prefix: str, tmp_path: Path) -> None:
    """Before an uneven last batch. Checkpoints hold whole tensors, and each has a plain student."""
    source = "features"
    expected = distributed_case.train(
        source, tmp_path / "one", tmp_path, batch_size=2, accumulated=2
    )
    run_processes(prefix + source, tmp_path, 2)
    shutil.rmtree(tmp_path / "many" / "checkpoint-6")
    shutil.rmtree(tmp_path / "many" / "final")
    for name in ("single", "four"):
        shutil.copytree(tmp_path / "many", tmp_path / name / "many")
    distributed_case.train(
        source, tmp_path / "single" / "many", tmp_path, batch_size=2, accumulated=2
    )
    run_processes(prefix + source, tmp_path / "four", 4)
    weights = {k.removeprefix("weight/"): v for k, v in expected.items() if "weight/" in k}
    for name in ("single", "four"):
        folder = tmp_path / name / "many"
        final = AutoModelForCausalLM.from_pretrained(folder / "final").state_dict()
        assert {f"student.{key}" for key in final} < weights.keys()
        for key, tensor in final.items():
            reference = weights[f"student.{key}"]
            assert (tensor - reference).abs().max() <= 1e-12 * reference.abs().max(), key
        assert [row.step for row in read_log(folder / "log.jsonl") or ()] == [*range(1, 7)]
        student = folder / "checkpoint-4" / "student"
        assert AutoModelForCausalLM.from_pretrained(student).dtype == torch.float64
