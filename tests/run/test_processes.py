"""Runs of several processes on one machine: the numbers of one process, and clean ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from collegium.cli import app
from collegium.config.recipe import load_recipe
from collegium.errors import RecipeError
from collegium.run import pipeline
from collegium.run.processes import Processes
from collegium.storage.records import read_log
from collegium.train.checkpoint import checkpoints
from refusals import refused
from tiny_run import recipe_text, write_zoo

LONG = ("train.max_steps=400", "train.save_steps=1000", "train.logging_steps=1")
"""A training that a test interrupts."""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_zoo(tmp_path_factory.mktemp("zoo"))
    (root / "tiny.yaml").write_text(recipe_text(root), encoding="utf-8")
    return root


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(
    zoo: Path, command: str, *overrides: str | Sequence[str], size: int = 2
) -> list[subprocess.Popen[str]]:
    """Start `collegium COMMAND` in several processes, with overrides for all or one for each."""
    common = {
        **os.environ,
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "collegium", command, str(zoo / "tiny.yaml")]
            + [one if isinstance(one, str) else one[rank] for one in overrides],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


@contextmanager
def running(processes: list[subprocess.Popen[str]]) -> Iterator[list[subprocess.Popen[str]]]:
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Return the exit code, the output and the errors of each process."""
    with running(processes):
        outputs = [process.communicate(timeout=300) for process in processes]
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def wait_for_steps(folder: Path, number: int) -> None:
    """Wait until a training has logged some steps."""
    log = folder / "train" / "log.jsonl"
    for _ in range(1200):
        if log.is_file() and len(read_log(log) or ()) >= number:
            return
        time.sleep(0.05)
    raise AssertionError(f"{log}: has fewer than {number} rows")


