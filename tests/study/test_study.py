"""A study is a grid of ordinary runs: done once, kept, summed up in one table and one page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from collegium.cli import app
from collegium.errors import RecipeError
from collegium.recipe import load_recipe
from collegium.study import sweep
from collegium.study.measurements import spearman
from collegium.study.options import load_study
from collegium.study.run import run_study
from collegium.study.zoo import PermutedLabels
from collegium.types import IGNORE, domain_number
from tiny_run import recipe_text, write_zoo

ROOT = Path(__file__).parents[2]
STUDIES = sorted(
    path for path in (ROOT / "recipes" / "study").glob("*.yaml") if "\nfactors:" in path.read_text()
)
STUDY = """\
name: tiny
question: Who is right?
output_dir: {root}/study
base: base.yaml
seeds: [0, 1]
factors:
  weighting:
    uniform: {{fusion: {{weighting: {{name: uniform}}}}}}
    EM: {{pick: {{weighting: fixed}}}}
  share:
    "0.5": {{}}
    "0.9": {{objective.kd_ratio: 0.9}}
measures: [fused_nll, student_nll, student_nll@code, bytes_per_token]
figures:
  - {{kind: scatter, x: fused_nll, y: student_nll}}
  - {{kind: lines, x: share, y: student_perplexity, by: weighting}}
  - {{kind: dots, y: student_ece}}
"""


@pytest.fixture
def tiny_study(tmp_path: Path) -> Path:
    write_zoo(tmp_path)
    base = recipe_text(tmp_path).replace("controls: [ce_only]", "controls: []")
    (tmp_path / "base.yaml").write_text(base, encoding="utf-8")
    file = tmp_path / "tiny.yaml"
    file.write_text(STUDY.format(root=tmp_path), encoding="utf-8")
    return file


def test_every_setting_and_seed_is_one_run_and_is_done_once(
    tiny_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(app, ["study", str(tiny_study)])
    assert result.exit_code == 0, result.output
    folder = tiny_study.parent / "study"
    rows = json.loads((folder / "rows.json").read_text())
    assert len(rows) == 2 * 2 * 2
    assert {row["seed"] for row in rows} == {0, 1}
    assert all(row["values"]["student_nll@code"] > 0 for row in rows)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 3
    assert "Who is right?" in page
    assert "uniform · 0.9" in (folder / "table.md").read_text()
    # The settings that pick a fitted fusion share one preflight per seed.
    assert len(list((folder / "preflight").iterdir())) == 2
    recipe = load_recipe(folder / "recipes" / "em_0.9_seed1.yaml")
    assert recipe.seed == 1
    assert recipe.objective.kd_ratio == 0.9

    def nothing_left_to_do(recipe: object) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(sweep.pipeline, "evaluate", nothing_left_to_do)
    assert run_study(tiny_study).page == folder / "report.html"
    assert json.loads((folder / "rows.json").read_text()) == rows


def test_without_students_the_rows_are_the_fusions_of_each_preflight(tiny_study: Path) -> None:
    text = tiny_study.read_text()
    head = text[: text.index("measures")].replace("seeds: [0, 1]", "students: false")
    head = head.replace("    EM: {pick: {weighting: fixed}}\n", "")
    figure = "figures:\n  - {kind: dots, y: calibration_nll}\n"
    tiny_study.write_text(f"{head}measures: [calibration_nll, regret]\n{figure}", encoding="utf-8")
    run_study(tiny_study)
    rows = json.loads((tiny_study.parent / "study" / "rows.json").read_text())
    fusions = {row["levels"]["fusion"] for row in rows}
    assert {"uniform, linear", "prefix_likelihood(eta=0.3, decay=0.9), linear"} <= fusions
    assert not (tiny_study.parent / "study" / "runs" / "uniform_0.5_seed0" / "student").exists()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "student_nll,",
            "student_nil,",
            "got `student_nil`; must be a measure; did you mean `student_nll`?",
        ),
        ("x: share", "x: shore", "got `shore`; must be a factor; did you mean `share`?"),
        (
            "{weighting: fixed}",
            "{weighting: fxed}",
            "got `fxed`; must be a weighting; did you mean `fixed`?",
        ),
        ("{weighting: fixed}", "{weighting: fixed, tau: 1}", "pick: got `tau`; unknown key"),
        ('"0.9"', '"0 5"', None),
        ("    EM:", "    Uniform:", "has the same folder as `uniform`"),
        ("seeds: [0, 1]", "seeds: []", "seeds"),
        ("question:", "questoin:", "unknown key"),
    ],
)
def test_what_is_wrong_with_a_study_is_said_at_once(
    tiny_study: Path, old: str, new: str, problem: str | None
) -> None:
    text = tiny_study.read_text()
    assert old in text
    tiny_study.write_text(text.replace(old, new, 1), encoding="utf-8")
    if problem is None:
        load_study(tiny_study)
        return
    with pytest.raises(RecipeError) as caught:
        load_study(tiny_study)
    assert problem in str(caught.value)


def test_a_setting_that_makes_no_recipe_names_the_key(tiny_study: Path) -> None:
    text = tiny_study.read_text().replace("objective.kd_ratio", "objective.kd_raito")
    tiny_study.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match="kd_raito"):
        run_study(tiny_study)


def test_a_pick_that_preflight_does_not_try_says_what_it_tries(tiny_study: Path) -> None:
    text = tiny_study.read_text().replace("{weighting: fixed}", "{weighting: min_ce}")
    tiny_study.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"preflight has no fusion with .*min_ce"):
        run_study(tiny_study)


def test_there_are_studies() -> None:
    assert len(STUDIES) >= 5


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_setting_of_every_study_decodes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(path)
    uniform = {"weighting": {"name": "uniform"}}
    monkeypatch.setattr(sweep, "_picked", lambda job, values, folder: uniform)
    for job in sweep.jobs_of(study, tmp_path):
        recipe = sweep._recipe(job, path.parent / study.base, tmp_path)
        assert "{" not in str([teacher.model for teacher in recipe.teachers.values()])


def test_rank_correlation_is_that_of_the_definition() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) without ties
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman([1, 1, 2], [3, 3, 5]) == pytest.approx(1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [1, 2]) is None


def test_the_liar_permutes_the_labels_of_one_domain_alone() -> None:
    item = {
        "input_ids": torch.arange(6),
        "labels": torch.tensor([IGNORE, 1, 2, 3, 4, 5]),
        "domain_ids": torch.tensor([domain_number("a")] * 3 + [domain_number("b")] * 3),
    }
    dataset = PermutedLabels([item], "b", 50, seed=3)  # type: ignore[arg-type]
    found = dataset[0]
    assert found["labels"][:3].tolist() == [IGNORE, 1, 2]
    assert found["labels"][3:].tolist() == dataset.permutation_V[3:6].tolist()
    assert sorted(dataset.permutation_V.tolist()) == list(range(50))
    assert found["input_ids"] is item["input_ids"]
