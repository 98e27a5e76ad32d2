"""The cache in a run: built once, read by the student and the controls that share its target, refused when stale."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tiny
from collegium import pipeline
from collegium.cache.codec import Samples, TopK
from collegium.cache.options import CacheOptions
from collegium.cache.store import open_cache
from collegium.caching import cache_identity, cache_path, reads_cache
from collegium.cli import app
from collegium.data.pack import Collator
from collegium.errors import CacheError, CollegiumError, RecipeError
from collegium.fusion.pooling import FusedTarget, Fusion
from collegium.fusion.weights import Entropy, PrefixLikelihood, Uniform
from collegium.recipe import Recipe, dump_recipe, load_recipe
from collegium.run_folder import read_json
from collegium.teachers import encoders
from collegium.teachers.cached import CachedTeacher, pieces_of
from collegium.teachers.encoders import FusedEncoder, shard_windows
from collegium.types import Batch, SparseRows, domain_number
from collegium.variants import control, main_variant
from collegium.workspace import Workspace

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
train: {{learning_rate: 1e-2, max_steps: 4, per_device_train_batch_size: 4, logging_steps: 2, save_steps: 2}}
preflight: {{max_tokens: 200, batch_size: 4}}
evaluate: {{controls: [ce_only, uniform], batch_size: 4}}
cache: {{enabled: true, batch_size: 3}}
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, two teachers, and text longer than a window beside prompts with completions."""
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
    """A recipe whose cache keeps all tokens, so that it equals the live target."""
    recipe = _recipe(zoo, tmp_path_factory.mktemp("built"), "cache.targets={name: top_k, k: 400}")
    pipeline.cache(recipe)
    return recipe


def _encoder(workspace: Workspace, options: CacheOptions) -> FusedEncoder:
    """Encodes the training split under the run's own fusion."""
    fusion = workspace.recipe.fusion
    assert isinstance(fusion, Fusion)
    return FusedEncoder(
        lambda: workspace.teachers,
        fusion,
        workspace.datasets["train"],
        options=options,
        seed=0,
        vocab_size=workspace.vocab_size,
    )


@pytest.mark.parametrize("order", ["as it is", "shuffled"])
def test_a_cached_target_is_the_live_one_in_any_order_of_windows(built: Recipe, order: str) -> None:
    workspace = Workspace(built)
    dataset = workspace.datasets["train"]
    assert isinstance(built.fusion, Fusion)
    cache = open_cache(cache_path(workspace), cache_identity(workspace, built.fusion))
    teacher = CachedTeacher(cache, dataset.sample_names)
    windows = list(range(len(dataset)))
    if order == "shuffled":
        np.random.default_rng(0).shuffle(windows)
    num_rows = 0
    for start in range(0, len(windows), 4):
        batch = Batch.from_inputs(
            Collator()([dict(dataset[w]) for w in windows[start : start + 4]])
        )
        rows = batch.rows()
        found = teacher.score(batch, rows).scores
        assert isinstance(found, SparseRows)
        live = FusedTarget(built.fusion, [t.score(batch, rows) for t in workspace.teachers], rows)
        dense = live.block(slice(0, len(rows))).logp_nV
        torch.testing.assert_close(
            found.logits(slice(0, len(rows))).exp(), dense.exp(), atol=1e-4, rtol=2 / 64
        )
        num_rows += len(rows)
    assert num_rows == dataset.num_target_tokens == cache.manifest["num_targets"]