def scores(folder: Path) -> dict[str, float]:
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {row["name"]: row["nll"] for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["live", "per_teacher", "sharded teachers"])
def test_two_processes_give_the_run_of_one(kind: str, zoo: Path, tmp_path: Path) -> None:
    """Weights, scores and log, with one report of the progress."""
    kinds = {
        "live": [],
        "per_teacher": ["cache={enabled: true, kind: per_teacher}"],
        "sharded teachers": ["teachers.scripture.shard=true", "teachers.code.shard=true"],
    }
    options = kinds[kind]
    one, two = (f"output_dir={tmp_path / name}" for name in ("one", "two"))
    pipeline.run(load_recipe(zoo / "tiny.yaml", [one, *options]))
    half = "train.per_device_train_batch_size=2"
    first, second = ended(start(zoo, "run", two, half, *options))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "report: " in first[1]
    assert first[2].splitlines().count("train ...") == 1
    assert second[1] == ""
    assert "collegium" not in second[2]
    assert "..." not in second[2]
    for part in ("student", "controls/ce_only/student"):
        weights = load_file(tmp_path / "one" / part / "model.safetensors")
        for name, tensor in load_file(tmp_path / "two" / part / "model.safetensors").items():
            assert (weights[name] - tensor).abs().max() < 1e-5, name
    expected = scores(tmp_path / "one")
    assert scores(tmp_path / "two") == pytest.approx(expected, rel=1e-6)
    # Of models that were not trained, all numbers: each process has read half of the batches.
    untrained = [name for name in expected if name in ("scripture", "code", "fused target")]
    assert len(untrained) == 3
    assert [scores(tmp_path / "two")[name] for name in untrained] == [
        expected[name] for name in untrained
    ]
    measured = [json.loads((tmp_path / n / "preflight.json").read_text()) for n in ("one", "two")]
    assert measured[0] | {"seconds": 0} == measured[1] | {"seconds": 0}
    logs = [read_log(tmp_path / name / "train" / "log.jsonl") or [] for name in ("one", "two")]
    assert [row.num_tokens for row in logs[0]] == [row.num_tokens for row in logs[1]]
    # A single process finds nothing to do.
    lines = pipeline.run(load_recipe(tmp_path / "two" / "recipe.yaml"))
    assert lines == tmp_path / "two"
    assert scores(tmp_path / "two") == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_stopped_run_resumes_with_another_number_of_processes(zoo: Path, tmp_path: Path) -> None:
    """One rank receives SIGTERM, both save after the same step, and the loss curve goes on."""
    folder, short = tmp_path / "run", ("train.max_steps=40", *LONG[1:])
    half = "train.per_device_train_batch_size=2"
    with running(start(zoo, "train", f"output_dir={folder}", half, *short)) as processes:
        wait_for_steps(folder, 3)
        processes[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, errors
    assert "a checkpoint was saved" in errors[0]
    (saved,) = checkpoints(folder / "train")
    before = read_log(folder / "train" / "log.jsonl") or []
    assert saved.name == f"checkpoint-{before[-1].step}"
    pipeline.train(load_recipe(zoo / "tiny.yaml", [f"output_dir={folder}", *short]))
    pipeline.train(load_recipe(zoo / "tiny.yaml", [f"output_dir={tmp_path / 'one'}", *short]))
    curves = [read_log(tmp_path / name / "train" / "log.jsonl") or [] for name in ("run", "one")]
    for resumed, whole in zip(*curves, strict=True):
        assert resumed.loss == pytest.approx(whole.loss, rel=1e-4)
        assert resumed.num_tokens == whole.num_tokens


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_rank_ends_the_others_with_a_sentence(
    rank: int, number: int, zoo: Path, tmp_path: Path
) -> None:
    folder, limit = tmp_path / "run", "train.ddp_timeout=5"
    options = (f"output_dir={folder}", "train.per_device_train_batch_size=2", limit, *LONG)
    with running(start(zoo, "train", *options)) as processes:
        wait_for_steps(folder, 3)
        processes[rank].send_signal(number)
        other = processes[1 - rank]
        _, errors = other.communicate(timeout=60)
    assert other.returncode == 2
    assert "another process ended or exceeded its time limit" in errors
    assert "run the same command again to resume" in errors
    assert "Traceback" not in errors
    steps = ("train.max_steps=4", *LONG[1:])
    processes = start(zoo, "train", *options[:3], *steps)
    assert [code for code, _, _ in ended(processes)] == [0, 0]


@pytest.mark.slow
def test_a_process_that_never_starts_ends_the_others(zoo: Path, tmp_path: Path) -> None:
    limit = "train.ddp_timeout=4"
    with running(start(zoo, "train", f"output_dir={tmp_path / 'run'}", limit)) as processes:
        processes[1].kill()
        _, errors = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 2
    assert "process 0 of 2: another process ended or exceeded its time limit" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_processes_with_other_recipes_are_refused(zoo: Path, tmp_path: Path) -> None:
    rates = ("train.learning_rate=1e-2", "train.learning_rate=2e-2")
    for code, _, errors in ended(start(zoo, "train", f"output_dir={tmp_path / 'run'}", rates)):
        assert code == 2
        assert (
            "process 1: differs from process 0: recipe.train.learning_rate: 0.01 -> 0.02" in errors
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_failed_check_of_rank_0_ends_the_others(zoo: Path, tmp_path: Path) -> None:
    wrong = f"teachers.code.model={tmp_path}/nowhere"
    first, second = ended(start(zoo, "train", f"output_dir={tmp_path / 'run'}", wrong))
    assert first[0] == second[0] == 2
    assert "nowhere" in first[2]
    assert "another process ended" in second[2]


def test_a_failed_process_of_several_ends_before_its_interpreter_shuts_down() -> None:
    """Threads of a lost collective may abort there: the handler of `atexit` is in their place."""
    program = """
import atexit, os, sys
import torch.distributed as dist
from collegium import cli

def fail(prog_name):
    print("reason")
    sys.exit(2)

cli.app = fail
atexit.register(os.abort)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
cli.main()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "reason\n"), done.stderr


@pytest.mark.slow
def test_torchrun_starts_a_run(zoo: Path, tmp_path: Path) -> None:
    """With a fused cache, whose fusion rank 0 has chosen."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    options = [f"output_dir={tmp_path / 'run'}", "train.per_device_train_batch_size=2"]
    cache = "cache={enabled: true, kind: fused}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [*launcher, f"--master-port={free_port()}", "-m", "collegium", "run"]
    done = subprocess.run(
        [*command, str(zoo / "tiny.yaml"), *options, cache],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").is_file()
    assert done.stdout.count("report: ") == 1


def test_variables_of_the_launcher_are_required(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with refused(RecipeError, "MASTER_ADDR, MASTER_PORT: "):
        pipeline.train(load_recipe(zoo / "tiny.yaml"))
    result = CliRunner().invoke(app, ["measure", str(zoo)])
    assert result.exit_code == 2
    assert "WORLD_SIZE: got 2; must be 1 for `collegium measure`" in result.output
    monkeypatch.setenv("RANK", "first")
    with refused(RecipeError, "RANK, WORLD_SIZE: "):
        pipeline.train(load_recipe(zoo / "tiny.yaml"))


def test_a_single_process_meets_nobody(zoo: Path) -> None:
    processes = Processes.join(load_recipe(zoo / "tiny.yaml"), {})
    assert processes.is_single
    with processes.sharing("train"):
        processes.end()


def test_recovery_belongs_to_a_single_process(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    more = ["export={to: [torchao-int8], recover: {steps: 5}}", f"output_dir={tmp_path / 'run'}"]
    with refused(RecipeError, "export.recover: "):
        pipeline.check(load_recipe(zoo / "tiny.yaml", more))


def test_more_processes_than_devices_are_refused(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium.run.processes.choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    variables = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with refused(RecipeError, "LOCAL_WORLD_SIZE: "):
        Processes.join(load_recipe(zoo / "tiny.yaml"), variables)
