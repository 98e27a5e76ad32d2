"""Fused cache of a run: built once, read by all students with its target, refused if stale."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tiny
from collegium.cache.codecs.targets import STEP, TargetCodec, row_keys
from collegium.cache.encode import FusedEncoder
from collegium.cache.keys import document_hash, pieces_of
from collegium.cache.options import Samples, TopK
from collegium.cache.shards import split_runs
from collegium.cli import app
from collegium.config.recipe import Recipe, dump_recipe, load_recipe
from collegium.data.collate import Collator
from collegium.errors import CacheError, RecipeError
from collegium.fusion.conflict import TruthFallback
from collegium.fusion.fuse import Fusion, fuse
from collegium.fusion.requirements import FIXED_PER_ROW, check, fusion_requirements
from collegium.fusion.rules import Entropy, PrefixLikelihood, Uniform
from collegium.losses.pairing import FeatureOptions
from collegium.run import pipeline
from collegium.run.caches import FusedCache
from collegium.run.context import RunContext
from collegium.run.controls import control_variants, main_variant
from collegium.run.students import Student
from collegium.teachers.cached import CachedTargets
from collegium.types import IGNORE, Batch, domain_number
from refusals import refused

RECIPE = """
name: tiny
output_dir: {root}/run
student: {{model: {zoo}/student}}
teachers:
  scripture: {{model: {zoo}/scripture}}
  code: {{model: {zoo}/code}}
fusion: {{weighting: prefix_likelihood}}
data:
  train:
    - {{path: {zoo}/scripture.jsonl, domain: scripture}}
    - {{path: {zoo}/chat.jsonl, domain: chat}}
  max_length: 32
  calibration_fraction: 0.2
  validation_fraction: 0.2
objective: {{kd_ratio: 0.5}}
train:
  {{learning_rate: 1e-2, max_steps: 4, per_device_train_batch_size: 4, logging_steps: 2,
  save_steps: 2}}
preflight: {{max_tokens: 200, batch_size: 4}}
evaluate: {{controls: [ce_only, uniform], batch_size: 4}}
cache: {{enabled: true, batch_size: 3}}
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, two teachers, text longer than a window, and prompts with completions."""
    root = tmp_path_factory.mktemp("zoo")
    for seed, name in enumerate(("student", "scripture", "code")):
        tiny.save_tiny(root / name, seed=seed)
    texts = [{"text": f"{tiny.TEXT[0]} number {i}. " * (1 + i % 4)} for i in range(40)]
    pairs = [{"prompt": f"add {i}", "completion": f"{tiny.TEXT[2][:20]}{i}"} for i in range(20)]
    for name, lines in (("scripture", texts), ("chat", pairs)):
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (root / f"{name}.jsonl").write_text(content, encoding="utf-8")
    return root


def _recipe(zoo: Path, root: Path, *overrides: str) -> Recipe:
    file = root / "recipe.yaml"
    file.write_text(RECIPE.format(root=root, zoo=zoo), encoding="utf-8")
    return load_recipe(file, overrides)


@pytest.fixture(scope="module")
def built(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe whose cache keeps all tokens, so that its target equals the live one."""
    recipe = _recipe(zoo, tmp_path_factory.mktemp("built"), "cache.targets={name: top_k, k: 400}")
    pipeline.cache(recipe)
    return recipe


def _encoder(context: RunContext, batch_size: int) -> FusedEncoder:
    """Return an encoder of the training split under the fusion of the recipe."""
    fusion = context.recipe.fusion
    assert isinstance(fusion, Fusion)
    return FusedEncoder(
        dataset=context.datasets["train"],
        batch_size=batch_size,
        seed=0,
        teachers=lambda: context.teachers(list(context.recipe.teachers)),
        fusion=fusion,
    )


def _codec(context: RunContext, draws: int = 50) -> TargetCodec:
    return TargetCodec("fused", Samples(draws=draws), context.vocab_size)


