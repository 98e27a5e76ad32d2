"""The recipe of SmolLM2 end to end, on a tiny model in the place of the real one."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

import tiny
from collegium.config.recipe import load_recipe
from collegium.demo import smollm2
from collegium.demo.run import HERE
from collegium.errors import CollegiumError
from collegium.models.cut_student import CutStudent
from collegium.models.loading import empty_model, model_facts
from collegium.models.used_vocabulary import cut_config
from collegium.run import pipeline
from collegium.run.checks import check_run
from collegium.run.context import RunContext
from collegium.study.options import load_study
from refusals import refused

FEW = ("train.max_steps=2", "train.warmup_steps=1")
RECIPES = Path(__file__).parents[2] / "recipes"


def _make_base(folder: Path) -> None:
    """A stand-in with heads and tied embeddings like those of the real one."""
    tiny.save_tiny(
        folder,
        num_hidden_layers=4,
        intermediate_size=48,
        num_attention_heads=3,
        num_key_value_heads=3,
        width=24,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/smollm2` with text, the base and the specialists, trained for two steps."""
    pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("work") / "runs" / "smollm2"
    (root / "text").mkdir(parents=True)
    for domain, text in zip(smollm2.DOMAINS, tiny.TEXT, strict=False):
        lines = [json.dumps({"text": f"{text} number {i}. " * 8}) for i in range(80)]
        (root / "text" / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
    smollm2.prepare_smollm2(root, make_base=_make_base, overrides=FEW)
    return root


def test_specialists_are_trained_once_and_their_adapters_merged(root: Path) -> None:
    base = AutoConfig.from_pretrained(root / "base")
    for domain in smollm2.DOMAINS:
        student = root / "teachers" / domain / "student"
        assert AutoConfig.from_pretrained(student).hidden_size == base.hidden_size
        assert not (student / "adapter_config.json").exists()
    folders = [root / "base", *(root / "teachers" / name / "student" for name in smollm2.DOMAINS)]
    files = {file: file.stat().st_mtime_ns for one in folders for file in one.glob("*.safetensors")}
    assert len({file.read_bytes() for file in files}) == len(files) == 1 + len(smollm2.DOMAINS)

    def fail(_folder: Path) -> None:
        raise AssertionError("the base is converted already")

    smollm2.prepare_smollm2(root, make_base=fail, overrides=FEW)
    assert files == {file: file.stat().st_mtime_ns for file in files}


@pytest.fixture
def recipe_file(root: Path, tmp_path: Path) -> Path:
    text = (HERE / "smollm2.yaml").read_text()
    file = tmp_path / "smollm2.yaml"
    text = text.replace("num_layers: 18", "num_layers: 3").replace("ffn: 1024", "ffn: 32")
    file.write_text(text.replace("runs/smollm2", root.as_posix()))
    return file


def test_the_recipe_passes_check(recipe_file: Path) -> None:
    context = RunContext(load_recipe(recipe_file))
    lines = "\n".join(check_run(context).lines)
    assert "student.vocabulary: " in lines
    assert context.student_facts.num_parameters < context.whole_student.facts("x").num_parameters


@pytest.mark.slow
def test_the_recipe_runs(recipe_file: Path) -> None:
    few = (*FEW, "data.max_train_tokens=3000", "preflight.max_tokens=300")
    folder = pipeline.run(load_recipe(recipe_file, few))
    rows: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    kinds = [row["kind"] for row in rows]
    assert (kinds.count("teacher"), kinds.count("control"), kinds.count("student")) == (4, 4, 1)


def test_the_study_decodes_with_every_level() -> None:
    study = load_study(RECIPES / "study" / "smollm2.yaml")
    settings = [changes for _, changes in study.settings()]
    base = RECIPES / "study" / study.base
    for changes in settings:
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        assert load_recipe(base, overrides).student.vocabulary == "used"


def test_the_student_of_the_real_base_has_at_most_60_million_parameters() -> None:
    """With the architecture of SmolLM2-135M, and more tokens than the text of the recipe uses."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    recipe = load_recipe(HERE / "smollm2.yaml")
    assert isinstance(recipe.student, CutStudent)
    bound: Any = recipe.student.bind(recipe.teachers, lambda: ())
    kept_U = np.arange(18_000)
    smaller = cut_config(bound._cut(config, None).config(config), kept_U)
    assert model_facts(empty_model(smaller, "student")).num_parameters <= 60_000_000


def test_a_missing_gguf_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without_gguf(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with refused(CollegiumError, "smollm2: "):
        smollm2.convert_base(tmp_path / "base")
