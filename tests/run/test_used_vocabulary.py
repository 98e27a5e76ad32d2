"""`student.vocabulary: used`, from recipe to results: a student with the tokens of its text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from typer.testing import CliRunner

import tiny
from collegium.cli import app
from collegium.config.recipe import Recipe, load_recipe
from collegium.errors import ModelError
from collegium.models.loading import load_model
from collegium.models.options import ModelOptions
from collegium.models.used_vocabulary import cut_config, cut_vocabulary
from collegium.report.run_files import RunFiles
from collegium.report.run_tables import preflight_tables
from collegium.run import pipeline
from collegium.run import student_sizes as student_sizes_module
from collegium.run.checks import check_run
from collegium.run.context import RunContext
from collegium.run.student_sizes import student_sizes
from collegium.teachers.local import LocalTeacher
from collegium.types import Batch
from refusals import refused
from tiny_run import CONFIG, recipe_text, write_zoo

STUDENTS = {
    "fresh": "{{config: {config}, tokenizer: {root}/scripture, vocabulary: used}}",
    "pretrained": "{{model: {root}/code, vocabulary: used}}",
    "layers": "{{from_layers: {{teacher: scripture, keep: [1]}}, vocabulary: used}}",
    "ranked": (
        "{{from_layers: {{teacher: tied, keep: by_importance, num_layers: 1}}, "
        "from_width: {{teacher: tied, hidden_size: 24}}, vocabulary: used}}"
    ),
}
TEXT = "In the beginning was the word"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers and a tied one, with 400 tokens and 8 pad rows; the text uses fewer tokens."""
    root = write_zoo(tmp_path_factory.mktemp("zoo"))
    tokenizer = tiny.tiny_tokenizer()
    model = tiny.tiny_model(408, seed=3, tie_word_embeddings=True)
    model.generation_config = GenerationConfig(eos_token_id=[0, 4], pad_token_id=1)
    model.save_pretrained(root / "tied")
    tokenizer.save_pretrained(root / "tied")
    for domain in ("scripture", "code"):
        lines = [json.dumps({"text": f"{TEXT} number {i}. " * 4}) for i in range(60)]
        (root / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (root / "code.jsonl").unlink()
    return root


def _recipe(zoo: Path, tmp_path: Path, kind: str, *overrides: str, tied: bool = True) -> Recipe:
    file = tmp_path / "recipe.yaml"
    student = STUDENTS[kind].format(root=zoo, config=json.dumps(CONFIG))
    text = recipe_text(zoo).replace(f"    - {{path: {zoo}/code.jsonl}}\n", "")
    teacher = f"\n  tied: {{model: {zoo}/tied}}" if tied else ""
    file.write_text(text.replace("\ndata:", f"{teacher}\ndata:"))
    fixed = (f"output_dir={tmp_path / 'run'}", f"student={student}", "evaluate.controls=[]")
    return load_recipe(file, [*fixed, *overrides])


def _batch(context: RunContext, *, whole: bool = False) -> Batch:
    from collegium.data.collate import Collator

    datasets = context.whole_datasets if whole else context.datasets
    return Batch.from_inputs(Collator()([datasets["validation"][0]]))


def test_a_run_trains_and_saves_it(zoo: Path, tmp_path: Path) -> None:
    recipe = _recipe(zoo, tmp_path, "ranked", "fusion={weighting: uniform}")
    report = check_run(RunContext(recipe))
    (line,) = [line for line in report.lines if line.startswith("student.vocabulary: ")]
    folder = pipeline.run(recipe)
    whole = AutoTokenizer.from_pretrained(zoo / "scripture")
    saved = AutoModelForCausalLM.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    size = len(tokenizer)
    assert 256 < size < len(whole)
    assert f"{size:,} tokens kept" in line
    assert saved.get_input_embeddings().num_embeddings == size
    assert saved.get_output_embeddings().out_features == size
    assert saved.config.vocab_size == size
    # The tied teacher stops at <|system|> as well, whose id is new, if low.
    assert saved.generation_config.eos_token_id == [0, 4]
    assert saved.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer(TEXT)["input_ids"]) == whole.tokenize(TEXT)
    rows = {row["kind"]: row for row in json.loads((folder / "results.json").read_text())}
    assert rows["student"]["nll"] < rows["untouched"]["nll"]
    assert rows["student"]["num_parameters"] == saved.num_parameters()
    generated = saved.generate(tokenizer(TEXT, return_tensors="pt")["input_ids"], max_new_tokens=4)
    assert tokenizer.decode(generated[0]).startswith(TEXT)