@pytest.mark.parametrize("order", ["as it is", "shuffled"])
def test_a_cached_target_equals_the_live_one_in_any_order_of_windows(
    built: Recipe, order: str
) -> None:
    context = RunContext(built)
    dataset = context.datasets["train"]
    assert isinstance(built.fusion, Fusion)
    cache = FusedCache(context, built.fusion).open()
    targets = CachedTargets(cache, dataset.sample_names)
    windows = list(range(len(dataset)))
    if order == "shuffled":
        np.random.default_rng(0).shuffle(windows)
    num_rows = 0
    for start in range(0, len(windows), 4):
        batch = Batch.from_inputs(
            Collator()([dict(dataset[w]) for w in windows[start : start + 4]])
        )
        rows = batch.rows()
        cached = targets.target(batch, rows).rows
        live = fuse(
            built.fusion,
            [t.score(batch, rows) for t in context.teachers(list(context.recipe.teachers))],
            rows,
        )
        dense = live.block(slice(0, len(rows))).logp()
        torch.testing.assert_close(
            cached.logits(slice(0, len(rows))).exp(), dense.exp(), atol=1e-4, rtol=2 / 64
        )
        num_rows += len(rows)
    assert num_rows == dataset.num_target_tokens == cache.manifest.num_targets


def test_a_cached_route_equals_the_live_one(zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(
        zoo,
        tmp_path,
        "cache.targets={name: top_k, k: 400}",
        "fusion={weighting: {name: route, default: scripture, domains: {chat: code}}}",
    )
    pipeline.cache(recipe)
    context = RunContext(recipe)
    dataset = context.datasets["train"]
    assert isinstance(recipe.fusion, Fusion)
    cache = FusedCache(context, recipe.fusion).open()
    targets = CachedTargets(cache, dataset.sample_names)
    batch = Batch.from_inputs(Collator()([dict(dataset[w]) for w in range(len(dataset))]))
    rows = batch.rows()
    assert rows.domains is not None
    block = slice(0, len(rows))
    cached = targets.target(batch, rows).rows.logits(block).exp()
    is_chat = rows.domains == domain_number("chat")
    assert 0 < is_chat.sum() < len(rows)
    for live in context.teachers(list(context.recipe.teachers)):
        expected = live.score(batch, rows).distribution.logits(block).softmax(-1)
        routed = is_chat if live.name == "code" else ~is_chat
        torch.testing.assert_close(cached[routed], expected[routed], atol=1e-4, rtol=2 / 64)


def test_offsets_name_every_target_of_a_document_once(built: Recipe) -> None:
    """No two rows share the randomness of their draws, and every piece has its offset."""
    context = RunContext(built)
    dataset = context.datasets["train"]
    encoder = _encoder(context, batch_size=5)
    positions: set[tuple[int, int]] = set()
    num_targets = 0
    for shard in range(len(encoder.shard_targets)):
        for piece in encoder.encode(shard, _codec(context)):
            count = len(piece.columns["sizes"])
            num_targets += count
            positions |= {(piece.key.document, piece.key.offset + i) for i in range(count)}
    assert num_targets == len(positions) == dataset.num_target_tokens
    assert len({key for key, _ in positions}) > 1


def test_draws_are_keyed_by_the_place_of_the_label_in_its_document(
    built: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of a draw is part of the format: other builders must get the same draws."""
    context, placed = RunContext(built), list[tuple[int, int]]()

    def spy(seed: int, document_n: np.ndarray, offset_n: np.ndarray) -> np.ndarray:
        placed.extend(zip(document_n.tolist(), offset_n.tolist(), strict=True))
        return row_keys(seed, document_n, offset_n)

    monkeypatch.setattr("collegium.cache.encode.row_keys", spy)
    encoder, dataset = _encoder(context, batch_size=3), context.datasets["train"]
    for shard in range(len(encoder.shard_targets)):
        list(encoder.encode(shard, _codec(context)))
    expected = []
    for window in range(len(dataset)):
        labels = dataset[window]["labels"].tolist()
        for piece in dataset.pieces(window):
            part, labels = labels[: piece.stop - piece.start], labels[piece.stop - piece.start :]
            document = document_hash(dataset.sample_names[piece.document])
            places = [i for i, label in enumerate(part) if i > 0 and label != IGNORE]
            expected += [(document, piece.start + i) for i in places]
    assert sorted(placed) == sorted(expected)


def test_scalars_of_a_fused_target_are_those_of_its_distribution(built: Recipe) -> None:
    context = RunContext(built)
    codec = TargetCodec("fused", TopK(k=400), context.vocab_size)
    for piece in _encoder(context, batch_size=3).encode(0, codec):
        columns = piece.columns
        starts = np.concatenate([[0], np.cumsum(columns["sizes"].astype(int))])
        for row in range(len(columns["sizes"])):
            logp = -columns["levels"][starts[row] : starts[row + 1]].astype(float) * STEP
            assert columns["max_logp"][row] == pytest.approx(logp.max(), abs=STEP)
            entropy = -(np.exp(logp) * logp).sum()
            assert columns["entropy"][row] == pytest.approx(entropy, rel=0.05, abs=0.05)
            assert logp.min() - STEP <= columns["label_logp"][row] <= columns["max_logp"][row]


def test_shards_are_cut_by_their_number_of_targets() -> None:
    counts = [4, 4, 4, 12, 0, 3, 3]
    assert split_runs(counts, 10) == [range(0, 3), range(3, 4), range(4, 7)]
    assert split_runs(counts[:3], 10) == [range(0, 3)]
    assert split_runs([*counts[:3], 0, 0], 10) == [range(0, 3)], "a shard has targets"


def test_the_batch_size_changes_almost_no_draw(built: Recipe) -> None:
    context = RunContext(built)
    draws = []
    for batch_size in (1, 7):
        pieces = _encoder(context, batch_size).encode(0, _codec(context, draws=16))
        draws.append({piece.key: piece.columns["ids"].tolist() for piece in pieces})
    assert draws[0].keys() == draws[1].keys()
    same = sum(draws[0][key] == draws[1][key] for key in draws[0])
    assert same >= 0.95 * len(draws[0]), "only draws at the edge between two tokens may differ"


def test_a_sample_of_all_windows_holds_every_target(built: Recipe) -> None:
    context = RunContext(built)
    dataset = context.datasets["train"]
    encoder, codec = _encoder(context, batch_size=len(dataset)), _codec(context)
    assert sum(codec.num_targets(piece.columns) for piece in encoder.sample(codec)) == (
        dataset.num_target_tokens
    )


@pytest.fixture(scope="module")
def finished(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run that trained on sampled targets."""
    recipe = _recipe(zoo, tmp_path_factory.mktemp("finished"))
    pipeline.run(recipe)
    return recipe


def test_a_run_builds_its_cache_and_trains_from_it(finished: Recipe) -> None:
    folder = finished.output_dir
    manifest = json.loads((folder / "cache" / "manifest.json").read_text())
    assert manifest["identity"]["targets"] == {"name": "samples", "draws": 50}
    log = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    assert set(log[0]["terms"]) == {"kd", "ce"}
    assert log[0]["teacher_weights"] == {}
    uniform = folder / "controls" / "uniform" / "train" / "log.jsonl"
    first = json.loads(uniform.read_text().splitlines()[0])
    assert set(first["teacher_weights"]) == {"scripture", "code"}, (
        "a different target needs live teachers"
    )
    assert (folder / "report.html").is_file()
    results = json.loads((folder / "results.json").read_text())
    assert {row["kind"] for row in results} >= {"student", "fused"}


def test_a_finished_run_no_longer_needs_its_cache(finished: Recipe) -> None:
    import shutil

    cache = finished.output_dir / "cache"
    shutil.move(cache, cache.with_name("elsewhere"))
    try:
        pipeline.train(finished)
        assert not cache.exists()
    finally:
        shutil.move(cache.with_name("elsewhere"), cache)


def test_training_from_a_cache_loads_no_teacher(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(zoo, tmp_path)
    pipeline.cache(recipe)

    def refuse(*_: object) -> None:
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(RunContext, "load_teacher", refuse)
    pipeline.cache(recipe)
    assert pipeline.train(recipe).is_dir()


@pytest.mark.parametrize(
    "override",
    [
        "seed=5",
        "fusion.weighting=uniform",
        "data.max_length=31",
        "cache.targets={name: top_k, k: 5}",
        "teachers.code.dtype=bfloat16",
    ],
)
def test_a_stale_cache_is_refused_with_the_fields(
    zoo: Path, tmp_path: Path, finished: Recipe, override: str
) -> None:
    path = f"cache.path={finished.output_dir / 'cache'}"
    recipe = _recipe(zoo, tmp_path, path, override)
    for stage in (pipeline.train, pipeline.cache):
        with refused(CacheError, "TMP/run/cache: "):
            stage(recipe)


def test_a_cache_of_a_teacher_with_another_config_is_refused(
    zoo: Path, tmp_path: Path, finished: Recipe
) -> None:
    """The same weights under another config are another model."""
    shutil.copytree(zoo / "code", tmp_path / "code")
    config = json.loads((tmp_path / "code" / "config.json").read_text())
    path = f"cache.path={finished.output_dir / 'cache'}"
    recipe = _recipe(zoo, tmp_path, path, f"teachers.code.model={tmp_path / 'code'}")
    assert FusedCache(RunContext(recipe), recipe.fusion).is_done()
    changed = config["rope_parameters"] | {"rope_theta": 50.0}
    (tmp_path / "code" / "config.json").write_text(
        json.dumps(config | {"rope_parameters": changed})
    )
    with refused(CacheError, "TMP/run/cache: "):
        pipeline.train(recipe)


def test_a_stale_cache_is_refused_before_preflight_chooses_a_fusion(
    zoo: Path, tmp_path: Path, finished: Recipe
) -> None:
    path = f"cache.path={finished.output_dir / 'cache'}"
    pipeline.check(_recipe(zoo, tmp_path, path, "fusion=auto"))
    with refused(CacheError, "TMP/run/cache: "):
        pipeline.check(_recipe(zoo, tmp_path, path, "fusion=auto", "data.packing=false"))
    assert not (tmp_path / "run").exists()


def test_only_students_with_the_same_target_read_the_cache(built: Recipe) -> None:
    context = RunContext(built)
    assert isinstance(built.fusion, Fusion)
    variants = {"student": main_variant(built, built.fusion)}
    names = ("ce_only", "best_single", "uniform", "entropy")
    controls = control_variants(built, "code", 2.0)
    variants |= {name: controls[name] for name in names}
    reads = {n: bool(Student(context, v).dependencies()) for n, v in variants.items()}
    assert reads == {"student": True} | dict.fromkeys(names, False)
    uniform = dataclasses.replace(built, fusion=Fusion(weighting=Uniform()))
    assert Student(RunContext(uniform), variants["uniform"]).dependencies()


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("objective.temperature=2", "objective.temperature"),
        ("objective.divergence=reverse_kl", "objective.divergence"),
        ("objective.features={layers: last}", "objective.features"),
        ("fusion.weighting={name: entropy, granularity: batch}", "fusion.weighting.granularity"),
        ("cache.targets={name: samples, draws: 0}", "cache.targets.draws"),
        ("cache.targets={name: dense}", "cache.targets"),
    ],
)
def test_unsupported_options_are_refused_with_the_recipe(
    zoo: Path, tmp_path: Path, override: str, path: str
) -> None:
    with refused(RecipeError, f"override `{override}`: {path}: "):
        _recipe(zoo, tmp_path, override)


def test_a_divergence_of_all_tokens_is_refused_with_top_k(zoo: Path, tmp_path: Path) -> None:
    override = "objective.divergence=logit_mse"
    with refused(RecipeError, f"override `{override}`: objective.divergence: "):
        _recipe(zoo, tmp_path, "cache.targets={name: top_k}", override)


def test_a_cache_without_teachers_is_refused_with_the_recipe(zoo: Path, tmp_path: Path) -> None:
    with refused(RecipeError, "recipe.yaml:22: cache.enabled: "):
        _recipe(zoo, tmp_path, "objective.kd_ratio=0")


def test_the_cache_section_round_trips(zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(zoo, tmp_path, "cache.targets={name: top_k, k: 7}", "cache.path=x/y")
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe
    assert again.cache.targets == TopK(k=7)


def test_a_fused_cache_refuses_targets_that_depend_on_the_batch() -> None:
    check(fusion_requirements(Fusion(weighting=PrefixLikelihood())), [FIXED_PER_ROW])
    for fusion, where in (
        (Fusion(weighting=Entropy(granularity="batch")), "fusion.weighting.granularity: "),
        (Fusion(conflict=TruthFallback()), "fusion.conflict: "),
    ):
        with refused(RecipeError, where):
            check(fusion_requirements(fusion), [FIXED_PER_ROW])


def test_a_fused_cache_trains_no_feature_terms(built: Recipe, tmp_path: Path) -> None:
    context = RunContext(built)
    assert isinstance(built.fusion, Fusion)
    options = dataclasses.replace(built.objective, features=FeatureOptions())
    variant = dataclasses.replace(main_variant(built, built.fusion), objective=options)
    with refused(RecipeError, "objective.features: "):
        Student(context, variant).trainer(tmp_path)


def test_pieces_are_the_documents_of_a_batch_without_its_padding() -> None:
    ids = torch.arange(12).view(2, 6)
    position = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]])
    samples = torch.tensor([[4, 4, 4, 2, 2, -1], [0, 0, 1, 1, 1, 1]])
    labels = ids.clone()
    labels[0, 3:5] = -100  # a piece without a target
    labels[0, 5] = -100
    pieces = pieces_of(Batch(ids, position, labels, samples), list(range(5)))
    shown = [(p.key.document, p.window, p.start, p.num_targets) for p in pieces]
    assert shown == [(4, 0, 0, 2), (0, 1, 0, 1), (1, 1, 2, 3)]


