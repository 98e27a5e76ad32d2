"""Run folders, interrupted runs, packages and the demo: rows 28 to 33, 79 and 80."""

from __future__ import annotations

import json
import os
import shutil
import signal
from importlib import metadata
from pathlib import Path

import pytest

from bad_input_bench import Bench
from collegium.config.recipe import load_recipe
from collegium.run import pipeline
from collegium.run.folder import RunFolder
from collegium.train import trainer
from refusals import check_message
from tiny_run import recipe_text

OUT = Path("out")


@pytest.fixture(scope="module")
def stopped(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as left by a kill at the end of training: two checkpoints, no student."""
    root = tmp_path_factory.mktemp("stopped")
    (root / "run.yaml").write_text(recipe_text(zoo))
    pipeline.train(load_recipe(root / "run.yaml", [f"output_dir={root / 'out'}"]))
    shutil.rmtree(root / "out" / "student")
    (root / "out" / "train" / "summary.json").unlink()
    return root / "out"


def resumed(bench: Bench, stopped: Path) -> None:
    """Copy the stopped run to the bench, as a run of its recipe."""
    shutil.copytree(stopped, OUT)
    recipe = RunFolder(OUT)
    (OUT / "recipe.json").unlink()
    recipe.claim(pipeline.RunContext(load_recipe("run.yaml")).values, "")


@pytest.mark.parametrize("folder", ["zoo/code", "zoo/../zoo/scripture"])
def test_28_output_is_an_input(folder: str, bench: Bench) -> None:
    override = f"output_dir={folder}"
    bench.refused(f"override `{override}`: output_dir: got {folder}", override)


def test_28_output_would_overwrite_an_input(bench: Bench) -> None:
    shutil.copytree("zoo/code", "old/student")
    bench.refused(
        "override `output_dir=old`: output_dir: got old",
        "teachers.code.model=old/student",
        "output_dir=old",
    )


def test_28_output_inside_the_data(bench: Bench) -> None:
    bench.refused(
        "override `output_dir=zoo/runs/a`: output_dir: got zoo/runs/a",
        "data.train.1.path=zoo",
        "output_dir=zoo/runs/a",
    )


def test_29_output_holds_something_else(bench: Bench) -> None:
    OUT.mkdir()
    (OUT / "thesis.tex").write_text("")
    bench.refused("output_dir: out holds other data (thesis.tex)")


def test_31_a_folder_of_another_recipe(stopped: Path, lab: Bench) -> None:
    # Nothing is lost: what the other recipe made is kept, and named.
    resumed(lab, stopped)
    result = lab.invoke("train", "run.yaml", "train.learning_rate=0.02")
    assert result.exit_code == 0, result.stderr
    assert "changed since the last run: train.learning_rate: 0.01 -> 0.02" in result.stderr
    assert "train kept in out/previous/1" in result.stderr
    assert Path("out/previous/1/train/checkpoint-4").is_dir()


def test_29_a_run_of_the_same_recipe_is_resumed(stopped: Path, lab: Bench) -> None:
    resumed(lab, stopped)
    result = lab.invoke("train", "run.yaml")
    assert (result.exit_code, result.stdout) == (0, "student: out/student\n"), result.stderr


def test_30_output_below_a_file(bench: Bench) -> None:
    OUT.write_text("")
    bench.refused("output_dir: cannot write out (out is a file)")
    bench.refused(
        "output_dir: cannot write out/deep (out is a file)", "output_dir=out/deep", command="check"
    )


def test_30_output_is_read_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access
    monkeypatch.setattr(
        "collegium.run.folder.os.access",
        lambda path, mode: Path(path).absolute() != bench.root and allowed(path, mode),
    )
    bench.refused(f"output_dir: cannot write out ({bench.root} is read-only)")


def test_30_a_disk_that_becomes_read_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    bench.refused("output_dir: cannot write out (Read-only file system)")


def test_32_no_intact_checkpoint(stopped: Path, bench: Bench) -> None:
    resumed(bench, stopped)
    (OUT / "train/checkpoint-4/MANIFEST.json").unlink()
    weights = OUT / "train/checkpoint-2/student/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    for command in ("run", "check"):
        bench.refused("out/train: no usable checkpoint", command=command)


def test_33_a_checkpoint_of_a_newer_version(stopped: Path, bench: Bench) -> None:
    resumed(bench, stopped)
    bench.edit("out/train/checkpoint-4/MANIFEST.json", lambda value: value.update(format=4))
    bench.refused("checkpoint-4: got checkpoint format 4")


@pytest.mark.parametrize("name", ["recipe.json", "stages.json"])
def test_a_damaged_run_folder(name: str, stopped: Path, bench: Bench) -> None:
    resumed(bench, stopped)
    (OUT / name).write_text("[]")
    result = bench.invoke("run", "run.yaml")
    _, message = result.stderr.removesuffix("\n").split("error: ")
    check_message(message, f"out/{name}: ")
    assert result.exit_code == 2


def test_another_process_on_the_folder(bench: Bench) -> None:
    with RunFolder(OUT).lock():
        assert bench.accepted()
        shutil.rmtree("zoo/code")  # the lock must be checked first
        bench.refused("out: another process is using this folder")


def test_a_preflight_without_teachers(bench: Bench) -> None:
    bench.refused("teachers: ", "teachers={}", "objective.kd_ratio=0", command="preflight")


def test_a_report_without_a_run(bench: Bench) -> None:
    result = bench.invoke("report", "run.yaml")
    check_message(result.stderr.removesuffix("\n"), "error: out: ")
    assert (result.exit_code, OUT.exists()) == (2, False)


@pytest.mark.parametrize(("package", "version"), [("torch", "2.5.1"), ("transformers", "5.3.0")])
def test_79_a_package_with_a_known_vulnerability(
    package: str, version: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: version if name == package else installed(name)
    )
    expected = f"{package}: got version {version}"
    bench.refused(expected)
    bench.refused(expected, command="check")
    demo = bench.invoke("demo", "--quick", "--output-dir", "out")
    check_message(demo.stderr.removesuffix("\n"), f"error: {expected}")
    assert (demo.exit_code, OUT.exists()) == (2, False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_80_a_run_that_is_stopped(
    number: signal.Signals, lab: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trainer.DistillTrainer.training_step

    def stop_in_the_first(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        signal.raise_signal(number)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.DistillTrainer, "training_step", stop_in_the_first)
        result = lab.invoke("train", "run.yaml")
    assert result.exit_code == 128 + number, result.stderr
    check_message("\n".join(result.stderr.splitlines()[-2:]), f"{number.name}: ")
    assert json.loads((OUT / "stages.json").read_text())["train"]["status"] == "interrupted"
    again = lab.invoke("train", "run.yaml")
    assert (again.exit_code, again.stdout) == (0, "student: out/student\n"), again.stderr
    assert json.loads((OUT / "train/summary.json").read_text())["steps"] == 4


def test_80_a_check_that_is_stopped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("collegium.models.student.FreshStudent.check", stop)
    result = bench.invoke("run", "run.yaml")
    check_message(result.stderr.removesuffix("\n"), "interrupted\n")
    assert (result.exit_code, OUT.exists()) == (130, False)


@pytest.mark.parametrize("controls", ["nonsense", "ce_only,unifrom"])
def test_unknown_controls_of_the_demo(controls: str, bench: Bench) -> None:
    before = bench.files()
    result = bench.invoke("demo", "--quick", "--output-dir", "out", "--controls", controls)
    check_message(result.stderr.removesuffix("\n"), "error: controls: ")
    assert (result.exit_code, bench.files()) == (2, before)


def test_a_demo_in_a_folder_with_other_data(bench: Bench) -> None:
    before = bench.files()
    result = bench.invoke("demo", "--quick", "--output-dir", "zoo")
    check_message(result.stderr.removesuffix("\n"), "error: output_dir: zoo holds other data")
    assert (result.exit_code, bench.files()) == (2, before)