def test_a_teacher_answers_as_the_whole_one_over_the_kept_tokens(zoo: Path, tmp_path: Path) -> None:
    """Q(v) = P(v) / (1 - m), in float64 from the model as transformers loads it."""
    context = RunContext(_recipe(zoo, tmp_path, "layers"))
    assert context.used is not None
    kept_U = torch.from_numpy(context.used.kept_U)
    for name in ("scripture", "code", "tied"):
        teacher = context.load_teacher(name)
        batch, whole = _batch(context), _batch(context, whole=True)
        assert torch.equal(kept_U[batch.input_ids], whole.input_ids)
        rows = batch.rows()
        given = teacher.score(batch, rows).distribution.logits(slice(None))
        model = AutoModelForCausalLM.from_pretrained(zoo / name).double()
        with torch.no_grad():
            output = model(whole.input_ids, position_ids=whole.position_ids, use_cache=False)
        prob_NV = output.logits.flatten(0, 1)[rows.index].softmax(-1)
        kept_NU = prob_NV[:, kept_U]
        expected_NU = kept_NU / kept_NU.sum(-1, keepdim=True)
        assert torch.allclose(given.double().softmax(-1), expected_NU, atol=1e-6)


def test_the_cut_mass_is_that_of_all_rows(zoo: Path, tmp_path: Path) -> None:
    options = "preflight={batch_size: 3, candidates: standard, max_tokens: 30}"
    recipe = _recipe(zoo, tmp_path, "layers", options, tied=False)
    context = RunContext(recipe)
    report = pipeline.preflight(recipe)
    measured = report.teachers["code"].cut_mass
    assert context.used is not None
    (table, *_) = preflight_tables(RunFiles("tiny", preflight=report))
    assert "Cut mass" in [column.title for column in table.columns]
    model = AutoModelForCausalLM.from_pretrained(zoo / "code").double()
    is_cut_V = torch.ones(400, dtype=torch.bool)
    is_cut_V[torch.from_numpy(context.used.kept_U)] = False
    masses = []
    for item in context.whole_datasets["calibration"]:
        batch = Batch.from_inputs({k: v[None] for k, v in item.items()})
        with torch.no_grad():
            output = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        prob_NV = output.logits.softmax(-1).flatten(0, 1)[batch.rows().index]
        masses.append(prob_NV[:, is_cut_V].sum(-1))
    assert measured == pytest.approx(float(torch.cat(masses).mean()), rel=1e-5)


def test_the_start_is_the_cut_of_the_whole_student(zoo: Path, tmp_path: Path) -> None:
    for kind in STUDENTS:
        context = RunContext(_recipe(zoo, tmp_path, kind))
        assert context.used is not None
        kept_U = torch.from_numpy(context.used.kept_U)
        small, whole = context.new_student(), context.whole_student.build(seed=0, where="student")
        small_weights, weights = small.state_dict(), whole.state_dict()
        assert small_weights.keys() == weights.keys()
        for name, weight in weights.items():
            is_cut = "embed_tokens" in name or "lm_head" in name
            assert torch.equal(small_weights[name], weight[kept_U] if is_cut else weight)
        assert small.num_parameters() == context.student_facts.num_parameters
        tied = small.get_input_embeddings().weight is small.get_output_embeddings().weight
        assert tied == (kind == "ranked")


def test_caches_of_other_tokens_are_others(zoo: Path, tmp_path: Path) -> None:
    from collegium.run.caches import TeacherCache

    cached = ("cache={enabled: true, kind: per_teacher}", "fusion={weighting: uniform}")
    recipe = _recipe(zoo, tmp_path, "layers", *cached)
    whole = _recipe(zoo, tmp_path, "layers", *cached, "student.vocabulary=all")
    identities = [TeacherCache(RunContext(r), "code", "train").identity() for r in (recipe, whole)]
    assert identities[0] != identities[1]
    folder = pipeline.train(recipe).parent
    assert (folder / "cache" / "teachers" / "code" / "train").is_dir()


def _kept(model: PreTrainedModel, size: int) -> torch.Tensor:
    rows = model.get_input_embeddings().num_embeddings
    return torch.cat([torch.arange(5), torch.arange(rows - size + 5, rows)])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma2", "opt", "phi"])
