"""Run folders, interrupted runs, packages and the demo, from the command line: rows 28 to 33, 79 and 80."""

from __future__ import annotations

import json
import os
import shutil
import signal
from importlib import metadata
from pathlib import Path

import pytest

from bad_input_bench import Bench
from collegium import pipeline
from collegium.recipe import load_recipe
from collegium.run_folder import RunFolder
from collegium.train import trainer
from tiny_run import recipe_text

OUT = Path("out")


@pytest.fixture(scope="module")
def stopped(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as a kill in the last moment of training leaves it: two checkpoints, no student."""
    root = tmp_path_factory.mktemp("stopped")
    (root / "run.yaml").write_text(recipe_text(zoo))
    pipeline.train(load_recipe(root / "run.yaml", [f"output_dir={root / 'out'}"]))
    shutil.rmtree(root / "out" / "student")
    (root / "out" / "train" / "summary.json").unlink()
    return root / "out"


def resumed(bench: Bench, stopped: Path) -> None:
    """Put the stopped run on the bench, as a run of its recipe."""
    shutil.copytree(stopped, OUT)
    recipe = RunFolder(OUT)
    (OUT / "recipe.json").unlink()
    recipe.claim(pipeline.Workspace(load_recipe("run.yaml")).values, "")


@pytest.mark.parametrize(
    ("folder", "how", "whose"),
    [
        ("zoo/code", "is also", "teacher `code`"),
        ("zoo/../zoo/scripture", "is also", "student's tokenizer"),
    ],
)
def test_28_output_is_an_input(folder: str, how: str, whose: str, bench: Bench) -> None:
    lines = [
        f"override `output_dir={folder}`: output_dir: got {folder}, which {how} the folder of the {whose}"
    ]
    if whose.startswith("student"):
        lines.append(lines[0].replace("student's tokenizer", "teacher `scripture`"))
    bench.refused("\n".join(f"{line}; choose another" for line in lines), f"output_dir={folder}")


def test_28_output_would_overwrite_an_input(bench: Bench) -> None:
    shutil.copytree("zoo/code", "old/student")
    bench.refused(
        "override `output_dir=old`: output_dir: got old, which would overwrite the folder of the teacher "
        "`code`; choose another",
        "teachers.code.model=old/student",
        "output_dir=old",
    )


def test_28_output_among_the_texts(bench: Bench) -> None:
    bench.refused(
        "override `output_dir=zoo/runs/a`: output_dir: got zoo/runs/a, which lies in the data folder zoo, so "
        "that the run's own files would be read as text; choose another",
        "data.train.1.path=zoo",
        "output_dir=zoo/runs/a",
    )


def test_29_output_holds_something_else(bench: Bench) -> None:
    OUT.mkdir()
    (OUT / "thesis.tex").write_text("")
    bench.refused(
        "output_dir: out holds what is no run (thesis.tex); must be new, empty or the folder of this run; "
        "choose another output_dir"
    )


@pytest.mark.parametrize("command", ["run", "check", "preflight", "train", "evaluate"])
def test_31_a_folder_of_another_recipe(command: str, stopped: Path, bench: Bench) -> None:
    resumed(bench, stopped)
    bench.refused(
        "output_dir: out holds a run of another recipe (seed: 0 -> 1; train.learning_rate: 0.01 -> 0.02); "
        "choose another output_dir, or delete that folder",
        "seed=1",
        "train.learning_rate=0.02",
        command=command,
    )


def test_31_comes_before_anything_is_read(stopped: Path, bench: Bench) -> None:
    resumed(bench, stopped)
    for name in ("code.jsonl", "scripture.jsonl"):
        Path("zoo", name).unlink()
    shutil.rmtree("zoo/code")
    bench.refused(
        "output_dir: out holds a run of another recipe (seed: 0 -> 1); choose another output_dir, or delete "
        "that folder",
        "seed=1",
    )


def test_29_the_run_of_the_same_recipe_goes_on(stopped: Path, lab: Bench) -> None:
    resumed(lab, stopped)
    result = lab.invoke("train", "run.yaml")
    assert (result.exit_code, result.stdout) == (0, "student: out/student\n"), result.stderr


def test_30_output_below_a_file(bench: Bench) -> None:
    OUT.write_text("")
    bench.refused("output_dir: cannot write out (out is a file); choose another folder")
    bench.refused(
        "output_dir: cannot write out/deep (out is a file); choose another folder",
        "output_dir=out/deep",
        command="check",
    )


def test_30_output_is_read_only(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access
    monkeypatch.setattr(
        "collegium.run_folder.os.access",
        lambda path, mode: Path(path).absolute() != bench.root and allowed(path, mode),
    )
    bench.refused(
        f"output_dir: cannot write out ({bench.root} is read-only); choose another folder"
    )


def test_30_a_disk_that_changed_its_mind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdir(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    bench.refused("output_dir: cannot write out (Read-only file system); choose another folder")


def test_32_no_good_checkpoint(stopped: Path, bench: Bench) -> None:
    resumed(bench, stopped)
    (OUT / "train/checkpoint-4/MANIFEST.json").unlink()
    weights = OUT / "train/checkpoint-2/student/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    for command in ("run", "check"):
        bench.refused(
            "out/train: no usable checkpoint: checkpoint-4: has no readable MANIFEST.json (No such file or "
            "directory); checkpoint-2: student/model.safetensors fails its sha256; put a sound one back, or "
            "delete out/train to train from the start",
            command=command,
        )


def test_33_a_checkpoint_of_a_newer_version(stopped: Path, bench: Bench) -> None:
    resumed(bench, stopped)
    bench.edit("out/train/checkpoint-4/MANIFEST.json", lambda value: value.update(format=4))
    bench.refused("checkpoint-4: got checkpoint format 4; must be at most 1; upgrade collegium")


@pytest.mark.parametrize("name", ["recipe.json", "stages.json"])
def test_a_damaged_run_folder(name: str, stopped: Path, bench: Bench) -> None:
    resumed(bench, stopped)
    (OUT / name).write_text("[]")
    result = bench.invoke("run", "run.yaml")
    assert result.stderr.endswith(
        f"error: out/{name}: not a JSON object; delete it to make it again\n"
    )
    assert result.exit_code == 2


def test_another_process_on_the_folder(bench: Bench) -> None:
    with RunFolder(OUT).lock():
        assert bench.accepted()
        shutil.rmtree("zoo/code")  # which the refusal must not have looked at
        bench.refused(
            "out: another process is running on this folder; wait for it, or choose another output_dir"
        )


def test_a_preflight_without_teachers(bench: Bench) -> None:
    bench.refused(
        "teachers: none given; preflight compares teachers, name at least one",
        "teachers={}",
        "objective.kd_ratio=0",
        command="preflight",
    )


def test_a_report_without_a_run(bench: Bench) -> None:
    result = bench.invoke("report", "run.yaml")
    assert result.stderr.startswith("error: out: ")
    assert (result.exit_code, OUT.exists()) == (2, False)


@pytest.mark.parametrize(
    ("package", "version", "floor", "flaw"),
    [
        ("torch", "2.5.1", "2.10", "CVE-2026-24747"),
        ("transformers", "5.3.0", "5.5", "CVE-2026-5241"),
    ],
)
def test_79_a_package_with_a_known_flaw(
    package: str, version: str, floor: str, flaw: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: version if name == package else installed(name)
    )
    expected = (
        f"{package}: got version {version}; must be at least {floor} ({flaw}); "
        f"run `pip install --upgrade {package}`"
    )
    bench.refused(expected)
    bench.refused(expected, command="check")
    demo = bench.invoke("demo", "--quick", "--output-dir", "out")
    assert (demo.stderr, demo.exit_code, OUT.exists()) == (f"error: {expected}\n", 2, False)


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
    assert result.exit_code == 130, result.stderr
    assert result.stderr.splitlines()[-2:] == [
        f"{number.name}: stopped after step 1 of 4; a checkpoint was saved in out/train; resume to go on",
        "run the same command again to go on from the last checkpoint",
    ]
    assert json.loads((OUT / "stages.json").read_text())["train"]["status"] == "interrupted"
    again = lab.invoke("train", "run.yaml")
    assert (again.exit_code, again.stdout) == (0, "student: out/student\n"), again.stderr
    assert json.loads((OUT / "train/summary.json").read_text())["steps"] == 4


def test_80_a_check_that_is_stopped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("collegium.checks.check_student", stop)
    result = bench.invoke("run", "run.yaml")
    assert result.stderr == (
        "interrupted\nrun the same command again to go on from the last checkpoint\n"
    )
    assert (result.exit_code, OUT.exists()) == (130, False)


@pytest.mark.parametrize(
    ("controls", "expected"),
    [
        (
            "nonsense",
            "controls: got `nonsense`; unknown control; known: best_single, ce_only, "
            "ce_only_equal_compute, entropy, uniform",
        ),
        ("ce_only,unifrom", "controls: got `unifrom`; unknown control; did you mean `uniform`?"),
    ],
)
def test_unknown_controls_of_the_demo(controls: str, expected: str, bench: Bench) -> None:
    before = bench.files()
    result = bench.invoke("demo", "--quick", "--output-dir", "out", "--controls", controls)
    assert (result.stderr, result.exit_code) == (f"error: {expected}\n", 2)
    assert bench.files() == before


def test_a_demo_among_other_things(bench: Bench) -> None:
    before = bench.files()
    result = bench.invoke("demo", "--quick", "--output-dir", "zoo")
    assert result.stderr == (
        "error: output_dir: zoo holds what is no run (code, code.jsonl, scripture, scripture.jsonl); must be "
        "new, empty or the folder of this run; choose another output_dir\n"
    )
    assert (result.exit_code, bench.files()) == (2, before)
