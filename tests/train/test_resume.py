"""Killed, stopped or damaged runs resume exactly."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from collegium.errors import Interrupted, TrainingError
from collegium.losses.features import FeatureLoss
from collegium.losses.pairing import FeatureOptions
from collegium.models.forward import tap_names, tap_width
from collegium.storage.records import LogStep, read_log
from collegium.train import checkpoint, state
from collegium.train.meter import RunLog
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from refusals import refused
from training_runs import (
    FakeTeacher,
    Windows,
    objective,
    run,
    run_until_killed,
    run_until_signal,
    small_model,
    trainer,
)

KILLED = -9


@pytest.fixture(scope="session")
def processes() -> Any:
    """Context that forks children from a clean server with all imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_runs"])
    with pytest.MonkeyPatch.context() as patch:
        # The server finds the modules to preload through this variable only.
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        first = context.Process(target=time.sleep, args=(0,))
        first.start()
        first.join()
    return context


def in_child(processes: Any, function: Callable[..., None], *arguments: Any) -> int:
    child = processes.Process(target=function, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def digest(folder: Path) -> dict[str, Any]:
    """Return everything of a finished run that must not depend on interruptions."""
    last = folder / "checkpoint-8"
    record = state.read(last)
    record["meter"].pop("sums")
    logged = [row.to_json() for row in read_log(folder / "log.jsonl") or ()]
    for row in logged:
        row.pop("tokens_per_s")
    return {
        "student": hashlib.sha256((folder / "final" / "model.safetensors").read_bytes()).digest(),
        "optimizer": hashlib.sha256((last / state.OPTIMIZER).read_bytes()).digest(),
        "state": record,
        "log": logged,
        "checkpoints": [path.name for path in checkpoint.checkpoints(folder)],
    }


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder, resume=False)
    result = digest(folder)
    assert [row["step"] for row in result["log"]] == [2, 4, 6, 8]
    return result


def finish(folder: Path) -> dict[str, Any]:
    run(folder, resume=bool(checkpoint.checkpoints(folder)))
    return digest(folder)


# Counts of fsync and rename calls: a save syncs eight files and folders, renames, syncs the parent.
POINTS = [("step", 9), ("step", 14)] + [
    (site, count)
    for site, counts in {"fsync": (1, 7, 10, 13, 30), "rename": (2, 4)}.items()
    for count in counts
]


@pytest.mark.parametrize(("site", "count"), POINTS)
def test_a_killed_run_resumes_bit_by_bit(
    processes: Any, unbroken: dict[str, Any], tmp_path: Path, site: str, count: int
) -> None:
    assert in_child(processes, run_until_killed, tmp_path, False, site, count) == KILLED
    for folder in checkpoint.checkpoints(tmp_path):
        checkpoint.verify(folder)
    assert finish(tmp_path) == unbroken
    assert not list(tmp_path.glob(".tmp-*"))
    assert not list(tmp_path.glob("corrupt-*"))


def test_a_run_killed_again_and_again_resumes_bit_by_bit(
    processes: Any, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    kills = random.Random(7)
    assert in_child(processes, run_until_killed, tmp_path, False, "step", 8) == KILLED
    for _ in range(2):
        count = kills.randrange(2, 6)
        assert in_child(processes, run_until_killed, tmp_path, True, "step", count) == KILLED
    assert finish(tmp_path) == unbroken


def test_an_interrupted_run_saves_and_resumes_bit_by_bit(
    unbroken: dict[str, Any], tmp_path: Path
) -> None:
    with refused(Interrupted, "SIGINT: "):
        run_until_signal(tmp_path, 5)
    assert next(path.name for path in checkpoint.checkpoints(tmp_path)) == "checkpoint-5"
    assert finish(tmp_path) == unbroken


def test_a_second_signal_kills_the_process(processes: Any, tmp_path: Path) -> None:
    assert in_child(processes, run_until_second_signal, tmp_path) == -2
    assert checkpoint.checkpoints(tmp_path) == []


def run_until_second_signal(folder: Path) -> None:
    made = trainer(folder)
    made.add_callback(Twice())
    made.train()


class Twice(TrainerCallback):
    """Sends SIGINT twice within one step."""

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_damaged_newest_checkpoint_falls_back(unbroken: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, resume=False)
    path = tmp_path / "checkpoint-8" / state.OPTIMIZER
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert finish(tmp_path) == unbroken
    assert [path.name[:10] for path in tmp_path.glob("corrupt-*")] == ["corrupt-8-"]


def test_a_finished_run_takes_no_more_steps(unbroken: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, resume=False)
    shutil.rmtree(tmp_path / "final")
    assert finish(tmp_path) == unbroken
    by_epochs = trainer(
        tmp_path / "epochs", options={"max_steps": -1, "num_train_epochs": 1.5, "save_steps": 1}
    )
    by_epochs.train()
    assert by_epochs.state.global_step == 5
    again = trainer(
        tmp_path / "epochs", options={"max_steps": -1, "num_train_epochs": 1.5, "save_steps": 1}
    )
    assert again.train(resume_from_checkpoint=True).global_step == 5


def test_an_older_checkpoint_can_be_chosen(unbroken: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, resume=False)
    made = trainer(tmp_path)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    made.save_student(tmp_path / "final")
    assert digest(tmp_path) == unbroken
    assert [path.name[:11] for path in tmp_path.glob("replaced-*")] == ["replaced-8-"]


def test_an_epoch_that_ends_at_a_checkpoint_resumes_bit_by_bit(tmp_path: Path) -> None:
    def options(steps: int) -> dict[str, Any]:
        return {"max_steps": steps, "save_steps": 3, "lr_scheduler_type": "constant"}

    whole = trainer(tmp_path / "a", options=options(5))
    whole.train()
    trainer(tmp_path / "b", options=options(3)).train()
    rest = trainer(tmp_path / "b", options=options(5))
    rest.train(resume_from_checkpoint=True)
    for ours, theirs in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_of_another_run_is_refused_with_the_differences(tmp_path: Path) -> None:
    trainer(tmp_path, options={"max_steps": 3}, identity={"recipe": "aa"}).train()
    other = trainer(
        tmp_path, teachers=[FakeTeacher("new")], seed=4, identity={"recipe": "bb"},
        train_dataset=Windows(8),
    )  # fmt: skip
    with refused(TrainingError, "checkpoint-3: "):
        other.train(resume_from_checkpoint=True)


def test_nothing_to_resume_from_is_explained(tmp_path: Path) -> None:
    with refused(TrainingError, "TMP: "):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    trainer(tmp_path, options={"max_steps": 2, "save_steps": 1}).train()
    (tmp_path / "checkpoint-1" / "state.json").unlink()
    (tmp_path / "checkpoint-2" / "MANIFEST.json").unlink()
    with refused(TrainingError, "TMP: "):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path: Path) -> None:
    trainer(tmp_path, options={"max_steps": 1}).train()
    with refused(TrainingError, "TMP: "):
        trainer(tmp_path).train()


