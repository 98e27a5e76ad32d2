"""Recovery of quantized exports: the student of a run trained with rounded weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmark_modules import load_benchmark
from collegium.config.recipe import Recipe, load_recipe
from collegium.errors import ExportError, Interrupted, RecipeError
from collegium.export import build, foreign
from collegium.losses.pairing import FeatureOptions
from collegium.losses.row_terms import CrossEntropyTerm, DivergenceTerm
from collegium.losses.schedule import Linear
from collegium.run import exports, pipeline, recovery
from collegium.run.context import RunContext
from collegium.run.exports import export_run
from collegium.run.recovery import StudentRecoverer
from collegium.storage.records import ExportInfo, LogStep, open_record, read_log
from collegium.train.options import ObjectiveOptions
from collegium.train.trainer import DistillTrainer
from refusals import refused
from tiny_run import recipe_text, write_zoo

pytestmark = pytest.mark.filterwarnings("ignore")
OVERRIDES = (
    "student.config.hidden_size=32",
    "student.config.intermediate_size=64",
    "objective.kd_ratio=0.2",
    "fusion={weighting: {name: uniform}}",
    "cache={enabled: true}",
    "train.max_steps=100",
    "export.max_tokens=300",
)
RECOVER = "export.recover={steps: 24, learning_rate: 2e-3}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student has the logits of the trained one, and weights that 4 bits damage."""
    root = write_zoo(tmp_path_factory.mktemp("recovery"))
    (root / "recipe.yaml").write_text(recipe_text(root), encoding="utf-8")
    pipeline.train(load_recipe(root / "recipe.yaml", OVERRIDES))
    load_benchmark("recovery").damage(root / "run" / "student", 100.0)
    return root


@pytest.fixture
def recipe(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """That run without exports. The process that verifies is this one, and no teacher loads."""

    def run_foreign(request: dict[str, Any], **_: Any) -> dict[str, Any]:
        return foreign.compare({**request, "threads": 1})

    def refuse(_: RunContext, name: str) -> None:
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr(build, "run_foreign", run_foreign)
    monkeypatch.setattr(RunContext, "load_teacher", refuse)
    shutil.copytree(trained / "run", tmp_path / "run")
    output = f"output_dir={tmp_path / 'run'}"
    return load_recipe(trained / "recipe.yaml", [*OVERRIDES, output, RECOVER])


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def test_training_with_rounded_weights_repairs_a_damaged_student(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logs: list[list[LogStep]] = []
    train = StudentRecoverer.train

    def logged(self: StudentRecoverer, *arguments: Any) -> Path:
        folder = train(self, *arguments)
        logs.append(list(read_log(self.scratch / "training" / "log.jsonl") or ()))
        return folder

    monkeypatch.setattr(StudentRecoverer, "train", logged)
    folder = recipe.output_dir
    before = {p: p.read_bytes() for p in (folder / "student").iterdir()}
    info = export_run(recipe, ["torchao-int4", "hf"])["torchao-int4"]
    assert info.recovery is not None
    first, last = logs[0][0], logs[0][-1]
    assert (len(logs), last.step) == (1, 24)
    assert last.loss < 0.95 * first.loss
    before_it, after = info.recovery.before, info.recovery.after
    cost, left = before_it.bits_per_byte_change, after.bits_per_byte_change
    assert cost is not None
    assert left is not None
    assert cost > 0.10
    assert left < 0.7 * cost
    assert before_it.kl is not None
    assert after.kl is not None
    assert after.kl < 0.7 * before_it.kl
    assert (info.recovery.steps, info.recovery.learning_rate) == (24, 2e-3)
    assert info.recovery.is_kept
    assert info.verification == after
    # The float student is only read, and a format without a grid is not trained.
    assert {p: p.read_bytes() for p in (folder / "student").iterdir()} == before
    record = json.loads((folder / "exports" / "hf" / "export.json").read_text())
    assert (record["recovery"], record["verification"]["max_logit_difference"]) == (None, 0)
    output = capsys.readouterr()
    lines = output.err + output.out
    assert "export torchao-int4: before 24 steps of recovery: " in lines
    assert not [name for name in files_of(folder) if name.startswith(".scratch")]
    assert files_of(folder / "exports") == {"torchao-int4", "hf"}
    # A second call trains nothing, and another number of steps again.
    assert export_run(recipe, ["torchao-int4"])["torchao-int4"] == info
    assert len(logs) == 1
    assert export_run(recipe, ["torchao-int4"], recover=20)["torchao-int4"].recovery is not None
    assert len(logs) == 2


def test_the_same_steps_with_float_weights_repair_less(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    distances = []
    for prepare in (recovery.fake_quantize, lambda *_: None):
        monkeypatch.setattr(recovery, "fake_quantize", prepare)
        with suppress(ExportError):  # the float one may be beyond the bound of the format
            export_run(recipe, ["torchao-int4"])
        (path,) = (recipe.output_dir / "exports").rglob("export.json")
        info = open_record(path, ExportInfo)
        assert info.recovery is not None
        distances.append(info.recovery.after)
        shutil.rmtree(recipe.output_dir / "exports")
    rounded, plain = distances
    assert rounded.kl < plain.kl / 2
    assert rounded.bits_per_byte < plain.bits_per_byte


def test_an_interrupted_recovery_leaves_nothing(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DistillTrainer.training_step

    def stopped(self: DistillTrainer, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments, **named)

    monkeypatch.setattr(DistillTrainer, "training_step", stopped)
    before = files_of(recipe.output_dir)
    with refused(Interrupted, "recovery of torchao-int4"):
        export_run(recipe, ["torchao-int4"])
    assert files_of(recipe.output_dir) - before == {"exports"}
    assert files_of(recipe.output_dir / "exports") == set()


def test_wrong_options_are_refused(
    recipe: Recipe, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("{steps: 0}", "{}", "{steps: 1, bits_per_byte: -1}", "{steps: 1, rate: 2}"):
        override = f"export={{recover: {value}}}"
        with refused(RecipeError, f"override `{override}`: export.recover"):
            load_recipe(trained / "recipe.yaml", [override])
    with refused(ExportError, "export.recover"):
        export_run(recipe, ["hf", "onnx"])
    monkeypatch.setattr(exports, "is_installed", lambda name: name != "torchao")
    with refused(ExportError, "export.recover"):
        export_run(recipe, ["gguf-q8_0"])


def test_the_objective_of_further_training_is_that_of_the_last_step() -> None:
    short = ObjectiveOptions(kd_ratio=0.7, features=FeatureOptions())
    assert short.continued(10) == ObjectiveOptions(kd_ratio=0.7)
    falling, rising = Linear(initial=2, final=0, end=0.5), Linear(initial=0, final=2)
    kd = DivergenceTerm(weight=0.5, schedule=rising)
    long = ObjectiveOptions(terms=[kd, CrossEntropyTerm(schedule=falling), FeatureOptions()])
    (left,) = long.continued(11).placed_terms()
    assert isinstance(left.term, DivergenceTerm)
    assert left.term.schedule is None
    assert left.term.weight == pytest.approx(kd.weight_at(10, 11))
    only = ObjectiveOptions(terms=[FeatureOptions()])
    assert only.continued(10) == only.labels_only()
