"""Recipes: reading, overriding, writing back, and YAML scalars."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.config.recipe import (
    Recipe,
    check_recipe,
    decode_fusion,
    dump_recipe,
    load_recipe,
    plain,
    recipe_hash,
    write_fusion,
)
from collegium.config.yaml import read_yaml
from collegium.data.sources import DataOptions, SourceOptions
from collegium.errors import RecipeError
from collegium.fusion.conflict import CONFLICTS, TruthFallback
from collegium.fusion.fitted import WEIGHTINGS, DomainWeights, Fixed
from collegium.fusion.fuse import Fusion
from collegium.fusion.gate import Gate
from collegium.fusion.options import to_recipe
from collegium.fusion.rules import Entropy, PrefixLikelihood
from collegium.losses.divergences import DIVERGENCES, ForwardKL, SkewedForwardKL
from collegium.models.student import PretrainedStudent
from collegium.teachers.options import LocalOptions
from collegium.train.options import ObjectiveOptions
from recipes_for_tests import MINIMAL, minimal
from refusals import refused

ROOT = Path(__file__).parents[1] / "recipes"
RECIPES = sorted([*ROOT.glob("*.yaml"), *ROOT.glob("baselines/*.yaml")])


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "my-run.yaml"
    path.write_text(MINIMAL)
    return path


def changed(path: Path, **sections: str) -> Recipe:
    path.write_text(minimal(**sections))
    return load_recipe(path)


def test_missing_keys_have_defaults(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.name == "my-run"
    assert recipe.output_dir == Path("runs/my-run")
    assert recipe.fusion == "auto"
    assert recipe.evaluate.controls == ["ce_only"]
    assert list(recipe.teachers) == ["code", "prose"]
    assert recipe.teachers["code"] == LocalOptions(model="models/code")
    assert list(recipe.data.train) == [SourceOptions(path="corpus/*.jsonl", domain="web")]
    assert recipe.train.max_steps == 10
    assert recipe.objective == ObjectiveOptions()


def test_option_classes_are_looked_up_by_name(recipe_file: Path) -> None:
    short = changed(recipe_file, objective="{divergence: forward_kl}")
    assert short.objective.divergence == ForwardKL()
    long = changed(recipe_file, objective="{divergence: {name: skewed_forward_kl, skew: 0.2}}")
    assert long.objective.divergence == SkewedForwardKL(skew=0.2)
    fused = changed(
        recipe_file,
        fusion="{weighting: {name: prefix_likelihood, eta: 0.5}, temperatures: {code: 1.2}}",
    )
    expected = Fusion(weighting=PrefixLikelihood(eta=0.5), temperatures={"code": 1.2})
    assert fused.fusion == expected


def test_numbers_follow_yaml_1_2(recipe_file: Path) -> None:
    recipe = changed(recipe_file, train="{learning_rate: 1e-4, max_steps: 0x10}")
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.max_steps == 16


def test_plain_training_needs_no_teacher(recipe_file: Path) -> None:
    recipe = changed(recipe_file, teachers="{}", objective="{kd_ratio: 0}")
    assert recipe.teachers == {}


def test_an_empty_section_gets_its_defaults(recipe_file: Path) -> None:
    recipe_file.write_text(MINIMAL + "evaluate:\npreflight:\n")
    assert load_recipe(recipe_file) == load_recipe(recipe_file, ["evaluate={}"])


def test_overrides(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "train.max_steps=20",
            "teachers.code.dtype=float32",
            "data.train.0.domain=books",
            "evaluate.controls=[uniform, entropy]",
            "objective.divergence={name: jensen_shannon}",
            "preflight.max_tokens=7",
            "name=other",
            "teachers.new.model=models/new",
        ],
    )
    assert recipe.train.max_steps == 20
    assert recipe.teachers["code"].dtype == "float32"
    assert recipe.data.train[0].domain == "books"
    assert recipe.evaluate.controls == ["uniform", "entropy"]
    assert type(recipe.objective.divergence) is DIVERGENCES["jensen_shannon"]
    assert recipe.preflight.max_tokens == 7
    assert recipe.output_dir == Path("runs/other")
    assert list(recipe.teachers) == ["code", "prose", "new"]


def test_an_override_fixes_an_invalid_value(recipe_file: Path) -> None:
    recipe_file.write_text(minimal(train="{max_steps: 010, learning_rate: 7}"))
    with refused(RecipeError, "my-run.yaml:"):
        load_recipe(recipe_file)
    recipe = load_recipe(recipe_file, ["train.max_steps=10", "train.learning_rate=1e-3"])
    assert (recipe.train.max_steps, recipe.train.learning_rate) == (10, 1e-3)


VARIETY: dict[str, dict[str, str]] = {
    "minimal": {},
    "texts that look like numbers": {"student": "{model: '1e-4', revision: '010'}"},
    "texts that look like nothing": {"student": "{model: 'null', revision: 'no: # x'}"},
    "unicode": {"student": '{model: "d\\u00e9j\\u00e0/\\u6570 \\t\\n"}'},
    "small numbers": {"train": "{learning_rate: 1e-05, weight_decay: 0, warmup_steps: 0.1}"},
    "no teachers": {"teachers": "{}", "objective": "{kd_ratio: 0}"},
    "features": {"objective": "{kd_ratio: 1, temperature: 2, block_size: 64}"},
    "fixed": {
        "fusion": "{weighting: {name: fixed, weights: {code: 0.25, prose: 0.75}}, pool: log_linear}"
    },
    "config": {"student": "{config: {model_type: llama, rope: {a: [1, 2.5, null]}}, tokenizer: t}"},
    "layers of a teacher": {"student": "{from_layers: {teacher: code, keep: [0, 3]}}"},
    "part of a teacher": {
        "student": "{from_layers: {teacher: code, keep: by_importance, num_layers: 3}, "
        "from_width: {teacher: code, heads: 4}, dtype: bfloat16}"
    },
    **{f"divergence {name}": {"objective": f"{{divergence: {name}}}"} for name in DIVERGENCES},
    **{
        f"weighting {name}": {"fusion": f"{{weighting: {name}}}"}
        for name in WEIGHTINGS
        if name
        not in ("fixed", "best_single", "domain_weights", "route", "gate", "calibrated_entropy")
    },
    "route": {
        "fusion": "{weighting: {name: route, default: code, domains: {law: code, '1e3': prose}}}"
    },
    "domain weights": {
        "fusion": "{weighting: {name: domain_weights, weights: {law: {code: 0, prose: 1}, "
        "'1e3': {code: 0.5, prose: 0.5}}, default: {code: 0.5, prose: 0.5}}}"
    },
    "gate": {
        "fusion": "{weighting: {name: gate, offsets: {code: 0, prose: -0.25}, consensus: -1.5, "
        "decay: 0.95}}"
    },
    "entropy maps": {
        "fusion": "{weighting: {name: calibrated_entropy, "
        "maps: {code: [[0, 1], [2.5, 3]], prose: [[1, 1]]}}}"
    },
    "average cross-entropy": {"fusion": "{weighting: {name: avg_ce, tau: 0.1}}"},
    "power mean": {"fusion": "{pool: power_mean, exponent: 0.25}"},
    **{f"conflict {name}": {"fusion": f"{{conflict: {name}}}"} for name in CONFLICTS},
    "conflict with options": {
        "fusion": "{conflict: {name: consistent_subset, threshold: 0.5, share: 0.01}}"
    },
}


@pytest.mark.parametrize("case", VARIETY, ids=str)
def test_a_written_recipe_reads_back_equal(case: str, recipe_file: Path) -> None:
    recipe = changed(recipe_file, **VARIETY[case])
    text = dump_recipe(recipe)
    recipe_file.write_text(text)
    again = load_recipe(recipe_file)
    assert again == recipe
    assert dump_recipe(again) == text
    assert recipe_hash(again) == recipe_hash(recipe)


@given(
    column=st.text(min_size=1),
    domain=st.text(min_size=1),
    rate=st.floats(min_value=1e-300, max_value=1, exclude_min=True),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_text_and_number_round_trips(
    tmp_path_factory: pytest.TempPathFactory, column: str, domain: str, rate: float, seed: int
) -> None:
    # Not in a path, which is checked against the file system.
    source = SourceOptions(path="corpus.txt", domain=domain, text_column=column)
    recipe = Recipe(
        student=PretrainedStudent(model="s"),
        data=DataOptions(train=[source]),  # type: ignore[arg-type]
        seed=seed,
        fusion=Fusion(weighting=Entropy(tau=rate)),
        teachers={"a": LocalOptions(model="t")},
    )
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(path) == recipe


def test_the_hash_covers_the_keys_that_affect_the_result(recipe_file: Path) -> None:
    base = recipe_hash(load_recipe(recipe_file))
    assert recipe_hash(load_recipe(recipe_file, ["output_dir=elsewhere", "name=x"])) == base
    assert recipe_hash(load_recipe(recipe_file, ["seed=1"])) != base
    assert recipe_hash(load_recipe(recipe_file, ["train.learning_rate=1e-5"])) != base
    assert len(base) == 64


def test_write_fusion_keeps_comments(recipe_file: Path) -> None:
    comment = "# why\n"
    recipe_file.write_text(comment + MINIMAL + "fusion: auto  # measured\nseed: 3  # lucky\n")
    fusion = Fusion(weighting=Entropy(tau=0.5), temperatures={"code": 1.25})
    write_fusion(recipe_file, plain(fusion))
    text = recipe_file.read_text()
    assert text.startswith(comment)
    assert "seed: 3  # lucky" in text
    recipe = load_recipe(recipe_file)
    assert recipe.fusion == fusion
    assert recipe.seed == 3
    assert [path.name for path in recipe_file.parent.iterdir()] == [recipe_file.name]


def test_write_fusion_needs_a_mapping(recipe_file: Path) -> None:
    recipe_file.write_text("- 1\n")
    with refused(RecipeError, "my-run.yaml: "):
        write_fusion(recipe_file, {"weighting": "uniform"})
    assert recipe_file.read_text() == "- 1\n"


def test_a_fusion_snippet_decodes_without_a_recipe() -> None:
    fusion = Fusion(weighting=Fixed(weights={"a": 0.5, "b": 0.5}), pooled_temperature=1.5)
    assert decode_fusion(plain(fusion)) == fusion
    with refused(RecipeError, "preflight.json: pol: "):
        decode_fusion({"weighting": "uniform", "pol": "linear"}, where="preflight.json")


def test_a_snippet_contains_the_whole_fusion() -> None:
    same = {"a": 0.5, "b": 0.5}
    fusions = [
        Fusion(pool="power_mean", exponent=0.25, conflict=TruthFallback(power=2.0)),
        Fusion(weighting=DomainWeights(weights={"law": {"a": 1.0, "b": 0.0}}, default=same)),
        Fusion(weighting=Gate(offsets={"a": 0.5, "b": -0.5}, consensus=-1.0, decay=0.5)),
        *[Fusion(conflict=option()) for option in CONFLICTS.values()],
    ]
    for fusion in fusions:
        assert decode_fusion(to_recipe(fusion)) == fusion


def test_a_recipe_built_in_python_is_checked_across_sections() -> None:
    recipe = Recipe(
        student=PretrainedStudent(model="s"),
        data=DataOptions(train=[SourceOptions(path="x")]),  # type: ignore[arg-type]
        output_dir=Path("s"),
    )
    with refused(RecipeError, "recipe: teachers: "):
        check_recipe(recipe)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_decodes(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / path.name
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(copy) == recipe


def test_there_are_recipes() -> None:
    assert {path.name for path in RECIPES} >= {"demo.yaml", "tinybert.yaml"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1e4", 1e4),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.5", -0.5),
        ("0", 0),
        ("+7", 7),
        ("0o17", 15),
        ("0xff", 255),
        ("~", None),
        ("", None),
        ("True", True),
        ("yes", "yes"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("e5", "e5"),
        ("nan", "nan"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    read = read_yaml(f"a: {text}\n", "x.yaml").data["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text", ["010", "-010", "00", "007.5", "01e3", ".inf", "-.INF", ".NaN", "1e999"]
)
def test_refused_scalars(text: str) -> None:
    with refused(RecipeError, f"x.yaml:1: a: got {text}"):
        read_yaml(f"a: {text}\n", "x.yaml").check()


def test_line_numbers_are_recorded() -> None:
    document = read_yaml("a:\n  - b: 1\n  -\n    c: 2\n", "x.yaml")
    assert document.data == {"a": [{"b": 1}, {"c": 2}]}
    document.add(("a", 1, "c", "deeper"), "wrong")
    document.add(("z",), "missing")
    with refused(RecipeError, "x.yaml: z: missing"):
        document.check()


def test_aliases_and_a_byte_order_mark_are_fine(recipe_file: Path) -> None:
    recipe_file.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode().replace(b"\n", b"\r\n"))
    assert load_recipe(recipe_file).train.max_steps == 10
    assert read_yaml("a: &x {b: 1}\nc: *x\n", "x").data == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_recipe_is_refused_before_heavy_imports(recipe_file: Path) -> None:
    recipe_file.write_text(minimal(objective="{kd_ratio: 2}", fusion="{weighting: gate}"))
    program = (
        "import sys\n"
        "from collegium.config.recipe import load_recipe\n"
        "from collegium.errors import RecipeError\n"
        "try:\n"
        f"    load_recipe({str(recipe_file)!r})\n"
        "except RecipeError:\n"
        "    heavy = {'torch', 'transformers', 'pyarrow', 'datasets', 'matplotlib'}\n"
        "    print(sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout == "[]\n"
