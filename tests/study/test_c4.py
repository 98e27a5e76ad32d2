"""The recipes at full size: decoded, and checked on recorded configs through a fake hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from collegium.config.recipe import Recipe, load_recipe
from collegium.data.sources import SourceOptions, SourceSummary, read_documents
from collegium.errors import DataError
from collegium.models import identity
from collegium.models.cut_student import CutStudent
from collegium.run import pipeline
from collegium.run.checks import check_run
from collegium.run.context import RunContext
from collegium.study import sweep
from collegium.study.options import load_study
from fake_hub import write_c4, write_models
from refusals import refused

FOLDER = Path(__file__).parents[2] / "recipes" / "paper"
STUDY, BASE = FOLDER / "c4.yaml", FOLDER / "c4-base.yaml"
NUM_TRAIN, NUM_VALIDATION = 200, 20


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub whose data set is in the working directory, where `datasets` looks first."""
    texts = [f"Document {n} of the web crawl, about the number {n * n}. " * 8 for n in range(240)]
    write_c4(tmp_path, train=texts[:NUM_TRAIN], validation=texts[-NUM_VALIDATION:])
    write_models(tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    identity._hub_config.cache_clear()
    yield tmp_path
    identity._hub_config.cache_clear()


def small(recipe: Recipe) -> Recipe:
    """Return the recipe with limits that the fake data set reaches."""
    (train,), (validation,) = recipe.data.train, recipe.data.validation
    data = replace(
        recipe.data,
        train=[replace(train, limit=NUM_TRAIN)],
        validation=[replace(validation, limit=NUM_VALIDATION)],
        # In 200 documents, 1 % may be none.
        calibration_fraction=0.1,
    )
    return replace(recipe, data=data)


def recipes(folder: Path) -> dict[tuple[str, str], Recipe]:
    study = load_study(STUDY)
    return {
        (job.levels["teachers"], job.levels["student"]): sweep._recipe(job, BASE, folder)
        for job in sweep.jobs_of(study, folder)
    }


NUM_TEACHERS = {"CE only": 1, "K = 1": 1, "K = 2": 2, "K = 3": 3, "K = 5": 5}
STUDENTS = {"0.5 B": "494 M", "14 of 28 layers": "889 M"}


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("level", NUM_TEACHERS)
def test_each_run_passes_its_check(
    hub: Path, level: str, student: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium.run.estimates.free_bytes", lambda _: 80 * 10**9)  # of its GPU
    recipe = small(recipes(hub)[level, student])
    assert len(recipe.teachers) == NUM_TEACHERS[level]
    assert isinstance(recipe.student, CutStudent) == (student != "0.5 B")
    hub_line = "corpus: of unknown size (a dataset of the hub), encoded by the run"
    assert hub_line in pipeline.check(recipe).lines
    pipeline.corpus(recipe)
    report = pipeline.check(recipe)
    assert not report.warnings
    lines = report.lines
    assert lines[0] == "vocabulary: 151,665 tokens"
    for number, name in enumerate(recipe.teachers, start=1):
        assert lines[number].startswith(f"teachers.{name}: vocabulary compatible; ")
        assert "0 extra ids and 271 head rows are dropped" in lines[number]
        assert ("end texts differently" in lines[number]) == ("instruct" in name)
    teachers = ", ".join(f"{name} 1.54 B" for name in recipe.teachers)
    assert f"models: student {STUDENTS[student]} parameters; teachers {teachers}" in lines
    assert any(line.startswith("memory: train ") for line in lines)
    (compute,) = (line for line in lines if line.startswith("compute: "))
    assert ("for the teachers" in compute) == (level != "CE only")
    (train,) = (line for line in lines if line.startswith("data.train[0]: allenai/c4: "))
    assert f"rows: {NUM_TRAIN} read, {NUM_TRAIN} used" in train
    for part, numbers in (("train", range(200)), ("validation", range(220, 240))):
        (sample,) = (line for line in lines if line.startswith(f"data.{part}[0]: sample"))
        assert int(re.findall(r"ocument (\d+)", sample)[0]) in numbers


def test_all_runs_share_the_cache_of_a_teacher(hub: Path) -> None:
    from collegium.run.artifacts import caches

    found: dict[str, set[str]] = {}
    for (level, _), recipe in recipes(hub).items():
        if level != "CE only":
            pipeline.corpus(small(recipe))
            for cache in caches(RunContext(small(recipe))):
                found.setdefault(str(cache.path), set()).add(repr(cache.identity()))
    assert len(found) == 2 * 5  # training and calibration split
    assert {len(identities) for identities in found.values()} == {1}


def test_the_base_is_the_largest_run(hub: Path) -> None:
    base, largest = load_recipe(BASE), recipes(hub)["K = 5", "0.5 B"]
    shared = replace(base.data, corpus=largest.data.corpus)
    output_dir = largest.output_dir
    assert replace(base, name=largest.name, output_dir=output_dir, data=shared) == largest
    check_run(RunContext(small(base)))


def test_a_stream_ends_at_its_limit(hub: Path) -> None:
    options = SourceOptions(hub="allenai/c4", name="en", streaming=True, limit=NUM_TRAIN)
    summary = SourceSummary("data.train[0]")
    first = list(read_documents(options, where="data.train[0]", summary=summary))
    assert summary.num_rows == len(first) == NUM_TRAIN
    assert list(read_documents(options, where="data.train[0]")) == first
    # One document more is in the next file, which is damaged.
    more = replace(options, limit=NUM_TRAIN + 1)
    with refused(DataError, "data.train[0]: allenai/c4", volatile=r"(?<=\().*(?=\))"):
        list(read_documents(more, where="data.train[0]"))
