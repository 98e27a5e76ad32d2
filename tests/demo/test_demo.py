"""The quick demo from the command line, and the plans of both demos."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from collegium.config.recipe import load_recipe
from collegium.demo import run
from collegium.demo.run import FULL, HERE, QUICK, installed_formats, run_demo
from collegium.export.formats import FORMATS


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a quick demo from the command line."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "collegium.cli", "demo", "--quick", "--output-dir", "out"]
    done = subprocess.run(
        command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "student (distilled)" in done.stdout
    return folder / "out"


@pytest.mark.slow
def test_it_writes_a_student_a_table_and_a_report(demo: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "student")
    model = AutoModelForCausalLM.from_pretrained(demo / "student")
    assert model.config.vocab_size == len(tokenizer)
    rows = json.loads((demo / "results.json").read_text(encoding="utf-8"))
    kinds = [row["kind"] for row in rows]
    assert kinds == ["untouched", *["teacher"] * 3, "fused", *["control"] * 2, "student"]
    # The student is at most half the size of any teacher.
    untouched, *_, student = rows
    assert student["perplexity"] < untouched["perplexity"] / 2
    assert student["num_parameters"] * 2 <= min(
        row["num_parameters"] for row in rows if row["kind"] == "teacher"
    )
    assert "<script" not in (demo / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_domain_is_predicted_best_by_its_teacher(demo: Path) -> None:
    teachers = json.loads((demo / "preflight.json").read_text(encoding="utf-8"))["teachers"]
    for domain in teachers:
        best = min(teachers, key=lambda name: teachers[name]["domains"][domain])
        assert best == domain


@pytest.mark.slow
def test_a_second_run_is_a_no_op(demo: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in demo.rglob("*.safetensors")}
    command = [sys.executable, "-m", "collegium.cli", "demo", "--quick", "--output-dir", "out"]
    subprocess.run(command, cwd=demo.parent, env=os.environ, capture_output=True, check=True)
    assert {p: p.stat().st_mtime_ns for p in demo.rglob("*.safetensors")} == before


@pytest.mark.parametrize("plan", [FULL, QUICK], ids=["full", "quick"])
def test_teachers_differ_and_the_recipe_names_them(plan) -> None:
    recipe = load_recipe(HERE / f"{plan.name}.yaml")
    assert set(recipe.teachers) == set(plan.specialists)
    assert {source.domain for source in recipe.data.train} == set(plan.specialists)
    shapes = {
        (c["model_type"], c["hidden_size"], c["num_hidden_layers"])
        for c in plan.specialists.values()
    }
    assert len(shapes) == len(plan.specialists)


def test_an_export_without_its_package_is_skipped_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = load_recipe(HERE / "demo.yaml").export.to
    assert names == ["onnx-int8", "gguf-q8_0"]
    assert installed_formats(names) == names
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(type(FORMATS["onnx-int8"]), "packages", ("no-onnx", "onnxruntime"))
    recipes = []
    monkeypatch.setattr(run, "prepare_text", lambda *_: None)
    monkeypatch.setattr(run, "ensure", lambda *_: None)
    monkeypatch.setattr(run.pipeline, "run", recipes.append)
    run_demo(output_dir=tmp_path / "demo")
    assert capsys.readouterr().err == (
        "export onnx-int8: skipped, since no-onnx is not installed; run "
        "`pip install 'collegium[export]'`\n"
    )
    assert (recipes[0].export.to, recipes[0].export.measure) == (["gguf-q8_0"], True)
