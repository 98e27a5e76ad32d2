"""Per-teacher cache of a run: one folder per teacher, read by students with any weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tiny
from collegium.cache.codecs.targets import STEP
from collegium.cache.keys import BatchKeys
from collegium.cache.options import Samples
from collegium.cli import app
from collegium.config.recipe import Recipe, decode_fusion, dump_recipe, load_recipe
from collegium.data.collate import Collator
from collegium.distributions import Answer, DenseRows, NamedRows
from collegium.errors import CacheError, RecipeError
from collegium.fusion.fuse import Fusion, fuse
from collegium.fusion.pools import RowReader
from collegium.fusion.requirements import check, fusion_requirements
from collegium.fusion.rules import Entropy, Uniform
from collegium.preflight.measure import run_preflight
from collegium.run import pipeline
from collegium.run.caches import TeacherCache
from collegium.run.context import RunContext
from collegium.run.controls import control_variants
from collegium.run.students import Student
from collegium.teachers.cached import CachedTeacher
from collegium.teachers.local import LocalTeacher
from collegium.train.objective import Objective
from collegium.train.options import ObjectiveOptions
from collegium.train.step import row_losses
from collegium.types import Batch
from refusals import refused

NAMES = ("scripture", "code", "law", "drama", "prose")
RECIPE = """
name: tiny
output_dir: {root}/run
student: {{model: {zoo}/student}}
teachers: {{{teachers}}}
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
evaluate: {{controls: [ce_only, best_single, uniform, entropy], batch_size: 4}}
cache: {{enabled: true, kind: per_teacher, temperatures: [1.25, 1.6], batch_size: 3}}
"""


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, five teachers, text longer than a window, and prompts with completions."""
    root = tmp_path_factory.mktemp("zoo")
    for seed, name in enumerate(("student", *NAMES)):
        tiny.save_tiny(root / name, seed=seed)
    texts = [{"text": f"{tiny.TEXT[0]} number {i}. " * (1 + i % 4)} for i in range(40)]
    pairs = [{"prompt": f"add {i}", "completion": f"{tiny.TEXT[2][:20]}{i}"} for i in range(20)]
    for name, lines in (("scripture", texts), ("chat", pairs)):
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (root / f"{name}.jsonl").write_text(content, encoding="utf-8")
    return root


def _recipe(zoo: Path, root: Path, *overrides: str, num_teachers: int = 2) -> Recipe:
    file = root / "recipe.yaml"
    teachers = ", ".join(f"{name}: {{model: {zoo}/{name}}}" for name in NAMES[:num_teachers])
    file.write_text(RECIPE.format(root=root, zoo=zoo, teachers=teachers), encoding="utf-8")
    return load_recipe(file, overrides)


