"""Invalid recipes: one message with all errors, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from collegium.cli import app
from recipes_for_tests import minimal
from refusals import check_message

CASES: dict[str, tuple[str, ...]] = {
    # Name: (recipe, path of each line of the message).
    "02 empty": ("# nothing\n", "run.yaml"),
    "02 not a mapping": ("- 1\n", "run.yaml"),
    "03 syntax": (minimal() + "fusion: [auto\n", "run.yaml:14"),
    "04 duplicate key": (
        minimal(train="{max_steps: 3, optim: sgd,\n  max_steps: 4}"),
        "run.yaml:12: train.max_steps",
    ),
    "04 duplicate section": (minimal() + "train: {}\n", "run.yaml:13: train"),
    "05 unknown key": (minimal(objective="{temprature: 2}"), "run.yaml:9: objective.temprature"),
    "05 unknown section": (minimal(trian="{max_steps: 3}"), "run.yaml:13: trian"),
    "06 alpha": (minimal(objective="{alpha: 0.5}"), "run.yaml:9: objective.alpha"),
    "06 lambda": (minimal(objective="{lambda: 0.5}"), "run.yaml:9: objective.lambda"),
    "06 lr": (minimal(train="{lr: 1e-4}"), "run.yaml:11: train.lr"),
    "06 batch_size": (minimal(train="{batch_size: 4}"), "run.yaml:11: train.batch_size"),
    "06 T": (minimal(objective="{T: 2}"), "run.yaml:9: objective.T"),
    "06 steps": (minimal(train="{steps: 4}"), "run.yaml:11: train.steps"),
    "07 not a number": (
        minimal(train="{learning_rate: 1e-4x}"),
        "run.yaml:11: train.learning_rate",
    ),
    "07 quoted number": (
        minimal(train="{learning_rate: '0.1'}"),
        "run.yaml:11: train.learning_rate",
    ),
    "08 leading zero": (minimal(seed="010"), "run.yaml:13: seed"),
    "08 sexagesimal": (minimal(seed="1:30"), "run.yaml:13: seed"),
    "08 no is a string": (minimal(train="{bf16: no}"), "run.yaml:11: train.bf16"),
    "08 true is not a number": (minimal(train="{max_steps: true}"), "run.yaml:11: train.max_steps"),
    "09 too deep": ("a: " + "[" * 20_000, "run.yaml:1"),
    "09 alias of itself": (minimal(name="&a [*a]"), "run.yaml"),
    "11 function": ("student: !function os.system\n", "run.yaml:1"),
    "10 tag": (
        "student: !!python/object:os.system {}\nseed: !!int 3\n",
        "run.yaml:1",
        "run.yaml:2",
    ),
    "11 code": (
        minimal(student="{model: m, _target_: os.system, _component_: x}"),
        "run.yaml:1: student._target_",
        "run.yaml:1: student._component_",
    ),
    "12 nan": (
        minimal(objective="{temperature: .nan}", train="{learning_rate: -.inf}"),
        "run.yaml:9: objective.temperature",
        "run.yaml:10: train.learning_rate",
    ),
    "12 overflow": (minimal(objective="{temperature: 1e999}"), "run.yaml:9: objective.temperature"),
    "13 negative learning rate": (
        minimal(train="{learning_rate: -0.001}"),
        "run.yaml:11: train.learning_rate",
    ),
    "13 huge learning rate": (
        minimal(train="{learning_rate: 5}"),
        "run.yaml:11: train.learning_rate",
    ),
    "14 temperature": (minimal(objective="{temperature: 0}"), "run.yaml:9: objective.temperature"),
    "15 share": (minimal(objective="{kd_ratio: 1.3}"), "run.yaml:9: objective.kd_ratio"),
    "15 skew": (
        minimal(objective="{divergence: {name: skewed_forward_kl, skew: 1.5}}"),
        "run.yaml:9: objective.divergence.skew",
    ),
    "16 sum of weights": (
        minimal(fusion="{weighting: {name: fixed, weights: {code: 0.5, prose: 0.8}}}"),
        "run.yaml:13: fusion.weighting.weights",
    ),
    "16 all weights zero": (
        minimal(fusion="{weighting: {name: fixed, weights: {code: 0, prose: 0}}}"),
        "run.yaml:13: fusion.weighting.weights",
    ),
    "16 negative weight": (
        minimal(fusion="{weighting: {name: fixed, weights: {code: -0.5, prose: 1.5}}}"),
        "run.yaml:13: fusion.weighting.weights.code",
    ),
    "16 weight of no teacher": (
        minimal(fusion="{weighting: {name: fixed, weights: {code: 0.5, pros: 0.5}}}"),
        "run.yaml:13: fusion.weighting.weights",
        "run.yaml:13: fusion.weighting.weights",
    ),
    "16 domain weights": (
        minimal(
            fusion="{weighting: {name: domain_weights, weights: {law: {code: 1}}, "
            "default: {cod: 1, prose: 0}}}"
        ),
        "run.yaml:13: fusion.weighting.weights.law",
        "run.yaml:13: fusion.weighting.default",
        "run.yaml:13: fusion.weighting.default",
    ),
    "16 domain sums": (
        minimal(
            fusion="{weighting: {name: domain_weights, weights: {}, default: {code: 1, prose: 1}}}"
        ),
        "run.yaml:13: fusion.weighting.default",
    ),
    "16 gate": (
        minimal(fusion="{weighting: {name: gate, offsets: {code: 0.5}}}"),
        "run.yaml:13: fusion.weighting.offsets",
    ),
    "16 route to no teacher": (
        minimal(
            fusion="{weighting: {name: route, default: prse, domains: {law: code, novel: cod}}}"
        ),
        "run.yaml:13: fusion.weighting.default",
        "run.yaml:13: fusion.weighting.domains.novel",
    ),
    "16 route without default": (
        minimal(fusion="{weighting: {name: route, domains: {law: code}}}"),
        "run.yaml:13: fusion.weighting.default",
    ),
    "17 pool": (
        minimal(fusion="{pool: log_linear, exponent: 0.3}"),
        "run.yaml:13: fusion.exponent",
    ),
    "17 conflict": (
        minimal(fusion="{conflict: {name: truth_fallback, powr: 2}}"),
        "run.yaml:13: fusion.conflict.powr",
    ),
    "17 no token kept": (
        minimal(cache="{enabled: true, targets: {name: top_k, k: 0}}"),
        "run.yaml:13: cache.targets.k",
    ),
    "17 weighting": (minimal(fusion="{weighting: uniformly}"), "run.yaml:13: fusion.weighting"),
    "17 divergence": (
        minimal(objective="{divergence: hellinger}"),
        "run.yaml:9: objective.divergence",
    ),
    "17 divergence without a name": (
        minimal(objective="{divergence: {skew: 0.1}}"),
        "run.yaml:9: objective.divergence",
    ),
    "17 option of another divergence": (
        minimal(objective="{divergence: {name: forward_kl, skew: 0.1}}"),
        "run.yaml:9: objective.divergence.skew",
    ),
    "21 fraction": (
        minimal(train="{per_device_train_batch_size: 1.5}"),
        "run.yaml:11: train.per_device_train_batch_size",
    ),
    "21 chunk": (minimal(objective="{block_size: 0}"), "run.yaml:9: objective.block_size"),
    "21 memory of a chunk": (
        minimal(objective="{block_megabytes: 0}"),
        "run.yaml:9: objective.block_megabytes",
    ),
    "21 zero": (
        minimal(train="{gradient_accumulation_steps: 0}"),
        "run.yaml:11: train.gradient_accumulation_steps",
    ),
    "23 no steps": (minimal(train="{max_steps: 0}"), "run.yaml:11: train.max_steps"),
    "25 no teacher": (minimal(teachers="{}"), "run.yaml:2: teachers"),
    "25 teachers left out": (minimal(teachers=""), "run.yaml: teachers"),
    "28 output is the student": (
        minimal(output_dir="models/../models/student"),
        "run.yaml:13: output_dir",
    ),
    "28 output is a teacher": (minimal(output_dir="models/code"), "run.yaml:13: output_dir"),
    "28 output is a tokenizer": (
        minimal(student="{model: m, tokenizer: words}", output_dir="words"),
        "run.yaml:13: output_dir",
    ),
    "28 output would overwrite the student": (
        minimal(student="{model: runs/a/student}", output_dir="runs/a"),
        "run.yaml:13: output_dir",
    ),
    "28 output inside the data": (minimal(data="{train: [{path: .}]}"), "run.yaml: output_dir"),
    "28 output is not a path": (minimal(output_dir='"a\\0b"'), "run.yaml:13: output_dir"),
    "features of no teacher": (
        minimal(objective="{features: {teacher_weights: {cod: 1}}}"),
        "run.yaml:9: objective.features.teacher_weights",
    ),
    "77 secret by key": (minimal(student="{model: m, token: abc}"), "run.yaml:1: student.token"),
    "77 secret by value": (
        minimal(student="{model: m, revision: hf_abcdefghijklmnopqrstuvwxyz}"),
        "run.yaml:1: student.revision",
    ),
    "name of teacher": (minimal(teachers="{../x: {model: m}}"), "run.yaml:2: teachers.../x"),
    "name of run": (minimal(name="a/b"), "run.yaml:13: name"),
    "unknown control": (
        minimal(evaluate="{controls: [ce_onl]}"),
        "run.yaml:13: evaluate.controls.0",
    ),
    "missing model": (
        minimal(teachers="{code: {dtype: float32}}"),
        "run.yaml:2: teachers.code.model",
    ),
    "missing sections": (minimal(student="", data=""), "run.yaml: student", "run.yaml: data"),
    "section of another type": (minimal(preflight="3"), "run.yaml:13: preflight"),
    "unknown fusion": (minimal(fusion="automatic"), "run.yaml:13: fusion"),
    "temperature of no teacher": (
        minimal(fusion="{weighting: uniform, temperatures: {cod: 1.2}}"),
        "run.yaml:13: fusion.temperatures",
    ),
    "best single of no teacher": (
        minimal(fusion="{weighting: {name: best_single, teacher: law}}"),
        "run.yaml:13: fusion.weighting.teacher",
    ),
    "all at once": (
        minimal(objective="{temprature: 2, kd_ratio: 2}", train="{max_steps: x}", sed="1"),
        "run.yaml:9: objective.temprature",
        "run.yaml:9: objective.kd_ratio",
        "run.yaml:10: train.max_steps",
        "run.yaml:11: sed",
    ),
    "all at once, unreadable values too": (
        minimal(objective="{temprature: 2}", train="{max_steps: 010, learning_rate: .nan}"),
        "run.yaml:9: objective.temprature",
        "run.yaml:10: train.max_steps",
        "run.yaml:10: train.learning_rate",
    ),
    "key that is not a string": (
        "? [a]\n: 1\n",
        "run.yaml: student",
        "run.yaml: data",
        "run.yaml:1",
    ),
}


def check_lines(stderr: str, paths: list[str]) -> None:
    """Compare the path of each line, and the whole message with the snapshot."""
    message = stderr.removeprefix("error: ").removesuffix("\n")
    assert stderr == f"error: {message}\n"
    for line, path in zip(message.split("\n"), paths, strict=True):
        assert line.startswith(f"{path}: "), line
    check_message(message, paths[0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_recipe(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, *paths = CASES[case]
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    result = CliRunner().invoke(app, ["run", "run.yaml"])
    lines = result.stderr.splitlines(keepends=True)
    # The other lines of a syntax error show its position in the file.
    check_lines(lines[0] if case.startswith("03") else "".join(lines), paths)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("case", ["05 unknown key", "09 too deep", "25 no teacher"])
def test_in_a_separate_process(case: str, tmp_path: Path) -> None:
    text, *paths = CASES[case]
    (tmp_path / "run.yaml").write_text(text)
    command = [sys.executable, "-m", "collegium.cli", "run", "run.yaml"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    check_lines(result.stderr, paths)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