def test_another_student_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, options={"max_steps": 2}).train()
    other = trainer(tmp_path, model=small_model(num_hidden_layers=1))
    # torch lists the mismatched parameters, in words of its version.
    with refused(TrainingError, "checkpoint-2: ", volatile=r"\(Error[\s\S]*\)"):
        other.train(resume_from_checkpoint=True)


def test_a_full_disk_keeps_the_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, options={"save_steps": 2})
    real = checkpoint.commit

    def commit(temporary: Path, final: Path) -> None:
        if final.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        real(temporary, final)

    monkeypatch.setattr(checkpoint, "commit", commit)
    with refused(TrainingError, "TMP/checkpoint-4: "):
        made.train()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not list(tmp_path.glob(".tmp-*"))


def with_features() -> Objective:
    model = small_model()
    widths = {tap: tap_width(model, tap) for tap in tap_names(model)}
    options = FeatureOptions()
    features = FeatureLoss(options, widths, {"teacher_0": widths, "teacher_1": widths}, seed=0)
    return Objective(ObjectiveOptions(features=options), objective().fusion, states=[features])


def test_adapters_are_trained_saved_and_not_in_the_student(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a", objective=with_features())
    start = {name: p.detach().clone() for name, p in whole.step.objective.named_parameters()}
    assert start
    whole.train()
    assert all(
        not torch.equal(start[name], p) for name, p in whole.step.objective.named_parameters()
    )
    broken = trainer(tmp_path / "b", objective=with_features())

    class StopAt3(FakeStop):
        step = 3

    broken.add_callback(StopAt3(broken))
    with refused(Interrupted, "SIGTERM: "):
        broken.train()
    saved = load_file(str(tmp_path / "b" / "checkpoint-3" / state.OBJECTIVE))
    assert set(saved) >= set(start)
    weights = load_file(str(tmp_path / "b" / "checkpoint-3" / "student" / "model.safetensors"))
    assert set(weights) <= set(small_model().state_dict())
    rest = trainer(tmp_path / "b", objective=with_features())
    rest.train(resume_from_checkpoint=True)
    for name, tensor in whole.step.objective.state_dict().items():
        assert torch.equal(rest.step.objective.state_dict()[name], tensor)
    for ours, theirs in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    without = trainer(tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-8")
    with refused(TrainingError, "checkpoint-6: ", volatile=r"\(Error[\s\S]*\)"):
        without.train(resume_from_checkpoint=True)


class FakeStop(TrainerCallback):
    """Simulates a signal during one step."""

    step = 0

    def __init__(self, made: Any) -> None:
        self.made = made

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step + 1 == self.step:
            self.made._stop.received = "SIGTERM"


def test_every_checkpoint_is_a_plain_student_without_pickle(tmp_path: Path) -> None:
    made = trainer(tmp_path, options={"max_steps": 4})
    made.train()
    made.save_student(tmp_path / "student")
    made.save_student(tmp_path / "student")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors"}
    for folder in (tmp_path / "student", tmp_path / "checkpoint-4" / "student"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.config.use_cache
        for ours, theirs in zip(loaded.parameters(), made.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with refused(TrainingError, "TMP/mine: "):
        made.save_student(tmp_path / "mine")


def test_random_generators_are_restored_without_pickle() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    np.random.normal()
    saved = json.loads(json.dumps(state.rng_state()))
    first = (random.gauss(0, 1), np.random.normal(), torch.rand(3).tolist())
    state.load_rng_state(saved)
    assert (random.gauss(0, 1), np.random.normal(), torch.rand(3).tolist()) == first


def test_an_optimizer_that_needs_pickle_is_refused(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter]["odd"] = object()
    record, tensors = state.optimizer_state(optimizer)
    with refused(TrainingError, "optimizer: "):
        state.save(tmp_path, {"optimizer": record}, {state.OPTIMIZER: tensors})


def test_the_log_never_contains_a_step_twice(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        log.append(LogStep(step=step, loss=0.5))
    with log.path.open("a") as file:
        file.write('{"step": 4, "lo')
    log.restore(None, 2)
    assert read_log(log.path) == (LogStep(step=1, loss=0.5), LogStep(step=2, loss=0.5))
    log.append(LogStep(step=3, loss=0.25))
    assert len(read_log(log.path) or ()) == 3
