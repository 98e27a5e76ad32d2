"""Command line: exit codes, output, and light imports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import collegium.run
from collegium.cli import app
from collegium.config.recipe import Recipe, load_recipe, write_fusion
from collegium.errors import CollegiumError, DataError, Interrupted
from collegium.storage.records import (
    CandidateFusion,
    ChosenFusion,
    Disagreement,
    PreflightReport,
    ResultRow,
    TeacherMeasure,
)
from recipes_for_tests import MINIMAL
from refusals import check_message

COMMANDS = (
    *("run", "check", "preflight", "train", "evaluate", "report", "demo", "init"),
    *("generate", "push", "draft"),
)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace `collegium.run.pipeline` by stages that the test defines."""
    stand_in = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "collegium.run.pipeline", stand_in)
    monkeypatch.setattr(collegium.run, "pipeline", stand_in, raising=False)
    return vars(stand_in)


def refusal(result: Result) -> str:
    """Return the error of a refused command."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    return result.stderr.removeprefix("error: ").removesuffix("\n")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def failing(error: BaseException) -> Callable[[Recipe], Any]:
    def stage(recipe: Recipe) -> Any:
        raise error

    return stage


@pytest.mark.parametrize("argument", ["--help", "--version", "run --help"])
def test_help_imports_nothing_heavy(argument: str) -> None:
    program = (
        "import sys\n"
        "from collegium.cli import app\n"
        f"try: app({argument.split()!r})\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'datasets'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy: []"


def test_help_names_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert f" {command} " in result.stdout


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"collegium {collegium.__version__}\n")


def test_init_writes_a_recipe_that_decodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert invoke("init").exit_code == 0
    recipe = load_recipe("collegium.yaml")
    assert list(recipe.teachers) == ["general", "code"]
    template = Path(collegium.__file__).parent / "config" / "template.yaml"
    assert Path("collegium.yaml").read_text() == template.read_text()


def test_init_does_not_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("precious")
    result = invoke("init", path)
    check_message(refusal(result), "TMP/mine.yaml: ")
    assert path.read_text() == "precious"
    assert invoke("init", tmp_path / "no" / "folder.yaml").exit_code == 2


def test_check_prints_lines_and_warnings(recipe_file: Path, stages: dict[str, Any]) -> None:
    recipes: list[Recipe] = []

    def check(recipe: Recipe) -> Any:
        recipes.append(recipe)
        return SimpleNamespace(lines=["vocabulary: 400 tokens"], warnings=["little text"])

    stages["check"] = check
    result = invoke("check", recipe_file, "train.max_steps=7", "seed=3")
    assert result.exit_code == 0
    assert result.stdout == "vocabulary: 400 tokens\nwarning: little text\n"
    assert (recipes[0].train.max_steps, recipes[0].seed) == (7, 3)


def test_train_and_report_print_the_path_of_the_result(
    recipe_file: Path, stages: dict[str, Any]
) -> None:
    stages["train"] = lambda recipe: recipe.output_dir / "student"
    stages["report"] = lambda recipe: recipe.output_dir / "report.html"
    assert invoke("train", recipe_file).stdout == "student: runs/run/student\n"
    assert invoke("report", recipe_file).stdout == "report: runs/run/report.html\n"


def test_a_run_folder_is_as_good_as_its_recipe(tmp_path: Path, stages: dict[str, Any]) -> None:
    folder = tmp_path / "moved"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(MINIMAL)
    (folder / "stages.json").write_text("{}")
    stages["report"] = lambda recipe: recipe.output_dir / "report.html"
    assert invoke("report", folder).stdout == f"report: {folder / 'report.html'}\n"


def test_preflight_applies_its_choice(recipe_file: Path, stages: dict[str, Any]) -> None:
    fusion = {"weighting": {"name": "entropy", "tau": 0.5}, "pool": "linear"}

    def measure(recipe: Recipe, *, apply_to: Path | None) -> PreflightReport:
        if apply_to is not None:
            write_fusion(apply_to, fusion)
        return measured(fusion)

    stages["preflight"] = measure
    before = recipe_file.read_text()
    assert invoke("preflight", recipe_file).exit_code == 0
    assert recipe_file.read_text() == before
    result = invoke("preflight", recipe_file, "--apply")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.replace("\n", "").endswith("fusion set to entropy(tau=0.5), linear")
    assert plain_fusion(load_recipe(recipe_file)) == ("entropy", 0.5)


def test_run_and_evaluate_print_the_table(
    tmp_path: Path, recipe_file: Path, stages: dict[str, Any]
) -> None:
    row = ResultRow(name="student", kind="student", num_parameters=1000, perplexity=7.4, ece=0.25)

    def finish(recipe: Recipe) -> Path:
        recipe.output_dir.mkdir(exist_ok=True)
        (recipe.output_dir / "results.json").write_text(json.dumps([row.to_json()]))
        return recipe.output_dir

    stages["run"] = stages["evaluate"] = finish
    folder = tmp_path / "out"
    ran = invoke("run", recipe_file, f"output_dir={folder}")
    assert ran.exit_code == 0, ran.exception
    assert re.search(r"student +1.00 k +7.40 +25.0 %", ran.stdout)
    assert f"report: {folder / 'report.html'}" in ran.stdout.replace("\n", "")
    evaluated = invoke("evaluate", recipe_file, f"output_dir={folder}")
    assert evaluated.exit_code == 0
    assert "Held-out evaluation" in evaluated.stdout


def plain_fusion(recipe: Recipe) -> tuple[str, float]:
    from collegium.config.recipe import plain

    weighting = plain(recipe.fusion)["weighting"]
    return weighting["name"], weighting["tau"]


def measured(fusion: dict[str, Any]) -> PreflightReport:
    """Return the smallest preflight that can be printed."""
    teacher = TeacherMeasure(nll=2.0, perplexity=7.4, ece=0.1, domains={"web": 2.0})
    zeros = [[0.0, 0.1], [0.1, 0.0]]
    return PreflightReport(
        teachers={"code": teacher, "prose": teacher},
        disagreement=Disagreement(teachers=["code", "prose"], jsd=zeros, top1=zeros),
        fusions=[CandidateFusion(nll=1.9, fusion=fusion, calibration="raw")],
        chosen=ChosenFusion(nll=1.9, fusion=fusion),
        verdict=["The chosen fusion knows more than any single teacher."],
    )


def test_user_errors_exit_with_2(recipe_file: Path, stages: dict[str, Any]) -> None:
    stages["run"] = failing(DataError("a.jsonl:7: got 5; must be text"))
    result = invoke("run", recipe_file)
    assert refusal(result) == "a.jsonl:7: got 5; must be text"


@pytest.mark.parametrize("index", [0, 1, 3])
def test_debug_shows_the_traceback(index: int, recipe_file: Path, stages: dict[str, Any]) -> None:
    stages["run"] = failing(CollegiumError("broken"))
    arguments: list[str | Path] = ["run", recipe_file, "seed=1"]
    arguments.insert(index, "--debug")
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("\nerror: broken\n")


@pytest.mark.parametrize("error", [Interrupted("stopped at step 12"), KeyboardInterrupt()])
def test_an_interrupted_run_exits_with_130(
    error: BaseException, recipe_file: Path, stages: dict[str, Any]
) -> None:
    stages["train"] = failing(error)
    result = invoke("train", recipe_file)
    assert result.exit_code == 130
    check_message(result.stderr.removesuffix("\n"), f"{str(error) or 'interrupted'}\n")


def terminate(*args: Any, **options: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)  # a signal interrupts it
    raise AssertionError("not stopped")


@pytest.mark.parametrize(
    "command", ["run", "check", "preflight", "cache", "train", "evaluate", "report"]
)
def test_sigterm_stops_every_stage_with_143(
    command: str, recipe_file: Path, stages: dict[str, Any]
) -> None:
    stages[command] = terminate
    before = signal.getsignal(signal.SIGTERM)
    result = invoke(command, recipe_file)
    assert result.exit_code == 143, result.exception
    check_message(result.stderr.removesuffix("\n"), "SIGTERM: interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_stops_demo_and_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collegium.demo.run.run_demo", terminate)
    monkeypatch.setattr("collegium.study.sweep.run_study", terminate)
    for arguments in (["demo"], ["study", str(tmp_path)]):
        assert CliRunner().invoke(app, arguments).exit_code == 143


def test_a_saved_checkpoint_after_sigterm_exits_with_143(
    recipe_file: Path, stages: dict[str, Any]
) -> None:
    stages["train"] = failing(Interrupted("SIGTERM: stopped", signal.SIGTERM))
    assert invoke("train", recipe_file).exit_code == 143


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigterm_ends_a_forked_worker_at_once(recipe_file: Path, stages: dict[str, Any]) -> None:
    """As `Process.terminate` of a data loader: no traceback of an interrupted command."""
    codes = []

    def fork(*args: Any) -> Any:
        child = os.fork()
        if child == 0:
            terminate()
            os._exit(1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        raise CollegiumError("done")

    stages["train"] = fork
    assert invoke("train", recipe_file).exit_code == 2
    assert codes == [-signal.SIGTERM]


def test_our_own_bugs_keep_their_traceback(recipe_file: Path, stages: dict[str, Any]) -> None:
    stages["evaluate"] = failing(ZeroDivisionError("ours"))
    result = invoke("evaluate", recipe_file)
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(28, "No space left on device", "out/x"),
            "out/x: the disk is full (No space left on device); finished work is kept; free "
            "space, then run the same command again",
        ),
        (OSError(13, "Permission denied", "out/x"), "out/x: Permission denied"),
        (OSError("odd"), "odd"),
    ],
)
def test_an_io_error_is_not_reported_as_a_bug(
    error: OSError, expected: str, recipe_file: Path, stages: dict[str, Any]
) -> None:
    stages["run"] = failing(error)
    assert refusal(invoke("run", recipe_file)) == expected


def test_a_plain_value_error_is_a_bug(recipe_file: Path, stages: dict[str, Any]) -> None:
    stages["evaluate"] = failing(ValueError("ours"))
    assert isinstance(invoke("evaluate", recipe_file).exception, ValueError)


def test_an_invalid_option_built_in_python_is_a_user_error(
    recipe_file: Path, stages: dict[str, Any]
) -> None:
    from collegium.train.options import TrainOptions

    def run(recipe: Recipe) -> Any:
        return TrainOptions(learning_rate=-1, save_steps=0)

    stages["run"] = run
    check_message(refusal(invoke("run", recipe_file)), "TrainOptions.learning_rate: ")


def test_demo_passes_its_options_on(
    tmp_path: Path, stages: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[str, Any] = {}

    def run_demo(**options: Any) -> Path:
        received.update(options)
        raise CollegiumError("enough")

    monkeypatch.setattr("collegium.demo.run.run_demo", run_demo)
    result = invoke(
        "demo", "--quick", "--output-dir", tmp_path, "--seed", "3", "--controls", "ce_only,uniform"
    )
    assert result.stderr == "error: enough\n"
    expected = {
        "quick": True,
        "output_dir": tmp_path,
        "seed": 3,
        "controls": ["ce_only", "uniform"],
    }
    assert received == expected


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "collegium", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    expected = (0, f"collegium {collegium.__version__}\n", "")
    assert (result.returncode, result.stdout, result.stderr) == expected


def test_the_installed_command_exits_with_2(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "collegium.cli", "check", "none.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    check_message(result.stderr.removesuffix("\n"), "error: none.yaml: ")
