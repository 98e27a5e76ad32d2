"""Feature terms from a cache: no teacher is loaded, and the loss is close to the live one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

import tiny_run
from collegium.cache.options import FeatureCacheOptions
from collegium.cache.store import open_cache
from collegium.cli import app
from collegium.config.recipe import Recipe, dump_recipe, load_recipe
from collegium.data.collate import Collator
from collegium.distributions import Answer
from collegium.errors import CacheError, RecipeError
from collegium.run import pipeline
from collegium.run.caches import HiddenCache
from collegium.run.context import RunContext
from collegium.run.controls import main_variant
from collegium.run.students import Student
from collegium.types import Batch, Rows
from refusals import refused

FUSION = "fusion={weighting: uniform}"
CACHE = "cache={enabled: true, kind: per_teacher, features: {rank: 256, fit_rows: 300}}"
FEATURES = "objective={kd_ratio: 0.5, features: {num_layers: 2, teacher_weights: {code: 0.5}}}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_zoo(tmp_path_factory.mktemp("zoo"))


def recipe_at(root: Path, *overrides: str) -> Recipe:
    file = root / "recipe.yaml"
    file.write_text(tiny_run.recipe_text(root), encoding="utf-8")
    return load_recipe(file, [FUSION, CACHE, FEATURES, *overrides])


@pytest.fixture(scope="module")
def built(root: Path) -> Recipe:
    recipe = recipe_at(root)
    pipeline.cache(recipe)
    return recipe


def test_no_teacher_is_loaded_and_every_term_trains(
    built: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr("collegium.teachers.options.LocalOptions.load", load)
    pipeline.train(built)
    log = (built.output_dir / "train" / "log.jsonl").read_text()
    assert '"feature/code"' in log
    assert '"feature/scripture"' in log
    summary = json.loads((built.output_dir / "train" / "summary.json").read_text())
    assert summary["steps"] == 4


def test_states_and_loss_match_live_teachers(built: Recipe) -> None:
    context = RunContext(built)
    fusion = built.fusion
    assert not isinstance(fusion, str)
    variant = main_variant(built, fusion)
    for name, taps in context.kept_taps.items():
        assert list(HiddenCache(context, name).open().codec.projections) == taps
    root = built.output_dir / "compared"
    live = RunContext(recipe_at(root.parent.parent, "cache={enabled: false}"))
    trainers = [
        Student(one, variant).trainer(root / name)
        for name, one in (("cached", context), ("live", live))
    ]
    dataset = context.datasets["train"]
    inputs = Collator()([dict(dataset[w]) for w in range(8)])
    batch = Batch.from_inputs(inputs)
    rows = batch.rows()
    for name, taps in context.kept_taps.items():
        kept, live = (
            next(t for t in trainer.step.teachers if t.name == name).score(batch, rows, taps)
            for trainer in trainers
        )
        for tap in taps:
            error = (kept.features[tap] - live.features[tap]).norm(dim=1)
            assert float((error / live.features[tap].norm(dim=1)).max()) < 0.03
    losses = [trainer.step(inputs)[1] for trainer in trainers]
    for name in ("feature/code", "feature/scripture"):
        cached, live = (float(loss.terms[name]) for loss in losses)
        assert cached == pytest.approx(live, rel=0.01)


def test_other_layers_or_another_rank_are_reported(built: Recipe, root: Path) -> None:
    changed = recipe_at(root, "objective.features.num_layers=1", "cache.features.rank=8")
    context = RunContext(changed)
    with refused(CacheError, "TMP/run/cache/features/code: "):
        HiddenCache(context, "code").open()
    turned_off = recipe_at(root, "objective.features.teacher_weights={code: 0}")
    assert list(RunContext(turned_off).kept_taps) == ["scripture"]


def test_the_projection_is_fitted_on_the_first_rows_only(built: Recipe) -> None:
    context = RunContext(built)
    encoder, num_scored = HiddenCache(context, "code").encoder(), 0
    (teacher,) = context.teachers(["code"])

    class Counted:
        def score(self, batch: Batch, rows: Rows, taps: Sequence[str]) -> Answer:
            nonlocal num_scored
            num_scored += len(rows)
            return teacher.score(batch, rows, taps)

    encoder.teacher = Counted  # type: ignore[assignment]
    encoder.batch_size = 2
    encoder.options = FeatureCacheOptions(rank=4, fit_rows=2)
    encoder.fit()
    assert 2 <= num_scored <= 2 * built.data.max_length


def test_verify_checks_hidden_states_too(built: Recipe) -> None:
    path = built.output_dir / "cache"
    result = CliRunner().invoke(app, ["cache", "verify", str(path)])
    assert result.exit_code == 0, result.output
    assert result.output.count("features") == 2
    shard = next((path / "features" / "code").glob("shard-*.parquet"))
    intact = shard.read_bytes()
    shard.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    result = CliRunner().invoke(app, ["cache", "verify", str(path)])
    assert result.exit_code != 0
    shard.write_bytes(intact)


def test_info_shows_hidden_states(built: Recipe) -> None:
    result = CliRunner().invoke(app, ["cache", "info", str(built.output_dir / "cache")])
    assert result.exit_code == 0, result.output
    assert result.output.count('"kind": "features"') == 2
    assert '"rank": ' in result.output


def test_a_run_trains_from_a_cache_behind_a_url(
    built: Recipe, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets and hidden states are read from the URL, and the student is bit-identical."""
    pipeline.train(built)
    store = fsspec.filesystem("memory")
    store.put(str(built.output_dir / "cache"), "/far/cache", recursive=True)
    url = "memory://far/cache"
    result = CliRunner().invoke(app, ["cache", "verify", url])
    assert result.exit_code == 0, result.output
    assert result.output.count("features") == 2
    monkeypatch.setattr(RunContext, "load_teacher", lambda *_: pytest.fail("a teacher was loaded"))
    far = recipe_at(root, f"output_dir={root}/far", f"cache.url={url}")
    pipeline.train(far)
    weights = [
        next((folder / "student").glob("*.safetensors")).read_bytes()
        for folder in (built.output_dir, far.output_dir)
    ]
    assert weights[0] == weights[1]


