"""A study is a grid of ordinary runs, each done once, summarized in one table and one page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from collegium.cli import app
from collegium.config.recipe import load_recipe
from collegium.errors import RecipeError
from collegium.storage.files import write_json
from collegium.storage.records import StudyRow
from collegium.study import figures, sweep
from collegium.study.measurements import spearman, teacher_passes
from collegium.study.options import FigureOptions, load_study
from collegium.study.zoo import PermutedLabels
from collegium.types import IGNORE, domain_number
from refusals import refused
from tiny_run import recipe_text, write_zoo

ROOT = Path(__file__).parents[2]
STUDIES = sorted(
    path
    for folder in ("study", "paper")
    for path in (ROOT / "recipes" / folder).glob("*.yaml")
    if "\nfactors:" in path.read_text()
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
measures: [fused_nll, student_nll, student_nll@code, teacher_passes, objective]
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


def test_each_setting_and_seed_runs_once(tiny_study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["study", str(tiny_study)])
    assert result.exit_code == 0, result.output
    folder = tiny_study.parent / "study"
    rows = json.loads((folder / "rows.json").read_text())
    assert len(rows) == 2 * 2 * 2
    assert {row["seed"] for row in rows} == {0, 1}
    assert all(row["values"]["student_nll@code"] > 0 for row in rows)
    assert all(row["values"]["teacher_passes"] == 2 for row in rows)
    log = (folder / "runs" / "em_0.9_seed1" / "train" / "log.jsonl").read_text().splitlines()
    last = next(row for row in rows if row["folder"].endswith("em_0.9_seed1"))
    assert last["values"]["objective"] == json.loads(log[-1])["loss"]
    page = (folder / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 3
    assert "Who is right?" in page
    assert "uniform · 0.9" in (folder / "table.md").read_text()
    # Settings that pick a fitted fusion share one preflight per seed.
    assert len(list((folder / "preflight").iterdir())) == 2
    recipe = load_recipe(folder / "recipes" / "em_0.9_seed1.yaml")
    assert recipe.seed == 1
    assert recipe.objective.kd_ratio == 0.9

    def nothing_left_to_do(recipe: object) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(sweep.pipeline, "evaluate", nothing_left_to_do)
    assert sweep.run_study(tiny_study)[0] == folder / "report.html"
    assert json.loads((folder / "rows.json").read_text()) == rows
    # A measure that is newer than a finished run is read from its folder.
    record = folder / "runs" / "em_0.9_seed1" / "study.json"
    record.write_text(record.read_text().replace('"objective"', '"unknown"'), encoding="utf-8")
    sweep.run_study(tiny_study)
    assert json.loads((folder / "rows.json").read_text()) == rows


def test_tasks_are_measured_for_teachers_fused_target_and_student(tiny_study: Path) -> None:
    folder = tiny_study.parent
    ask = {"prompt": "To be", "references": ["or not"], "max_new_tokens": 3}
    ask |= {"metric": ["bleu", "token_f1"]}
    pick = {"prompt": "In the", "choices": [" word", " sum"], "metric": "accuracy"}
    picks = [pick | {"references": [word]} for word in (" word", " sum", " sum")]
    for name, some in (("q_a", [ask]), ("pick", picks)):
        lines = [json.dumps(row) + "\n" for row in some]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    tasks = f"{{q_a: {folder}/q_a.jsonl, pick: {folder}/pick.jsonl}}"
    base = (folder / "base.yaml").read_text()
    base = base.replace("controls: []", f"controls: [], tasks: {tasks}")
    (folder / "base.yaml").write_text(base, encoding="utf-8")
    text = tiny_study.read_text().replace("seeds: [0, 1]", "seeds: [0]")
    text = text.replace("    EM: {pick: {weighting: fixed}}\n", "")
    text = text.replace("bytes_per_token]", "task_q_a_token_f1, teacher_task_pick_accuracy]")
    tiny_study.write_text(text.replace('    "0.9": {objective.kd_ratio: 0.9}\n', ""))
    page, tables = sweep.run_study(tiny_study)
    (row,) = json.loads((page.parent / "rows.json").read_text())
    results = {
        name: json.loads((Path(row["folder"]) / "tasks" / f"{name}.json").read_text())["rows"]
        for name in ("q_a", "pick")
    }
    metrics = ("q_a", "bleu", 1), ("q_a", "token_f1", 100), ("pick", "accuracy", 100)
    for prefix, kind in (("", "student"), ("fused_", "fused"), ("teacher_", "teacher")):
        for name, metric, factor in metrics:
            scores = [one["scores"][metric] for one in results[name] if one["kind"] == kind]
            expected = factor * max(score["value"] for score in scores)
            assert row["values"][f"{prefix}task_{name}_{metric}"] == pytest.approx(expected)
        # One choice is right in a third of the prompts, the other in two.
        assert 33 < row["values"][f"{prefix}task_pick_accuracy"] < 67
    (table,) = (table for table in tables if table.title == "Tasks")
    assert [line.name.partition(": ")[2] for line in table.lines] == [
        "student", "fused target", "best teacher",
    ]  # fmt: skip
    assert [column.title for column in table.columns] == [
        "pick: accuracy, %", "q_a: BLEU", "q_a: token F1, %",
    ]  # fmt: skip


def test_settings_are_compared_with_the_baseline(tiny_study: Path) -> None:
    text = tiny_study.read_text().replace(
        "measures:", "baseline: {weighting: EM, share: '0.9'}\nmeasures:"
    )
    tiny_study.write_text(text, encoding="utf-8")
    page, tables = sweep.run_study(tiny_study)
    table = tables[-1]
    assert table.title == "NLL minus that of EM · 0.9"
    assert [line.name for line in table.lines] == ["uniform · 0.5", "uniform · 0.9", "EM · 0.5"]
    rows = json.loads((page.parent / "rows.json").read_text())
    nll = {
        (" · ".join(row["levels"].values()), row["seed"]): row["values"]["student_nll"]
        for row in rows
    }
    for line in table.lines:
        # As in results.json, of the same tokens.
        expected = {s: nll[line.name, s] - nll["EM · 0.9", s] for s in (0, 1)}
        assert line.row.differences == pytest.approx(expected, abs=1e-6)
    assert "NLL minus that of EM · 0.9" in (page.parent / "table.md").read_text()


def test_contrasts_are_differences_of_any_two_settings_by_domain(tiny_study: Path) -> None:
    """A factor without a level has that of the baseline."""
    asked = (
        "baseline: {weighting: EM, share: '0.9'}\n"
        "contrasts:\n"
        "  - {of: {weighting: uniform}, minus: {share: '0.5'}}\n"
        "  - {of: {weighting: uniform}, minus: {share: '0.5'}, domains: [code]}\n"
    )
    text = tiny_study.read_text().replace("measures:", f"{asked}measures:")
    tiny_study.write_text(text, encoding="utf-8")
    page, tables = sweep.run_study(tiny_study)
    names = ["uniform · 0.9 − EM · 0.5", "uniform · 0.9 − EM · 0.5, on code"]
    assert [line.name for line in tables[-1].lines] == names
    rows = json.loads((page.parent / "rows.json").read_text())
    for line, measure in zip(tables[-1].lines, ("student_nll", "student_nll@code"), strict=True):
        nll = {
            (" · ".join(row["levels"].values()), row["seed"]): row["values"][measure]
            for row in rows
        }
        expected = {s: nll["uniform · 0.9", s] - nll["EM · 0.5", s] for s in (0, 1)}
        assert line.row.differences == pytest.approx(expected, abs=1e-6)
    assert names[1] in (page.parent / "table.md").read_text()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ("objective: {kd_ratio: 0.5}", 2.0),
        ("objective: {kd_ratio: 0.0}", 0.0),
        (
            "objective: {terms: [{name: ce}, {name: divergence, schedule: "
            "{name: stages, stages: [{factor: 1, until: 0.25}, {factor: 0}]}}]}",
            2.0 * 0.25,
        ),
        # Each teacher reads the 600 or 400 tokens of the corpus once, for 2,000 trained tokens.
        ("objective: {kd_ratio: 0.5}\ncache: {enabled: true, kind: per_teacher}", 1000 / 2000),
        ("objective: {kd_ratio: 0.5}\ncache: {enabled: true, kind: fused}", 2 * 500 / 2000),
    ],
)
def test_teacher_passes_count_the_tokens_that_teachers_read(
    tmp_path: Path, changes: str, expected: float
) -> None:
    text = recipe_text(tmp_path).replace("objective: {kd_ratio: 0.5}", changes)
    path = tmp_path / "tiny.yaml"
    path.write_text(text, encoding="utf-8")
    cache = tmp_path / "run" / "cache"
    for folder, tokens in {
        "": 500,
        "teachers/scripture/train": 600,
        "teachers/code/train": 400,
    }.items():
        write_json(cache / folder / "manifest.json", {"num_targets": tokens})
    assert teacher_passes(load_recipe(path), 40, 2000) == pytest.approx(expected)


@pytest.mark.slow
def test_without_students_rows_are_preflight_fusions(tiny_study: Path) -> None:
    text = tiny_study.read_text()
    head = text[: text.index("measures")].replace("seeds: [0, 1]", "students: false")
    head = head.replace("    EM: {pick: {weighting: fixed}}\n", "")
    figure = "figures:\n  - {kind: dots, y: calibration_nll}\n"
    tiny_study.write_text(f"{head}measures: [calibration_nll, regret]\n{figure}", encoding="utf-8")
    sweep.run_study(tiny_study)
    rows = json.loads((tiny_study.parent / "study" / "rows.json").read_text())
    fusions = {row["levels"]["fusion"] for row in rows}
    assert {"uniform, linear", "prefix_likelihood(eta=0.3, decay=0.9), linear"} <= fusions
    assert not (tiny_study.parent / "study" / "runs" / "uniform_0.5_seed0" / "student").exists()


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("student_nll,", "student_nil,", "tiny.yaml:13: measures"),
        ("student_nll,", "task_qa_token_f2,", "tiny.yaml:13: measures"),
        ("x: share", "x: shore", "tiny.yaml:14: figures"),
        ("{weighting: fixed}", "{weighting: fxed}", "tiny.yaml:9: factors.weighting.EM.pick"),
        (
            "{weighting: fixed}",
            "{weighting: fixed, tau: 1}",
            "tiny.yaml:9: factors.weighting.EM.pick",
        ),
        (
            "{pick: {weighting: fixed}}",
            "{rank: {order: first, number: 1}}",
            "tiny.yaml:9: factors.weighting.EM.rank",
        ),
        ('"0.9"', '"0 5"', None),
        ("    EM:", "    Uniform:", "tiny.yaml:9: factors.weighting.Uniform"),
        ("seeds: [0, 1]", "seeds: []", "tiny.yaml:5: seeds"),
        ("question:", "questoin:", "tiny.yaml: question"),
        ("measures:", "baseline: {weighting: EM}\nmeasures:", "tiny.yaml:13: baseline"),
        (
            "measures:",
            "students: false\nbaseline: {weighting: EM}\nmeasures:",
            "tiny.yaml:14: baseline",
        ),
        (
            "measures:",
            "contrasts: [{of: {weighting: EM}, minus: {weighting: EM, share: '0.9'}}]\nmeasures:",
            "tiny.yaml:13: contrasts.0.of",
        ),
        (
            "measures:",
            "students: false\ncontrasts: [{of: {}, minus: {}}]\nmeasures:",
            "tiny.yaml:14: contrasts",
        ),
    ],
    ids=[
        "measure",
        "metric",
        "factor",
        "weighting",
        "pick",
        "rank",
        "valid",
        "folder",
        "seeds",
        "question",
        "baseline",
        "baseline without students",
        "contrast",
        "contrast without students",
    ],
)
def test_invalid_study_is_refused_before_any_run(
    tiny_study: Path, old: str, new: str, where: str | None
) -> None:
    text = tiny_study.read_text()
    assert old in text
    tiny_study.write_text(text.replace(old, new, 1), encoding="utf-8")
    if where is None:
        load_study(tiny_study)
        return
    with refused(RecipeError, where):
        load_study(tiny_study)


@pytest.mark.parametrize(
    "pick", ["{weighting: gate}", "{weighting: consensus}", "{weighting: fixed, pool: log_linear}"]
)
def test_a_pick_that_the_cache_cannot_have_is_refused_before_any_teacher_is_trained(
    tiny_study: Path, monkeypatch: pytest.MonkeyPatch, pick: str
) -> None:
    cached = f"{{pick: {pick}, cache: {{enabled: true, kind: per_teacher}}}}"
    text = tiny_study.read_text().replace("{pick: {weighting: fixed}}", cached)
    text = text.replace("base: base.yaml", "base: base.yaml\nzoo: [specialists]")
    tiny_study.write_text(text, encoding="utf-8")
    trained = list[str]()
    monkeypatch.setattr(sweep, "prepare_zoo", lambda *_: trained.append("zoo"))
    with refused(RecipeError, "EM, 0.5 (seed 0): fusion."):
        sweep.run_study(tiny_study)
    assert not trained


def test_setting_with_an_unknown_key_names_it(tiny_study: Path) -> None:
    text = tiny_study.read_text().replace("objective.kd_ratio", "objective.kd_raito")
    tiny_study.write_text(text, encoding="utf-8")
    with refused(RecipeError, "uniform_0.9_seed0.yaml:19: objective.kd_raito"):
        sweep.run_study(tiny_study)


@pytest.mark.slow
def test_rank_keeps_the_best_the_worst_or_random_teachers(tmp_path: Path) -> None:
    write_zoo(tmp_path, 4)
    base = recipe_text(tmp_path, 4).replace("controls: [ce_only]", "controls: []")
    (tmp_path / "base.yaml").write_text(base, encoding="utf-8")
    levels = "".join(
        f"    {order} {number}: {{rank: {{order: {order}, number: {number}}}}}\n"
        for order in ("best", "worst", 1, 2)
        for number in (1, 2, 4)
    )
    head = STUDY[: STUDY.index("factors:")].format(root=tmp_path).replace("[0, 1]", "[0]")
    file = tmp_path / "ranked.yaml"
    file.write_text(f"{head}factors:\n  teachers:\n{levels}", encoding="utf-8")
    study, kept = load_study(file), dict[str, set[str]]()
    for job in sweep.jobs_of(study, tmp_path / "study"):
        recipe = sweep._recipe(job, tmp_path / "base.yaml", tmp_path / "study")
        kept[job.levels["teachers"]] = set(recipe.teachers)
    (folder,) = (tmp_path / "study" / "preflight").iterdir()
    measured = json.loads((folder / "preflight.json").read_text())["teachers"]
    by_nll = sorted(measured, key=lambda name: measured[name]["nll"])
    assert len(by_nll) == 4
    for number in (1, 2, 4):
        assert kept[f"best {number}"] == set(by_nll[:number])
        assert kept[f"worst {number}"] == set(by_nll[::-1][:number])
        assert len(kept[f"1 {number}"]) == number
    # A random order adds one teacher after the other, too.
    assert kept["1 1"] < kept["1 2"] < kept["1 4"]
    assert kept["1 2"] != kept["2 2"]
    file.write_text(file.read_text().replace("number: 4", "number: 5"), encoding="utf-8")
    with refused(RecipeError, "best 4 (seed 0): rank.number: "):
        sweep.run_study(file)


def test_pick_outside_the_candidates_lists_them(tiny_study: Path) -> None:
    text = tiny_study.read_text().replace("{weighting: fixed}", "{weighting: min_ce}")
    tiny_study.write_text(text, encoding="utf-8")
    with refused(RecipeError, "EM, 0.5 (seed 0): preflight"):
        sweep.run_study(tiny_study)


def test_there_are_studies() -> None:
    assert len(STUDIES) >= 5


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_setting_of_every_study_decodes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(path)
    uniform = {"weighting": {"name": "uniform"}}
    monkeypatch.setattr(sweep, "_fitted_fusion", lambda job, values, folder: uniform)
    monkeypatch.setattr(sweep, "_ranked_teachers", lambda job, values, folder: values["teachers"])
    for job in sweep.jobs_of(study, tmp_path):
        recipe = sweep._recipe(job, path.parent / study.base, tmp_path)
        assert "{" not in str([teacher.model for teacher in recipe.teachers.values()])


def test_series_have_one_line_per_order_and_share_levels_without_one() -> None:
    levels = ["best first, K = 1", "best first, K = 2", "worst first, K = 1", "K = 3", "copies"]
    rows = [
        StudyRow(levels={"teachers": level}, seed=seed, folder="", values={"student_nll": i + seed})
        for i, level in enumerate(levels)
        for seed in (0, 1)
    ]
    figure = figures.series(rows, FigureOptions(kind="series", y="student_nll"), ["teachers"])
    assert figure is not None
    (axes,) = figure.axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert curves == {
        "best first": [[1, 0.5], [2, 1.5], [3, 3.5]],
        "worst first": [[1, 2.5], [3, 3.5]],
    }
    assert axes.get_xlabel() == "K"


def test_rank_correlation_matches_its_definition() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) without ties
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman([1, 1, 2], [3, 3, 5]) == pytest.approx(1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [1, 2]) is None


def test_contradicting_teacher_permutes_labels_of_one_domain_only() -> None:
    item = {
        "input_ids": torch.arange(6),
        "labels": torch.tensor([IGNORE, 1, 2, 3, 4, 5]),
        "domain_ids": torch.tensor([domain_number("a")] * 3 + [domain_number("b")] * 3),
    }
    dataset = PermutedLabels([item], "b", 50, seed=3)  # type: ignore[arg-type]
    permuted = dataset[0]
    assert permuted["labels"][:3].tolist() == [IGNORE, 1, 2]
    assert permuted["labels"][3:].tolist() == dataset.permutation_V[3:6].tolist()
    assert sorted(dataset.permutation_V.tolist()) == list(range(50))
    assert permuted["input_ids"] is item["input_ids"]
