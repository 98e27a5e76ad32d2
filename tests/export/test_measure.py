"""Measurements of models as they would be served: medians in turn, notes, teachers of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny
from collegium.config.recipe import Recipe, load_recipe
from collegium.errors import CollegiumError, ExportError
from collegium.export import foreign, measure
from collegium.export.measure import Served, Workload, bytes_of, measure_models
from collegium.run.speeds import measure_run
from collegium.storage.records import Measurements, open_record
from collegium.train.checkpoint import replace
from refusals import refused
from tiny_run import recipe_text, write_zoo

WORKLOAD = Workload(vocab_size=9, prompt_tokens=3, new_tokens=4, threads=1)


def answer(value: float) -> dict[str, Any]:
    return dict.fromkeys(("peak_bytes", "first_token_s"), value) | {
        "speeds": {"1": [value, 2 * value], "8": [value, value]}
    }


def test_models_take_turns_and_medians_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([5.0, 90.0, 1.0, 70.0, 2.0, 80.0])
    seen = []

    def run(request: dict[str, Any], *, where: str, threads: int) -> dict[str, Any]:
        assert (request["task"], request["vocab_size"], threads) == ("measure", 9, 1)
        seen.append(where)
        if where == "broken":
            raise ExportError("broken: fails")
        return answer(next(values))

    monkeypatch.setattr(measure, "run_foreign", run)
    source = {"loader": "transformers", "folder": str(tmp_path)}
    models = [
        Served("a", "student", source, 1.5),
        Served("broken", "export", source),
        Served("b", "teacher", source),
    ]
    steps = []
    records = measure_models(models, WORKLOAD, rounds=3, advance=lambda *one: steps.append(one))
    # One that fails is not tried again.
    assert seen == ["a", "broken", "b", "a", "b", "a", "b"]
    assert steps[-1] == (9, 9)
    a, broken, b = records
    assert (a.speeds["1"].prefill_tokens_per_s, a.speeds["1"].decode_tokens_per_s) == (2.0, 4.0)
    assert (b.first_token_s, b.peak_bytes, a.bits_per_byte) == (80.0, 80, 1.5)
    assert (broken.note, broken.speeds) == ("broken: fails", {})


def test_bytes_are_those_of_the_weights(tmp_path: Path) -> None:
    for name, size in (("a.safetensors", 3), ("b.safetensors", 4), ("model.onnx", 5)):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "model.onnx.data").write_bytes(b"x" * 6)
    source = {"loader": "transformers", "folder": str(tmp_path)}
    assert bytes_of(source) == 7
    assert bytes_of({**source, "file": "model.onnx"}) == 11


def test_a_process_times_its_model(tmp_path: Path) -> None:
    request = {
        "model": {"loader": "transformers", "folder": str(tiny.save_tiny(tmp_path))},
        "vocab_size": 400,
        "prompt_tokens": 6,
        "new_tokens": 3,
        "batch_sizes": [1, 2],
        "threads": 1,
    }
    measured = foreign.measure(request)
    assert measured["peak_bytes"] >= 0
    assert measured["speeds"].keys() == {"1", "2"}
    # Prefill at batch size 1 is the time to the first token.
    assert measured["speeds"]["1"][0] == pytest.approx(6 / measured["first_token_s"])


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(measure, "run_foreign", lambda *_, **__: answer(3.0))
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_text(write_zoo(tmp_path)))
    replace(tiny.save_tiny(tmp_path / "run" / "new"), tmp_path / "run" / "student")
    rows = [
        {"name": "student (distilled)", "kind": "student", "bits_per_byte": 2.5},
        {"name": "code", "kind": "teacher", "bits_per_byte": 2.0},
    ]
    (tmp_path / "run" / "results.json").write_text(json.dumps(rows))
    return load_recipe(file)


def test_a_teacher_that_is_gone_is_listed_with_the_reason(recipe: Recipe, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "scripture")
    measured = measure_run(recipe, threads=1)
    assert open_record(recipe.output_dir / "measure.json", Measurements) == measured
    rows = [(one.name, one.kind, one.note, one.bits_per_byte) for one in measured.models]
    assert rows == [
        ("student", "student", None, 2.5),
        ("code", "teacher", None, 2.0),
        ("scripture", "teacher", "its folder is gone", None),
    ]


def test_what_cannot_be_measured_is_refused(recipe: Recipe) -> None:
    with refused(ExportError, "measure"):
        measure_run(recipe, prompt_tokens=100, new_tokens=29)
    shutil.rmtree(recipe.output_dir / "student")
    with refused(CollegiumError):
        measure_run(recipe)