def test_merge_copies_hidden_states(built: Recipe, tmp_path: Path) -> None:
    """The first folder has only targets; the second, with hidden states, is not changed."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(built.output_dir / "cache", first)
    shutil.copytree(built.output_dir / "cache", second)
    shutil.rmtree(first / "features")
    result = CliRunner().invoke(app, ["cache", "merge", str(first), str(second)])
    assert result.exit_code == 0, result.output
    assert result.output.count("features") == 2
    for name in ("code", "scripture"):
        merged, source = (open_cache(path / "features" / name) for path in (first, second))
        assert merged.manifest.sha256 == source.manifest.sha256
    manifest = second / "features" / "code" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"rank"', '"rang"'))
    result = CliRunner().invoke(app, ["cache", "merge", str(first), str(second)])
    assert result.exit_code != 0


def test_processes_share_the_work_and_the_projection(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("cache.encode", "run.caches"):
        monkeypatch.setattr(f"collegium.{module}.SHARD_TARGETS", 300)
    whole = recipe_at(root, f"output_dir={root}/whole")
    pipeline.cache(whole)
    parts = HiddenCache(RunContext(recipe_at(root, f"output_dir={root}/parts")), "code")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        parts.build()
        assert parts.is_done() == (rank == 1)
    folders = [HiddenCache(RunContext(whole), "code").path, parts.path]
    files = [{p.name: p.read_bytes() for p in f.iterdir() if p.suffix} for f in folders]
    assert len(files[0]) > 3
    assert files[0] == files[1]


def test_a_recipe_with_cached_states_reads_back_equal(root: Path, tmp_path: Path) -> None:
    recipe = recipe_at(root)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "source", "path"),
    [
        ("cache={enabled: true, features: {rank: 4}}", None, "cache.features"),
        ("objective={kd_ratio: 0.5}", CACHE, "cache.features"),
        ("cache={enabled: true, kind: per_teacher}", FEATURES, "objective.features"),
        (
            "cache={enabled: true, kind: per_teacher, features: {rank: 0}}",
            None,
            "cache.features.rank",
        ),
    ],
)
def test_unsupported_features_are_refused(
    root: Path, override: str, source: str | None, path: str
) -> None:
    with refused(RecipeError, f"override `{source or override}`: {path}: "):
        recipe_at(root, override)


def test_the_states_are_deterministic(built: Recipe, root: Path) -> None:
    other = recipe_at(root, f"output_dir={root}/again")
    pipeline.cache(other)
    for name in ("code", "scripture"):
        first, second = (HiddenCache(RunContext(recipe), name).open() for recipe in (built, other))
        assert first.manifest.sha256 == second.manifest.sha256
