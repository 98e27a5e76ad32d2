"""The reference of recipe keys is that of the option classes."""

from __future__ import annotations

import dataclasses

import pytest
from typer.testing import CliRunner

from collegium.cli import app
from collegium.config.reference import Section, reference
from collegium.errors import RecipeError
from collegium.fusion.fitted import WEIGHTINGS
from collegium.losses.divergences import DIVERGENCES
from collegium.train.options import TrainOptions
from refusals import refused


def sections() -> list[Section]:
    return reference()


def test_every_key_has_a_type_and_a_meaning() -> None:
    for section in sections():
        assert section.meaning, section.path
        for key in section.keys:
            assert key.type, (section.path, key.name)
            assert key.meaning, (section.path, key.name)
            # No Python spelling of a type is left.
            assert not {*"[]~|"} & {*key.type}, key.type


def test_every_section_and_kind_is_listed() -> None:
    found = {(section.path, section.kind) for section in sections()}
    assert {(name, "") for name in ("data", "objective", "train", "cache", "evaluate")} <= found
    assert {("fusion.weighting", name) for name in WEIGHTINGS} <= found
    assert {("objective.divergence", name) for name in DIVERGENCES} <= found
    assert ("teachers.NAME", "local") in found
    assert ("student", "model") in found
    (train,) = reference("train")
    assert [key.name for key in train.keys] == [f.name for f in dataclasses.fields(TrainOptions)]


def test_defaults_are_those_of_the_classes() -> None:
    (train,) = reference("train")
    defaults = {key.name: key.default for key in train.keys}
    options = TrainOptions()
    assert float(defaults["learning_rate"]) == options.learning_rate
    assert defaults["bf16"] == str(options.bf16).lower()
    (key,) = reference("seed")[0].keys
    assert (key.type, key.default) == ("integer >= 0 and < 4,294,967,296", "0")
    required = [key.name for key in reference("student.from_layers")[0].keys if not key.default]
    assert required == ["teacher", "keep"]


def test_unknown_key_suggests_a_near_one() -> None:
    with refused(RecipeError, "options: "):
        reference("train.learning_rat")


@pytest.mark.parametrize("arguments", [[], ["--markdown"], ["train"], ["fusion.weighting"]])
def test_command_prints_them(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["options", *arguments])
    assert result.exit_code == 0, result.output
    assert "prefix_likelihood" in result.output or "learning_rate" in result.output