def test_the_command_line_builds_shows_and_verifies(zoo: Path, tmp_path: Path) -> None:
    _recipe(zoo, tmp_path)
    runner = CliRunner()
    built = runner.invoke(app, ["cache", str(tmp_path / "recipe.yaml")])
    assert built.exit_code == 0, built.output
    assert "bytes per target" in built.stdout
    assert "about" in built.stderr, "the estimate is printed first"
    folder = str(tmp_path / "run" / "cache")
    info = runner.invoke(app, ["cache", "info", folder])
    assert '"prefix_likelihood"' in info.stdout
    assert "every shard verified" in runner.invoke(app, ["cache", "verify", folder]).stdout
    shard = next(Path(folder).glob("*.parquet"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 4
    shard.write_bytes(data)
    bad = runner.invoke(app, ["cache", "verify", folder])
    assert bad.exit_code == 2
    assert shard.name in bad.stderr
    again = runner.invoke(app, ["cache", "build", str(tmp_path / "recipe.yaml")])
    assert again.exit_code == 0
    assert runner.invoke(app, ["cache", "verify", folder]).exit_code == 0


def test_nothing_to_cache_is_an_error(zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(zoo, tmp_path, "cache.enabled=false")
    plain = dataclasses.replace(
        recipe,
        teachers={},
        fusion="auto",
        objective=dataclasses.replace(recipe.objective, kd_ratio=0.0),
    )
    with refused(RecipeError, "teachers: "):
        pipeline.cache(plain)


@pytest.mark.slow
def test_actors_of_ray_build_the_same_files(zoo: Path, tmp_path: Path) -> None:
    """Outputs and hidden states of a teacher, through the command line, and a run that reads."""
    pytest.importorskip("ray")
    _recipe(zoo, tmp_path)
    common = [
        f"teachers={{code: {{model: {zoo / 'code'}}}}}",
        "objective.features={weight: 0.1}",
        "cache={enabled: true, kind: per_teacher, features: {fit_rows: 64}}",
    ]
    folders = [tmp_path / "local", tmp_path / "actors"]
    for folder, more in zip(
        folders, ([], ["cache.ray={teachers: {code: {actors: 2}}}"]), strict=True
    ):
        command = ["cache", str(tmp_path / "recipe.yaml"), f"output_dir={folder}", *common, *more]
        subprocess.run([sys.executable, "-m", "collegium", *command], check=True)
    local, actors = (
        {
            path.relative_to(folder): path.read_bytes()
            for path in (folder / "cache").rglob("*")
            if path.is_file() and not path.name.startswith(".lock")
        }
        for folder in folders
    )
    assert local == actors
    assert len(local) == 2 + 2 + 3
