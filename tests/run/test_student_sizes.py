"""The table of students that can be cut out of the teachers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

import tiny
from collegium.cli import app
from collegium.config.recipe import load_recipe
from collegium.errors import ModelError
from collegium.run.context import RunContext
from collegium.run.student_sizes import candidates, student_sizes
from refusals import refused
from tiny_run import recipe_text, write_zoo


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with four layers and a gpt2 with two."""
    root = write_zoo(tmp_path_factory.mktemp("zoo"))
    tiny.save_tiny(root / "scripture", seed=1, num_hidden_layers=4)
    tiny.save_tiny(root / "code", model_type="gpt2")
    file = root / "recipe.yaml"
    file.write_text(recipe_text(root), encoding="utf-8")
    return file


def test_every_size_is_that_of_the_student(recipe: Path) -> None:
    context = RunContext(load_recipe(recipe))
    table = student_sizes(context, None)
    sizes = [line.row for line in table.lines]
    assert {(size.teacher, size.layers) for size in sizes} == {
        *(("scripture", layers) for layers in (1, 2, 3, 4)),
        *(("code", layers) for layers in (1, 2)),
    }
    assert {size.hidden_size for size in sizes if size.teacher == "code"} == {32}
    for size in sizes:
        assert size.tokens_per_second > 0
        width = {"teacher": size.teacher, "ffn": size.ffn, "heads": size.heads}
        parts = {"from_layers": {"teacher": size.teacher, "keep": size.layers}}
        if size.hidden_size < 32:
            parts["from_width"] = {**width, "hidden_size": size.hidden_size}
        text = f"student={parts}".replace("'", "")
        student = RunContext(load_recipe(recipe, [text])).student
        student.check("student")
        assert student.facts("student").num_parameters == size.num_parameters


def test_real_sizes_are_aligned_and_keep_whole_groups() -> None:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    widths = {
        (part.hidden_size, part.ffn, part.heads)
        for options in candidates("big", config)
        if (part := options.from_width) is not None
    }
    assert widths == {(432, 1152, 6), (288, 768, 3)}
    depths = [options.from_layers.keep for options in candidates("big", config)]
    assert [*dict.fromkeys(depths)] == [30, 22, 15, 10, 8]


def test_a_budget_limits_the_table(recipe: Path) -> None:
    result = CliRunner().invoke(app, ["student", "sizes", str(recipe), "--max-parameters", "20000"])
    assert result.exit_code == 0
    lines = [line.split() for line in result.output.splitlines() if "scripture" in line]
    assert lines
    assert all(float(line[6]) <= 20 for line in lines)
    assert all(line[7] == "k" for line in lines)
    with refused(ModelError, "teachers: "):
        student_sizes(RunContext(load_recipe(recipe)), 10)
