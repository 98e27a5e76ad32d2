"""All problems of all sections in one call of `check`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from collegium.config.recipe import load_recipe
from collegium.errors import CollegiumError, DataError, ModelError
from collegium.run.checks import check_run
from collegium.run.context import RunContext
from collegium.run.problems import Problems
from tiny_run import recipe_text, write_zoo


def test_problems_of_all_sections_are_reported_at_once(tmp_path: Path) -> None:
    root = write_zoo(tmp_path, teachers=4)
    weights = root / "code" / "model.safetensors"
    state = load_file(weights)
    state["model.norm.weight"][0] = torch.nan
    save_file(state, weights, metadata={"format": "pt"})
    (root / "scripture" / "config.json").write_text("{")
    (root / "recipe.yaml").write_text(recipe_text(root, teachers=4))
    overrides = [
        f"student.tokenizer={root}/more2",
        "student.config.max_position_embeddings=16",
        f"data.train.1.path={root}/absent.jsonl",
        "train.bf16=true",
        "objective.backend=triton",
        f"output_dir={root}/code.jsonl",
    ]
    recipe = load_recipe(root / "recipe.yaml", overrides)
    with pytest.raises(CollegiumError) as caught:
        check_run(RunContext(recipe))
    lines = str(caught.value).splitlines()
    expected = [
        "output_dir",
        "data.train",
        "teachers.scripture",
        "data.max_length",
        "teachers.code: model.norm.weight",
    ]
    for path in expected:
        assert any(path in line for line in lines), (path, lines)
    assert len(lines) == len(set(lines))


def fail(error: CollegiumError) -> None:
    raise error


def test_the_kind_of_collected_problems() -> None:
    problems = Problems()
    problems.raise_all()
    assert problems.collect(lambda: None)
    assert not problems.collect(fail, ModelError("a"))
    with pytest.raises(ModelError, match=r"^a$"):
        problems.raise_all()
    problems.collect(fail, ModelError("b"))
    problems.collect(fail, ModelError("a"))
    with pytest.raises(ModelError, match=r"^a\nb$"):
        problems.raise_all()
    problems.collect(fail, DataError("c"))
    with pytest.raises(CollegiumError, match=r"^a\nb\nc$") as caught:
        problems.raise_all()
    assert type(caught.value) is CollegiumError