def test_models_are_cut_exactly(model_type: str) -> None:
    config = {"head_dim": 8} if model_type == "gemma2" else {}
    if model_type == "opt":
        config |= {"word_embed_proj_dim": 32, "ffn_dim": 64}
    model = tiny.tiny_model(300, model_type=model_type, **config)
    whole = tiny.tiny_model(300, model_type=model_type, **config)
    kept_U = _kept(model, 100)
    cut_vocabulary(model, kept_U.numpy(), where="student")
    ids_T = torch.arange(100)[None]
    with torch.no_grad():
        expected = whole(kept_U[ids_T]).logits[..., kept_U]
        assert torch.allclose(model(ids_T).logits, expected, atol=1e-6)
    assert model.config.to_dict() == cut_config(whole.config, kept_U.numpy()).to_dict()
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)


def test_keeping_every_row_is_the_identity() -> None:
    model, whole = tiny.tiny_model(300), tiny.tiny_model(300)
    cut_vocabulary(model, torch.arange(300).numpy(), where="student")
    pairs = zip(model.state_dict().items(), whole.state_dict().items(), strict=True)
    assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in pairs)
    assert model.config.to_dict() == whole.config.to_dict()
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()


def test_special_ids_are_renumbered() -> None:
    model = tiny.tiny_model(300, eos_token_id=200, bos_token_id=7, pad_token_id=250)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [200, 9, 250]
    model.generation_config.suppress_tokens = [7]
    cut_vocabulary(model, torch.tensor([1, 2, 200, 250]).numpy(), where="student")
    assert (model.config.eos_token_id, model.config.bos_token_id) == (2, None)
    assert model.generation_config.eos_token_id == [2, 3]
    assert model.generation_config.suppress_tokens == []
    assert model.get_input_embeddings().padding_idx == 3


def test_other_uses_of_ids_are_refused() -> None:
    model = tiny.tiny_model(300)
    # A stand-in for embeddings per layer, as in Gemma 3n.
    table = torch.nn.Embedding(300, 32)

    def add(_module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + table(args[0])

    model.get_input_embeddings().register_forward_hook(add)
    with refused(ModelError, "student: "):
        cut_vocabulary(model, torch.arange(100, 200).numpy(), where="student")


# PEFT reads a property that transformers 5.23 deprecates, and would save the head as well.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers:UserWarning")
def test_adapters_of_the_head_are_refused(zoo: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for target in ("q_proj", "lm_head"):
        model = AutoModelForCausalLM.from_pretrained(zoo / "scripture")
        options = peft.LoraConfig(r=2, target_modules=[target])
        wrapped = peft.get_peft_model(model, options)
        wrapped.save_pretrained(tmp_path / target, save_embedding_layers=False)
    overrides = "teachers={{a: {{model: {0}/scripture, adapter: {1}}}, b: {{model: {0}/code}}}}"
    fine = _recipe(zoo, tmp_path, "pretrained", overrides.format(zoo, tmp_path / "q_proj"))
    check_run(RunContext(fine))
    assert isinstance(RunContext(fine).load_teacher("a"), LocalTeacher)
    recipe = _recipe(zoo, tmp_path, "pretrained", overrides.format(zoo, tmp_path / "lm_head"))
    with refused(ModelError, "teachers.a.adapter: "):
        check_run(RunContext(recipe))


def test_sizes_count_the_kept_tokens(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(student_sizes_module, "_speed", lambda *_: 1.0)
    used, whole = (
        student_sizes(RunContext(_recipe(zoo, tmp_path, "layers", *more)), None)
        for more in ((), ("student.vocabulary=all",))
    )
    for small, large in zip(used.lines, whole.lines, strict=True):
        saved = large.row.vocab_size - small.row.vocab_size
        assert saved > 0
        matrices = 1 if small.row.teacher == "tied" else 2
        difference = large.row.num_parameters - small.row.num_parameters
        assert difference == saved * matrices * small.row.hidden_size


def test_check_refuses_other_tokenizers(zoo: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    tiny.tiny_model(2, bos_token_id=1, eos_token_id=1, pad_token_id=1).save_pretrained(
        tmp_path / "words"
    )
    fast.save_pretrained(tmp_path / "words")
    recipe = _recipe(zoo, tmp_path, "pretrained", f"student.model={tmp_path / 'words'}")
    recipe_file = tmp_path / "words.yaml"
    from collegium.config.recipe import dump_recipe

    recipe_file.write_text(dump_recipe(recipe))
    overrides = ("teachers={}", "objective.kd_ratio=0")
    result = CliRunner().invoke(app, ["check", str(recipe_file), *overrides])
    assert result.exit_code == 2
    assert "student.vocabulary: got a WordLevel tokenizer" in result.output
    assert load_model(ModelOptions(model=str(zoo / "tied")), where="tied").config.vocab_size == 408