@pytest.fixture(scope="module")
def finished(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A finished run whose student and controls trained from one cache."""
    recipe = _recipe(zoo, tmp_path_factory.mktemp("finished"))
    pipeline.run(recipe)
    return recipe


class Calls:
    """Counts the batches scored by each teacher."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_name: dict[str, int] = {}
        real = LocalTeacher.score

        def score(teacher: LocalTeacher, *args: object, **named: object) -> object:
            self.by_name[teacher.name] = self.by_name.get(teacher.name, 0) + 1
            return real(teacher, *args, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(LocalTeacher, "score", score)


def _batches(context: RunContext) -> list[Batch]:
    dataset = context.datasets["train"]
    starts = range(0, len(dataset), 4)
    windows = [range(at, min(at + 4, len(dataset))) for at in starts]
    return [Batch.from_inputs(Collator()([dict(dataset[w]) for w in part])) for part in windows]


def test_every_student_trains_from_one_cache(finished: Recipe) -> None:
    """Controls differ only in weights, so teachers read the corpus once for all of them."""
    folder = finished.output_dir
    for place, names in {
        "": ["scripture", "code"], "controls/uniform/": ["scripture", "code"],
        "controls/entropy/": ["scripture", "code"], "controls/best_single/": None,
    }.items():  # fmt: skip
        rows = (folder / f"{place}train/log.jsonl").read_text().splitlines()
        weights = json.loads(rows[0])["teacher_weights"]
        assert names is None or sorted(weights) == sorted(names)
        assert sum(weights.values()) == pytest.approx(1.0)
    uniform = json.loads((folder / "controls/uniform/train/log.jsonl").read_text().splitlines()[0])
    assert set(uniform["teacher_weights"].values()) == {0.5}
    context, controls = RunContext(finished), control_variants(finished, "code", 2.0)
    for name in ("best_single", "uniform", "entropy"):
        assert Student(context, controls[name]).dependencies()
    assert not Student(context, controls["ce_only"]).dependencies()


def test_training_from_the_cache_scores_with_no_teacher(
    finished: Recipe, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    path = f"cache.path={finished.output_dir / 'cache'}"
    assert pipeline.train(_recipe(zoo, tmp_path, path, "fusion.weighting=entropy")).is_dir()
    assert calls.by_name == {}


def test_only_an_added_teacher_reads_the_corpus(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = f"cache.path={tmp_path / 'cache'}"
    pipeline.cache(_recipe(zoo, tmp_path, shared, num_teachers=4))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    assert len({p.parent for p in before}) == 8
    calls = Calls(monkeypatch)
    five = _recipe(zoo, tmp_path, shared, f"output_dir={tmp_path / 'five'}", num_teachers=5)
    assert len(pipeline.cache(five)) == 10
    assert set(calls.by_name) == {"prose"}
    assert {p: p.stat().st_mtime_ns for p in before} == before
    first = dict(calls.by_name)
    pipeline.cache(five)
    pipeline.train(five)
    assert calls.by_name == first, "a complete cache needs no teacher"


def test_stored_rows_match_the_live_teacher(finished: Recipe) -> None:
    """Levels agree within half a step, scalars within float16, at every kept temperature."""
    context = RunContext(finished)
    keys = BatchKeys(context.datasets["train"].sample_names)
    num_targets = 0
    for name, live in zip(
        ("scripture", "code"), context.teachers(list(context.recipe.teachers)), strict=True
    ):
        cache = TeacherCache(context, name, "train").open()
        assert cache.codec.targets == Samples(draws=24)
        teacher = CachedTeacher(name, cache, keys)
        for batch in _batches(context):
            rows = batch.rows()
            stored, everything = teacher.score(batch, rows).distribution, slice(0, len(rows))
            assert isinstance(stored, NamedRows)
            assert stored.is_sampled
            assert stored.token_logp is not None
            logits_NV = live.score(batch, rows).distribution.logits(everything)
            logp_NV = logits_NV.log_softmax(1)
            logp_E = logp_NV[stored.row_of_entry(), stored.ids]
            assert (stored.token_logp - logp_E).abs().max() <= STEP / 2 + 1e-5
            for value in (1.0, *finished.cache.temperatures):
                actual = stored.scalars(everything, value)
                stats, _ = RowReader().read(logits_NV, rows.labels, temperature=value)
                expected = stats.entropy_KN, stats.label_logp_KN, stats.max_logp_KN
                assert actual is not None
                for ours, true in zip(actual, expected, strict=True):
                    torch.testing.assert_close(ours, true, rtol=2**-9, atol=2**-9)
            num_targets += len(rows)
    assert num_targets == 2 * context.datasets["train"].num_target_tokens


def test_teachers_draw_independently_of_each_other(zoo: Path, tmp_path: Path) -> None:
    """Teachers with equal weights draw differently, or their errors would not average out."""
    import shutil

    shutil.copytree(zoo / "code", tmp_path / "twin")
    recipe = _recipe(
        zoo,
        tmp_path,
        f"teachers.scripture.model={zoo}/code",
        f"teachers.code.model={tmp_path}/twin",
    )
    context = RunContext(recipe)
    for name in NAMES[:2]:
        TeacherCache(context, name, "train").ensure()
    keys = BatchKeys(context.datasets["train"].sample_names)
    batch = _batches(context)[0]
    first, second = (
        CachedTeacher(n, TeacherCache(context, n, "train").open(), keys)
        .score(batch, batch.rows()).distribution for n in NAMES[:2]
    )  # fmt: skip
    for named in (first, second):
        assert isinstance(named, NamedRows)
        assert named.stored is not None
    torch.testing.assert_close(first.stored.entropy[1.0], second.stored.entropy[1.0])
    assert first.ids.tolist() != second.ids.tolist()


MIXED_FUSIONS = [
    Fusion(weighting=Uniform()),
    Fusion(weighting=Entropy(), temperatures={"code": 1.25}),
]


def test_top_k_answers_are_fused_on_the_union_of_their_tokens(zoo: Path, tmp_path: Path) -> None:
    """Against the pool of the same truncated distributions over the whole vocabulary."""
    recipe = _recipe(zoo, tmp_path, "cache.targets={name: top_k, k: 12}", "fusion.pool=log_linear")
    assert pipeline.train(recipe).is_dir()
    log = (recipe.output_dir / "train" / "log.jsonl").read_text().splitlines()
    assert set(json.loads(log[0])["teacher_weights"]) == set(NAMES[:2])
    context = RunContext(recipe)
    keys = BatchKeys(context.datasets["train"].sample_names)
    teachers = [
        CachedTeacher(name, TeacherCache(context, name, "train").open(), keys) for name in NAMES[:2]
    ]
    batch = _batches(context)[0]
    rows = batch.rows()
    every = slice(0, len(rows))
    named = [teacher.score(batch, rows) for teacher in teachers]
    dense = [Answer(a.name, DenseRows(a.distribution.logits(every))) for a in named]
    for pool in ("linear", "log_linear", "power_mean"):
        fusion = Fusion(weighting=Uniform(), pool=pool)
        merged = fuse(fusion, named, rows).block(every).target
        assert isinstance(merged, NamedRows)
        assert int(merged.starts.diff().max()) > 12, "no token outside of both top-k is named"
        expected = fuse(fusion, dense, rows).block(every).logp()
        torch.testing.assert_close(merged.logits(every).exp(), expected.exp(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("targets", "fusions", "bound"),
    [
        ("{name: samples, draws: 4000}", MIXED_FUSIONS, 0.01),
        # All tokens, rounded to 1 / 64.
        ("{name: top_k, k: 400}", [*MIXED_FUSIONS, Fusion(pool="log_linear")], 1e-4),
    ],
    ids=["draws", "top k"],
)
def test_the_gradient_of_the_objective_is_close_to_that_of_live_teachers(
    zoo: Path, tmp_path: Path, targets: str, fusions: list[Fusion], bound: float
) -> None:
    """At the hidden states, for cached teachers and for a live one beside a cached one."""
    recipe = _recipe(zoo, tmp_path, f"cache.targets={targets}")
    pipeline.cache(recipe)
    context = RunContext(recipe)
    keys = BatchKeys(context.datasets["train"].sample_names)
    stored = [CachedTeacher(n, TeacherCache(context, n, "train").open(), keys) for n in NAMES[:2]]
    batch = _batches(context)[0]
    rows = batch.rows()
    student = context.new_student()
    from collegium.models.forward import forward_rows

    for fusion in fusions:
        grads = []
        for teachers in (
            context.teachers(list(context.recipe.teachers)),
            stored,
            [context.teachers(list(context.recipe.teachers))[0], stored[1]],
        ):
            objective = Objective(ObjectiveOptions(kd_ratio=0.9), fusion)
            states = forward_rows(student, batch, rows, vocab_size=context.vocab_size)
            answers = [t.score(batch, rows) for t in teachers]
            loss = row_losses(objective, states, answers, rows)
            grads.append(torch.autograd.grad(loss.total, states.hidden)[0].flatten())
        for grad in grads[1:]:
            cosine = torch.nn.functional.cosine_similarity(grad, grads[0], dim=0)
            assert cosine > 1 - bound
            assert (grad.norm() / grads[0].norm()).item() == pytest.approx(1.0, abs=3 * bound)


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("fusion={pool: log_linear}", "fusion.pool"),
        ("fusion={pooled_temperature: 0.9}", "fusion.pooled_temperature"),
        ("fusion={conflict: follow_highest}", "fusion.conflict"),
        ("fusion={weighting: consensus}", "fusion.weighting"),
        ("fusion={temperatures: {code: 1.3}}", "fusion.temperatures.code"),
        ("cache.temperatures=[1.0, 2.0]", "cache.temperatures"),
        ("cache={enabled: true, temperatures: [3.0]}", "cache.temperatures"),
        ("objective.divergence=reverse_kl", "objective.divergence"),
        ("objective.divergence=logit_mse", "objective.divergence"),
    ],
)
def test_unsupported_fusions_are_refused_with_the_recipe(
    zoo: Path, tmp_path: Path, override: str, path: str
) -> None:
    with refused(RecipeError, f"override `{override}`: {path}: "):
        _recipe(zoo, tmp_path, override)


@pytest.mark.parametrize(
    "override",
    [
        "seed=5",
        "data.max_length=31",
        "cache.targets={name: samples, draws: 9}",
        "teachers.scripture.dtype=bfloat16",
    ],
)
def test_a_stale_folder_is_refused_with_the_fields(
    zoo: Path, tmp_path: Path, finished: Recipe, override: str
) -> None:
    recipe = _recipe(zoo, tmp_path, f"cache.path={finished.output_dir / 'cache'}", override)
    with refused(CacheError, "TMP/run/cache/teachers/"):
        pipeline.train(recipe)


def test_a_stale_folder_is_refused_before_any_teacher_reads(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shared = f"cache.path={tmp_path / 'cache'}"
    pipeline.cache(_recipe(zoo, tmp_path, shared))
    shutil.rmtree(tmp_path / "cache/teachers/scripture")
    calls = Calls(monkeypatch)
    stale = _recipe(
        zoo, tmp_path, shared, "teachers.code.logit_scale=1.5", f"output_dir={tmp_path / 'other'}"
    )
    for stage in (pipeline.cache, pipeline.train, pipeline.preflight):
        with refused(CacheError, "TMP/cache/teachers/code/"):
            stage(stale)
    assert calls.by_name == {}
    assert not (tmp_path / "cache/teachers/scripture").exists()


def test_the_defaults_depend_on_the_kind_and_round_trip(zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(zoo, tmp_path, "cache.temperatures=[0.8, 3.0]")
    assert recipe.cache.targets == Samples(draws=24)
    assert _recipe(zoo, tmp_path, "cache={enabled: true}").cache.targets == Samples(draws=50)
    explicit = _recipe(zoo, tmp_path, "cache.targets={name: samples, draws: 50}")
    assert explicit.cache.targets == Samples(draws=50)
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_the_command_line_shows_and_verifies_every_folder(zoo: Path, tmp_path: Path) -> None:
    _recipe(zoo, tmp_path)
    runner = CliRunner()
    built = runner.invoke(app, ["cache", str(tmp_path / "recipe.yaml")])
    assert built.exit_code == 0, built.output
    assert built.stdout.count("bytes per target") == 4
    assert "cache teachers/code/train: " in built.stderr
    folder = tmp_path / "run" / "cache"
    info = runner.invoke(app, ["cache", "info", str(folder)]).stdout
    assert info.count('"per_teacher"') == 4
    assert runner.invoke(app, ["cache", "info", str(folder / "teachers/code/train")]).exit_code == 0
    assert (
        runner.invoke(app, ["cache", "verify", str(folder)]).stdout.count("bytes per target") == 4
    )
    shard = next(folder.glob("teachers/code/train/*.parquet"))
    data = bytearray(shard.read_bytes())
    data[100] ^= 4
    shard.write_bytes(data)
    bad = runner.invoke(app, ["cache", "verify", str(folder)])
    assert bad.exit_code == 2
    assert shard.name in bad.stderr
    manifest = json.loads((folder / "teachers/code/train/manifest.json").read_text())
    assert (
        manifest["num_targets"]
        == RunContext(load_recipe(tmp_path / "recipe.yaml")).datasets["train"].num_target_tokens
    )


@pytest.mark.parametrize("override", ["fusion={pool: log_linear}", "fusion={weighting: consensus}"])
def test_top_k_teachers_allow_logarithms(zoo: Path, tmp_path: Path, override: str) -> None:
    _recipe(
        zoo, tmp_path, override, "cache.targets={name: top_k}", "objective.divergence=reverse_kl"
    )


def test_a_cached_teacher_without_hidden_states_refuses_taps(finished: Recipe) -> None:
    context = RunContext(finished)
    keys = BatchKeys(context.datasets["train"].sample_names)
    stored = CachedTeacher("code", TeacherCache(context, "code", "train").open(), keys)
    batch = _batches(context)[0]
    with refused(RecipeError, "objective.features: "):
        stored.score(batch, batch.rows(), ["layer_0"])


@pytest.mark.parametrize("candidates", ["standard", "extended"])
def test_preflight_reads_the_cache_and_chooses_a_fusion_it_supports(
    zoo: Path, tmp_path: Path, candidates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NLLs of teachers and linear pools match the live ones, and no teacher is loaded again."""
    recipe = _recipe(zoo, tmp_path, "fusion=auto", f"preflight.candidates={candidates}")
    pipeline.cache(recipe)
    calls = Calls(monkeypatch)
    report = pipeline.preflight(recipe).to_json()
    assert calls.by_name == {}
    chosen = decode_fusion(report["chosen"]["fusion"])
    check(fusion_requirements(chosen), [recipe.cache.capabilities])
    assert {row["fusion"]["pool"] for row in report["fusions"]} == {"linear"}
    assert {row["fusion"]["pooled_temperature"] for row in report["fusions"]} == {1.0}
    names = {row["fusion"]["weighting"]["name"] for row in report["fusions"]}
    assert ("gate" in names) == (candidates == "extended")
    assert "consensus" not in names
    context = RunContext(recipe)
    live = run_preflight(
        context.teachers(list(context.recipe.teachers)),
        context.datasets["calibration"],
        batch_size=4,
        max_tokens=200,
        extended=candidates == "extended",
    ).to_json()
    for name, teacher in live["teachers"].items():
        for key in ("nll", "entropy", "ece", "top1"):
            assert report["teachers"][name][key] == pytest.approx(teacher[key], abs=2e-3)
    nll = {json.dumps(row["fusion"], sort_keys=True): row["nll"] for row in live["fusions"]}
    shared = [row for row in report["fusions"] if json.dumps(row["fusion"], sort_keys=True) in nll]
    assert len(shared) >= 5
    for row in shared:
        assert row["nll"] == pytest.approx(nll[json.dumps(row["fusion"], sort_keys=True)], abs=2e-3)
    # Only 64 of 400 tokens, and teachers close to uniform: a loose lower bound.
    assert 0 < report["disagreement"]["jsd"][0][1] <= live["disagreement"]["jsd"][0][1] * 1.1
    assert report["disagreement"]["top1"][0][1] == pytest.approx(
        live["disagreement"]["top1"][0][1], abs=0.02
    )
    calls.by_name.clear()
    assert pipeline.train(recipe).is_dir()
    assert calls.by_name == {}