def test_a_route_is_cached_as_it_is_live(zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(
        zoo,
        tmp_path,
        "cache.targets={name: top_k, k: 400}",
        "fusion={weighting: {name: route, default: scripture, domains: {chat: code}}}",
    )
    pipeline.cache(recipe)
    workspace = Workspace(recipe)
    dataset = workspace.datasets["train"]
    assert isinstance(recipe.fusion, Fusion)
    cache = open_cache(cache_path(workspace), cache_identity(workspace, recipe.fusion))
    teacher = CachedTeacher(cache, dataset.sample_names)
    batch = Batch.from_inputs(Collator()([dict(dataset[w]) for w in range(len(dataset))]))
    rows = batch.rows()
    assert rows.domains is not None
    block = slice(0, len(rows))
    found = teacher.score(batch, rows).scores.logits(block).exp()
    is_chat = rows.domains == domain_number("chat")
    assert 0 < is_chat.sum() < len(rows)
    for live in workspace.teachers:
        expected = live.score(batch, rows).scores.logits(block).softmax(-1)
        own = is_chat if live.name == "code" else ~is_chat
        torch.testing.assert_close(found[own], expected[own], atol=1e-4, rtol=2 / 64)


def test_offsets_name_every_target_of_a_document_once(built: Recipe) -> None:
    """No two rows share the randomness of their draws, and pieces know where they stand."""
    workspace = Workspace(built)
    dataset = workspace.datasets["train"]
    encoder = _encoder(workspace, CacheOptions(batch_size=5))
    places: set[tuple[int, int]] = set()
    num_targets = 0
    for shard in range(len(encoder.shard_targets)):
        for piece in encoder.encode(shard):
            count = len(piece.rows.sizes)
            num_targets += count
            places |= {(piece.key.document, piece.key.offset + i) for i in range(count)}
    assert num_targets == len(places) == dataset.num_target_tokens
    assert len({key for key, _ in places}) > 1


def test_shards_follow_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "SHARD_TARGETS", 10)
    counts = np.array([4, 4, 4, 12, 0, 3, 3])
    assert shard_windows(counts) == [range(0, 3), range(3, 4), range(4, 7)]
    assert shard_windows(counts[:3]) == [range(0, 3)]


def test_the_size_of_a_batch_changes_no_draw_of_clear_targets(built: Recipe) -> None:
    workspace = Workspace(built)
    found = []
    for batch_size in (1, 7):
        options = CacheOptions(batch_size=batch_size, targets=Samples(draws=16))
        encoder = _encoder(workspace, options)
        pieces = {p.key: p.rows.ids.tolist() for p in encoder.encode(0)}
        found.append(pieces)
    assert found[0].keys() == found[1].keys()
    same = sum(found[0][key] == found[1][key] for key in found[0])
    assert same >= 0.95 * len(found[0]), (
        "only a draw on the very edge between two tokens may differ"
    )


def test_a_sample_of_all_windows_counts_all_entries(built: Recipe) -> None:
    workspace = Workspace(built)
    dataset = workspace.datasets["train"]
    options = CacheOptions(batch_size=len(dataset), targets=Samples(draws=16))
    encoder = _encoder(workspace, options)
    num_entries = sum(len(piece.rows.ids) for piece in encoder.encode(0))
    assert encoder.sample_entries() == pytest.approx(num_entries / dataset.num_target_tokens)


