"""The stage of exports and measurements: last in a run, done once, again for another student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from collegium.config.recipe import load_recipe
from collegium.errors import ExportError
from collegium.export import build, foreign, measure
from collegium.export.build import open_export
from collegium.report.run_files import read_run
from collegium.report.serving import pareto_plot
from collegium.run import pipeline
from collegium.run.folder import RunFolder
from collegium.storage.files import sha256_of
from collegium.storage.records import Measurements, open_record
from refusals import refused
from tiny_run import recipe_text, write_zoo


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Exports and measurements in this process. Returns those that were made."""
    made: list[str] = []

    def run_foreign(request: dict[str, Any], *, where: str, **_: Any) -> dict[str, Any]:
        made.append(f"{request['task']} {where}")
        if request["task"] == "compare":
            return foreign.compare({**request, "threads": 1})
        speeds = {"1": [1.0, 2.0], "8": [3.0, 4.0]}
        return {"peak_bytes": 1, "first_token_s": 1.0, "speeds": speeds}

    monkeypatch.setattr(build, "run_foreign", run_foreign)
    monkeypatch.setattr(measure, "run_foreign", run_foreign)
    return made


def test_a_run_ends_with_its_exports_and_their_measurement(
    tmp_path: Path, tools: list[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe_text(write_zoo(tmp_path)), encoding="utf-8")
    room = "student.config.max_position_embeddings=96"
    short = ("evaluate.controls=[]", "fusion={weighting: {name: uniform}}")
    exports = "export={to: [hf, gguf-f16], max_tokens: 300, measure: true}"

    def run(*overrides: str) -> list[str]:
        tools.clear()
        pipeline.run(load_recipe(tmp_path / "recipe.yaml", [*short, room, exports, *overrides]))
        return sorted(set(tools))

    folder = tmp_path / "run"
    models = ["code", "gguf-f16", "hf", "scripture", "student"]
    expected = ["compare export gguf-f16", "compare export hf", *(f"measure {m}" for m in models)]
    with refused(ExportError, "measure"):
        run("student.config.max_position_embeddings=95")
    assert not folder.exists()
    assert run() == expected
    stages = RunFolder(folder).stages()
    assert [*stages][-4:] == ["evaluate", "export hf", "export gguf-f16", "measure"]
    student = sha256_of(folder / "student" / "MANIFEST.json")
    measured = open_record(folder / "measure.json", Measurements)
    assert measured.student == student
    assert {one.name for one in measured.models if one.speeds} == {*models}
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "Exports against the student" in report
    assert "Served on this machine" in report
    assert pareto_plot(read_run(folder)) is not None
    assert run() == []
    # Another student, and everything made of it again.
    assert run("train.max_steps=6") == expected
    newer = sha256_of(folder / "student" / "MANIFEST.json")
    assert newer != student
    assert {open_export(folder / "exports" / name).student for name in ("hf", "gguf-f16")} == {
        newer
    }
    assert open_record(folder / "measure.json", Measurements).student == newer
    kept = open_record(folder / "previous" / "1" / "measure.json", Measurements)
    assert kept == measured
    (folder / "exports" / "hf" / "config.json").write_text("{}")
    assert run("train.max_steps=6") == ["compare export hf"]
