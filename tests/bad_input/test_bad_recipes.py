"""Every way to get a recipe wrong: the whole message, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from collegium.cli import app
from recipes_for_tests import minimal

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcde", "bcdef", strict=True)
)
DIVERGENCES = "forward_kl, jensen_shannon, reverse_kl, skewed_forward_kl, skewed_reverse_kl"

CASES = {
    "02 empty": (
        "# nothing\n",
        "run.yaml: the recipe is empty; `collegium init` writes a commented one",
    ),
    "02 not a mapping": ("- 1\n", "run.yaml: got a list; must be a mapping of keys"),
    "03 syntax": (
        minimal() + "fusion: [auto\n",
        "run.yaml:14: column 1: not valid YAML: expected ',' or ']', but got '<stream end>'",
    ),
    "04 duplicate key": (
        minimal(train="{max_steps: 3, optim: sgd,\n  max_steps: 4}"),
        "run.yaml:12: train.max_steps: given twice, in lines 11 and 12; remove one",
    ),
    "04 duplicate section": (
        minimal() + "train: {}\n",
        "run.yaml:13: train: given twice, in lines 11 and 13; remove one",
    ),
    "05 unknown key": (
        minimal(objective="{temprature: 2}"),
        "run.yaml:9: objective.temprature: unknown key; did you mean `temperature`?",
    ),
    "05 unknown section": (
        minimal(trian="{max_steps: 3}"),
        "run.yaml:13: trian: unknown key; did you mean `train`?",
    ),
    "06 alpha": (
        minimal(objective="{alpha: 0.5}"),
        "run.yaml:9: objective.alpha: unknown key; write objective.kd_ratio"
        " (the share of the distillation loss)",
    ),
    "06 lambda": (
        minimal(objective="{lambda: 0.5}"),
        "run.yaml:9: objective.lambda: unknown key; write objective.kd_ratio"
        " (the share of the distillation loss)",
    ),
    "06 lr": (
        minimal(train="{lr: 1e-4}"),
        "run.yaml:11: train.lr: unknown key; write train.learning_rate",
    ),
    "06 batch_size": (
        minimal(train="{batch_size: 4}"),
        "run.yaml:11: train.batch_size: unknown key; write train.per_device_train_batch_size",
    ),
    "06 T": (
        minimal(objective="{T: 2}"),
        "run.yaml:9: objective.T: unknown key; write objective.temperature",
    ),
    "06 steps": (
        minimal(train="{steps: 4}"),
        "run.yaml:11: train.steps: unknown key; write train.max_steps",
    ),
    "07 no number": (
        minimal(train="{learning_rate: 1e-4x}"),
        "run.yaml:11: train.learning_rate: got `1e-4x`; must be a number",
    ),
    "07 quoted number": (
        minimal(train="{learning_rate: '0.1'}"),
        "run.yaml:11: train.learning_rate: got `0.1`; must be a number",
    ),
    "08 leading zero": (
        minimal(seed="010"),
        "run.yaml:13: seed: got 010; a leading zero is ambiguous; write 10,"
        " or quote it if it is text",
    ),
    "08 sexagesimal": (
        minimal(seed="1:30"),
        "run.yaml:13: seed: got `1:30`; must be a whole number",
    ),
    "08 no is text": (
        minimal(train="{bf16: no}"),
        "run.yaml:11: train.bf16: got `no`; must be true or false",
    ),
    "08 true is no number": (
        minimal(train="{max_steps: true}"),
        "run.yaml:11: train.max_steps: got true; must be a whole number",
    ),
    "09 alias bomb": (BOMB, "run.yaml:1: expands past 10000 nodes (alias `*a`)"),
    "09 too deep": (
        "a: " + "[" * 20_000,
        "run.yaml:1: nested more than 40 levels deep",
    ),
    "09 too long": (
        "a:\n" + "  - 1\n" * 100_000,
        "run.yaml:19999: holds more than 10000 nodes",
    ),
    "09 alias of itself": (
        "a: &a [*a]\n",
        "run.yaml:1: nested more than 40 levels deep (alias `*a`)",
    ),
    "11 function": (
        "student: !function os.system\n",
        "run.yaml:1: YAML tags are not allowed in a recipe; remove the `!`",
    ),
    "10 tag": (
        "student: !!python/object:os.system {}\nseed: !!int 3\n",
        "run.yaml:1: YAML tags are not allowed in a recipe; remove the `!`\n"
        "run.yaml:2: YAML tags are not allowed in a recipe; remove the `!`",
    ),
    "11 code": (
        minimal(student="{model: m, _target_: os.system, _component_: x}"),
        "run.yaml:1: student._target_: a recipe cannot name code; remove this key\n"
        "run.yaml:1: student._component_: a recipe cannot name code; remove this key",
    ),
    "12 nan": (
        minimal(objective="{temperature: .nan}", train="{learning_rate: -.inf}"),
        "run.yaml:9: objective.temperature: got .nan; must be a finite number\n"
        "run.yaml:10: train.learning_rate: got -.inf; must be a finite number",
    ),
    "12 overflow": (
        minimal(objective="{temperature: 1e999}"),
        "run.yaml:9: objective.temperature: got 1e999; must be a finite number",
    ),
    "13 negative learning rate": (
        minimal(train="{learning_rate: -0.001}"),
        "run.yaml:11: train.learning_rate: got -0.001; must be greater than 0",
    ),
    "13 huge learning rate": (
        minimal(train="{learning_rate: 5}"),
        "run.yaml:11: train.learning_rate: got 5; must be at most 1",
    ),
    "14 temperature": (
        minimal(objective="{temperature: 0}"),
        "run.yaml:9: objective.temperature: got 0; must be > 0; for hard labels use kd_ratio: 0",
    ),
    "15 share": (
        minimal(objective="{kd_ratio: 1.3}"),
        "run.yaml:9: objective.kd_ratio: got 1.3; must be at most 1",
    ),
    "15 skew": (
        minimal(objective="{divergence: {name: skewed_forward_kl, skew: 1.5}}"),
        "run.yaml:9: objective.divergence.skew: got 1.5; must be less than 1",
    ),
    "16 sum of weights": (
        minimal(fusion="{weighting: {name: fixed, weights: {code: 0.5, prose: 0.8}}}"),
        "run.yaml:13: fusion.weighting: teacher weights sum to 1.30 (0.5, 0.8); they must sum to 1;"
        " divide each by their sum",
    ),
    "16 all weights zero": (
        minimal(fusion="{weighting: {name: fixed, weights: {code: 0, prose: 0}}}"),
        "run.yaml:13: fusion.weighting: teacher weights sum to 0.00 (0, 0); they must sum to 1;"
        " divide each by their sum",
    ),
    "16 negative weight": (
        minimal(fusion="{weighting: {name: fixed, weights: {code: -0.5, prose: 1.5}}}"),
        "run.yaml:13: fusion.weighting.weights.code: got -0.5; must be at least 0",
    ),
    "16 weight of no teacher": (
        minimal(fusion="{weighting: {name: fixed, weights: {code: 0.5, pros: 0.5}}}"),
        "run.yaml:13: fusion.weighting.weights: no weight for teacher `prose`;"
        " give one, 0 to leave it out\n"
        "run.yaml:13: fusion.weighting.weights: got `pros`; unknown teacher; did you mean `prose`?",
    ),
    "16 domain weights": (
        minimal(
            fusion="{weighting: {name: domain_weights, weights: {law: {code: 1}}, default: {cod: 1, prose: 0}}}"
        ),
        "run.yaml:13: fusion.weighting.default: no weight for teacher `code`; give one, 0 to leave it out\n"
        "run.yaml:13: fusion.weighting.weights.law: no weight for teacher `prose`;"
        " give one, 0 to leave it out\n"
        "run.yaml:13: fusion.weighting.default: got `cod`; unknown teacher; did you mean `code`?",
    ),
    "16 domain sums": (
        minimal(
            fusion="{weighting: {name: domain_weights, weights: {}, default: {code: 1, prose: 1}}}"
        ),
        "run.yaml:13: fusion.weighting: teacher weights sum to 2.00 (1, 1); they must sum to 1;"
        " divide each by their sum",
    ),
    "16 gate": (
        minimal(fusion="{weighting: {name: gate, offsets: {code: 0.5}}}"),
        "run.yaml:13: fusion.weighting.offsets: nothing for teacher `prose`; fit it again with all teachers",
    ),
    "16 route to no teacher": (
        minimal(
            fusion="{weighting: {name: route, default: prse, domains: {law: code, novel: cod}}}"
        ),
        "run.yaml:13: fusion.weighting.default: got `prse`; unknown teacher; did you mean `prose`?\n"
        "run.yaml:13: fusion.weighting.domains.novel: got `cod`; unknown teacher; did you mean `code`?",
    ),
    "16 route without default": (
        minimal(fusion="{weighting: {name: route, domains: {law: code}}}"),
        "run.yaml:13: fusion.weighting.default: missing; must be given",
    ),
    "17 pool": (
        minimal(fusion="{pool: log_linear, exponent: 0.3}"),
        "run.yaml:13: fusion.exponent: got 0.3 with pool `log_linear`; must be left out unless the pool is `power_mean`;"
        " leave it out",
    ),
    "17 conflict": (
        minimal(fusion="{conflict: {name: truth_fallback, powr: 2}}"),
        "run.yaml:13: fusion.conflict.powr: unknown key; did you mean `power`?",
    ),
    "17 no token kept": (
        minimal(cache="{enabled: true, targets: {name: top_k, k: 0}}"),
        "run.yaml:13: cache.targets.k: got 0; must be at least 1",
    ),
    "17 weighting": (
        minimal(fusion="{weighting: uniformly}"),
        "run.yaml:13: fusion.weighting: got `uniformly`; unknown name; did you mean `uniform`?",
    ),
    "17 divergence": (
        minimal(objective="{divergence: hellinger}"),
        f"run.yaml:9: objective.divergence: got `hellinger`; unknown name; known: {DIVERGENCES}",
    ),
    "17 divergence without a name": (
        minimal(objective="{divergence: {skew: 0.1}}"),
        "run.yaml:9: objective.divergence: got a mapping; must be a name, or a mapping with `name`;"
        f" known: {DIVERGENCES}",
    ),
    "17 option of a form": (
        minimal(objective="{divergence: {name: forward_kl, skew: 0.1}}"),
        "run.yaml:9: objective.divergence.skew: unknown key; it has none",
    ),
    "21 fraction": (
        minimal(train="{per_device_train_batch_size: 1.5}"),
        "run.yaml:11: train.per_device_train_batch_size: got 1.5; must be a whole number",
    ),
    "21 chunk": (
        minimal(objective="{block_size: 0}"),
        "run.yaml:9: objective.block_size: got 0; must be at least 1",
    ),
    "21 memory of a chunk": (
        minimal(objective="{block_megabytes: 0}"),
        "run.yaml:9: objective.block_megabytes: got 0; must be at least 1",
    ),
    "21 zero": (
        minimal(train="{gradient_accumulation_steps: 0}"),
        "run.yaml:11: train.gradient_accumulation_steps: got 0; must be at least 1",
    ),
    "23 no steps": (
        minimal(train="{max_steps: 0}"),
        "run.yaml:11: train.max_steps: got 0; must be at least 1, or -1 to train for"
        " num_train_epochs",
    ),
    "25 no teacher": (
        minimal(teachers="{}"),
        "run.yaml:2: teachers: give at least one teacher under `teachers:`,"
        " or set objective.kd_ratio: 0 for plain cross-entropy",
    ),
    "25 teachers left out": (
        minimal(teachers=""),
        "run.yaml: teachers: give at least one teacher under `teachers:`,"
        " or set objective.kd_ratio: 0 for plain cross-entropy",
    ),
    "28 output is the student": (
        minimal(output_dir="models/../models/student"),
        "run.yaml:13: output_dir: got models/../models/student,"
        " which is also the folder of the student; choose another",
    ),
    "28 output is a teacher": (
        minimal(output_dir="models/code"),
        "run.yaml:13: output_dir: got models/code,"
        " which is also the folder of the teacher `code`; choose another",
    ),
    "28 output is a tokenizer": (
        minimal(student="{model: m, tokenizer: words}", output_dir="words"),
        "run.yaml:13: output_dir: got words,"
        " which is also the folder of the student's tokenizer; choose another",
    ),
    "28 output would overwrite the student": (
        minimal(student="{model: runs/a/student}", output_dir="runs/a"),
        "run.yaml:13: output_dir: got runs/a,"
        " which would overwrite the folder of the student; choose another",
    ),
    "28 output among the texts": (
        minimal(data="{train: [{path: .}]}"),
        "run.yaml: output_dir: got runs/run, which lies in the data folder ., so that the run's own"
        " files would be read as text; choose another",
    ),
    "28 output is no path": (
        minimal(output_dir='"a\\0b"'),
        "run.yaml:13: output_dir: holds a NUL character; must be a path; remove it",
    ),
    "features of no teacher": (
        minimal(objective="{features: {teacher_weights: {cod: 1}}}"),
        "run.yaml:9: objective.features.teacher_weights: got `cod`; unknown teacher;"
        " did you mean `code`?",
    ),
    "77 secret by key": (
        minimal(student="{model: m, token: abc}"),
        "run.yaml:1: student.token: holds a secret; keep it in the environment"
        " (HF_TOKEN for the model hub); value not shown",
    ),
    "77 secret by value": (
        minimal(student="{model: m, revision: hf_abcdefghijklmnopqrstuvwxyz}"),
        "run.yaml:1: student.revision: holds a secret; keep it in the environment"
        " (HF_TOKEN for the model hub); value not shown",
    ),
    "name of a teacher": (
        minimal(teachers="{../x: {model: m}}"),
        "run.yaml:2: teachers.../x: a teacher's name must consist of letters, digits, `_` and `-`",
    ),
    "name of the run": (
        minimal(name="a/b"),
        "run.yaml:13: name: got `a/b`; string should match pattern '^[A-Za-z0-9_.-]+$'",
    ),
    "unknown control": (
        minimal(evaluate="{controls: [ce_onl]}"),
        "run.yaml:13: evaluate.controls.0: got `ce_onl`; must be one of: 'ce_only',"
        " 'ce_only_equal_compute', 'best_single', 'uniform' or 'entropy'",
    ),
    "missing model": (
        minimal(teachers="{code: {dtype: float32}}"),
        "run.yaml:2: teachers.code.model: missing; must be given",
    ),
    "missing sections": (
        minimal(student="", data=""),
        "run.yaml: student: missing; must be given\nrun.yaml: data: missing; must be given",
    ),
    "section of another type": (
        minimal(preflight="3"),
        "run.yaml:13: preflight: got 3; must be a mapping with keys of: max_tokens, batch_size, candidates",
    ),
    "unknown fusion": (
        minimal(fusion="automatic"),
        "run.yaml:13: fusion: got `automatic`; must be one of: 'auto'",
    ),
    "temperature of no teacher": (
        minimal(fusion="{weighting: uniform, temperatures: {cod: 1.2}}"),
        "run.yaml:13: fusion.temperatures: got `cod`; unknown teacher; did you mean `code`?",
    ),
    "best single of no teacher": (
        minimal(fusion="{weighting: {name: best_single, teacher: law}}"),
        "run.yaml:13: fusion.weighting.teacher: got `law`; unknown teacher; known: code, prose",
    ),
    "all at once": (
        minimal(objective="{temprature: 2, kd_ratio: 2}", train="{max_steps: x}", sed="1"),
        "run.yaml:9: objective.temprature: unknown key; did you mean `temperature`?\n"
        "run.yaml:9: objective.kd_ratio: got 2; must be at most 1\n"
        "run.yaml:10: train.max_steps: got `x`; must be a whole number\n"
        "run.yaml:11: sed: unknown key; did you mean `seed`?",
    ),
    "all at once, unreadable values too": (
        minimal(objective="{temprature: 2}", train="{max_steps: 010, learning_rate: .nan}"),
        "run.yaml:9: objective.temprature: unknown key; did you mean `temperature`?\n"
        "run.yaml:10: train.max_steps: got 010; a leading zero is ambiguous; write 10,"
        " or quote it if it is text\n"
        "run.yaml:10: train.learning_rate: got .nan; must be a finite number",
    ),
    "a key that is no text": (
        "? [a]\n: 1\n",
        "run.yaml: student: missing; must be given\nrun.yaml: data: missing; must be given\n"
        "run.yaml:1: a key must be plain text",
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_recipe(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, expected = CASES[case]
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    result = CliRunner().invoke(app, ["run", "run.yaml"])
    shown = result.stderr.splitlines()
    if case.startswith("03"):
        shown = shown[:1]  # the rest shows the place in the file, with a caret
    assert "\n".join(shown) == f"error: {expected}"
    assert result.exit_code == 2
    assert result.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("case", ["05 unknown key", "09 alias bomb", "25 no teacher"])
def test_in_a_process_of_its_own(case: str, tmp_path: Path) -> None:
    text, expected = CASES[case]
    (tmp_path / "run.yaml").write_text(text)
    command = [sys.executable, "-m", "collegium.cli", "run", "run.yaml"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stderr == f"error: {expected}\n"
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