@pytest.fixture(scope="module")
def finished(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run that trained from draws."""
    recipe = _recipe(zoo, tmp_path_factory.mktemp("finished"))
    pipeline.run(recipe)
    return recipe


def test_a_run_builds_its_cache_and_trains_from_it(finished: Recipe) -> None:
    folder = finished.output_dir
    manifest = read_json(folder / "cache" / "manifest.json")
    assert manifest["identity"]["targets"] == {"name": "samples", "draws": 50}
    log = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    assert set(log[0]["terms"]) == {"kd", "ce"}
    assert log[0]["teacher_weights"] == {}
    uniform = folder / "controls" / "uniform" / "train" / "log.jsonl"
    first = json.loads(uniform.read_text().splitlines()[0])
    assert set(first["teacher_weights"]) == {"scripture", "code"}, "another target: live teachers"
    assert (folder / "report.html").is_file()
    assert {row["kind"] for row in read_json(folder / "results.json")} >= {"student", "fused"}


def test_a_finished_run_needs_its_cache_no_more(finished: Recipe) -> None:
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

    def refuse(self: Workspace) -> None:
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(Workspace, "teachers", property(refuse))
    pipeline.cache(recipe)
    assert pipeline.train(recipe).is_dir()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed=5", "seed: 0 -> 5"),
        ("fusion.weighting=uniform", "fusion.weighting.name: 'prefix_likelihood' -> 'uniform'"),
        ("data.max_length=31", "data.max_length: 32 -> 31"),
        ("cache.targets={name: top_k, k: 5}", "targets.k: None -> 5"),
        ("teachers.code.dtype=bfloat16", "teachers.code.dtype: 'auto' -> 'bfloat16'"),
    ],
)
def test_a_stale_cache_is_refused_by_field(
    zoo: Path, tmp_path: Path, finished: Recipe, override: str, told: str
) -> None:
    path = f"cache.path={finished.output_dir / 'cache'}"
    recipe = _recipe(zoo, tmp_path, path, override)
    with pytest.raises(CacheError, match="built for another run") as caught:
        pipeline.train(recipe)
    assert told in str(caught.value)
    with pytest.raises(CacheError, match="built for another run"):
        pipeline.cache(recipe)


def test_only_students_with_the_same_target_read_it(built: Recipe) -> None:
    workspace = Workspace(built)
    assert isinstance(built.fusion, Fusion)
    answers = {"student": main_variant(built, built.fusion)}
    names = ("ce_only", "best_single", "uniform", "entropy")
    answers |= {n: control(n, built, best_teacher="code", compute_ratio=2.0) for n in names}
    reads = {n: reads_cache(workspace, v, lambda: built.fusion) for n, v in answers.items()}
    assert reads == {"student": True} | dict.fromkeys(names, False)
    fusion = Fusion(weighting=Uniform())
    assert reads_cache(workspace, answers["uniform"], lambda: fusion)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("objective.temperature=2", "objective.temperature: got 2; must be 1"),
        (
            "objective.divergence=reverse_kl",
            "objective.divergence: got ReverseKL; must be forward_kl",
        ),
        ("objective.features={layers: last}", "objective.features"),
        ("objective.kd_ratio=0", "cache.enabled: needs teachers"),
        ("fusion.weighting={name: entropy, granularity: batch}", "got batch"),
        ("cache.targets={name: samples, draws: 0}", "draws"),
        ("cache.targets={name: dense}", "unknown name"),
    ],
)
def test_what_a_cache_cannot_give_is_refused_with_the_recipe(
    zoo: Path, tmp_path: Path, override: str, told: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        _recipe(zoo, tmp_path, override)
    assert told in str(caught.value)


def test_the_section_survives_a_round_trip(zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(zoo, tmp_path, "cache.targets={name: top_k, k: 7}", "cache.path=x/y")
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe
    assert again.cache.targets == TopK(k=7)


def test_a_batch_wide_fusion_is_refused_by_the_encoder(built: Recipe) -> None:
    from collegium.teachers.cached import require_static

    require_static(Fusion(weighting=PrefixLikelihood()))
    with pytest.raises(RecipeError, match="got batch"):
        require_static(Fusion(weighting=Entropy(granularity="batch")))


def test_a_cache_has_no_hidden_states(built: Recipe) -> None:
    workspace = Workspace(built)
    dataset = workspace.datasets["train"]
    teacher = CachedTeacher(open_cache(cache_path(workspace)), dataset.sample_names)
    batch = Batch.from_inputs(Collator()([dict(dataset[0])]))
    with pytest.raises(RecipeError, match="holds no hidden states"):
        teacher.score(batch, batch.rows(), ["layer_0"])


def test_pieces_are_the_documents_of_a_batch_without_its_padding() -> None:
    ids = torch.arange(12).view(2, 6)
    position = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]])
    samples = torch.tensor([[4, 4, 4, 2, 2, -1], [0, 0, 1, 1, 1, 1]])
    labels = ids.clone()
    labels[0, 3:5] = -100  # a piece without a target
    labels[0, 5] = -100
    found = pieces_of(Batch(ids, position, labels, samples), list(range(5)))
    shown = [(p.key.document, p.window, p.start, p.num_targets) for p in found]
    assert shown == [(4, 0, 0, 2), (0, 1, 0, 1), (1, 1, 2, 3)]


def test_the_command_line_builds_tells_and_verifies(zoo: Path, tmp_path: Path) -> None:
    _recipe(zoo, tmp_path)
    runner = CliRunner()
    built = runner.invoke(app, ["cache", str(tmp_path / "recipe.yaml")])
    assert built.exit_code == 0, built.output
    assert "bytes per target" in built.stdout
    assert "about" in built.stderr, "the estimate comes first"
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


def test_nothing_to_cache_is_told(zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(zoo, tmp_path, "cache.enabled=false")
    import dataclasses

    alone = dataclasses.replace(
        recipe,
        teachers={},
        fusion="auto",
        objective=dataclasses.replace(recipe.objective, kd_ratio=0.0),
    )
    with pytest.raises(CollegiumError, match="name at least one"):
        pipeline.cache(alone)
