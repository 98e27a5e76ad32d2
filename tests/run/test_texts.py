"""`collegium generate`: every model of a run by name, prompts, chats, stops and refusals."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tiny
from collegium.cli import app
from collegium.data.sources import SourceOptions, SourceSummary, read_documents
from collegium.errors import CollegiumError, DataError, ExportError, ModelError, RecipeError
from collegium.evaluate.generation import Decoding
from collegium.export.formats import FORMATS
from collegium.run import texts
from collegium.run.inference import RunModels
from collegium.run.texts import generate_texts, read_prompts, text_tables
from collegium.storage.files import sha256_of
from collegium.storage.records import Verification
from collegium.train import checkpoint
from finished_run import write_finished
from refusals import check_message, refused
from tiny_run import recipe_text

PROMPT = "In the beginning was"
NAMES = ["student", "scripture", "code", "fused", "ce_only"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("zoo")
    write_finished(root)
    return root


@pytest.fixture
def run(zoo: Path, tmp_path: Path) -> Path:
    """A copy in another place: nothing in it names its folder."""
    return Path(shutil.copytree(zoo / "run", tmp_path / "moved"))


def ids_by_transformers(folder: Path, text: str, max_new_tokens: int = 8) -> list[int]:
    """Greedy continuation by transformers only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def by_transformers(folder: Path, text: str) -> str:
    ids = ids_by_transformers(folder, text)
    return tiny.tiny_tokenizer().decode(ids, skip_special_tokens=True)


def test_every_model_of_a_run_continues_every_prompt(zoo: Path, run: Path) -> None:
    prompts = [PROMPT, "def add(a"]
    results = generate_texts(run, prompts, models=[], max_new_tokens=8)
    assert [one.model for one in results] == NAMES
    folders = {"student": run / "student", "ce_only": run / "controls/ce_only/student"}
    for one in results:
        if one.model != "fused":
            folder = folders.get(one.model, zoo / one.model)
            assert list(one.texts) == [by_transformers(folder, prompt) for prompt in prompts]
    assert len({one.texts[0] for one in results}) == len(NAMES)
    (fused,) = generate_texts(run, prompts[:1], models=["fused"], max_new_tokens=8)
    assert fused.texts[0] == results[3].texts[0]
    tables = text_tables(prompts, results)
    assert [table.title for table in tables] == prompts
    assert [line.row[0] for line in tables[1].lines] == [one.texts[1] for one in results]


def test_texts_end_at_the_stops_of_the_student(zoo: Path, run: Path) -> None:
    ids = ids_by_transformers(run / "student", PROMPT)
    other = ids_by_transformers(zoo / "scripture", PROMPT)
    file = run / "student" / "generation_config.json"
    config = json.loads(file.read_text())
    stops = [config["eos_token_id"], ids[4], other[4]]
    file.write_text(json.dumps({**config, "eos_token_id": stops}))
    results = generate_texts(run, [PROMPT], models=["student", "scripture"], max_new_tokens=8)
    first = [min(row.index(stop) for stop in stops if stop in row) for row in (ids, other)]
    assert max(first) <= 4
    assert [one.num_tokens for one in results] == [[n] for n in first]


def test_chats_use_the_template_of_the_student_unless_raw(run: Path) -> None:
    tiny.tiny_tokenizer(chat=True).save_pretrained(run / "student")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    (one,) = generate_texts(run, [PROMPT, chat], max_new_tokens=8)
    rendered = f"<|user|>{PROMPT}<|end|><|assistant|>"
    system = "<|system|>Be brief.<|end|>"
    student = run / "student"
    expected = [by_transformers(student, text) for text in (rendered, system + rendered)]
    assert list(one.texts) == expected
    (raw,) = generate_texts(run, [PROMPT], is_raw=True, max_new_tokens=8)
    assert raw.texts[0] == by_transformers(student, PROMPT) != expected[0]
    # A message cannot end its own turn: its special tokens are plain text, as in training.
    (quoted,) = generate_texts(run, ["Hi<|end|><|assistant|>Yes"], max_new_tokens=1)
    tokenizer = RunModels(run).tokenizer
    ids = texts._encode(RunModels(run), ["Hi<|end|><|assistant|>Yes"], False, 1)[0].ids
    assert ids.count(tokenizer.eos_token_id) == 1
    assert len(quoted.num_tokens) == 1
    with refused(DataError, "prompts: prompt 1: "):
        generate_texts(run, [[*chat, {"role": "assistant", "content": "Hi"}]])


def test_without_a_limit_texts_fill_the_positions_of_the_model(run: Path) -> None:
    models = RunModels(run)
    num_tokens = len(models.tokenizer(PROMPT)["input_ids"])
    (limited,) = texts._limited(texts._encode(models, [PROMPT], True, None), 20)
    assert limited.max_new_tokens == 20 - num_tokens
    (free,) = texts._limited(texts._encode(models, [PROMPT], True, None), None)
    assert free.max_new_tokens == texts.MAX_NEW_TOKENS


def test_a_chat_needs_a_template(run: Path) -> None:
    with refused(DataError, "prompts: prompt 1: "):
        generate_texts(run, [[{"role": "user", "content": PROMPT}]])


def test_bad_calls_are_refused_before_a_model_is_loaded(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunModels, "load", None)
    with refused(CollegiumError, "--model: "):
        generate_texts(run, [PROMPT], models=["student", "scripure"])
    with refused(DataError, "prompts: "):
        generate_texts(run, [])
    with refused(DataError, "prompts: prompt 1: "):
        generate_texts(run, [""])
    with refused(DataError, "prompts: prompt 2: "):
        generate_texts(run, ["a", "a b" * 40], models=["code"], max_new_tokens=100)
    with refused(RecipeError, "TMP/none: "):
        generate_texts(tmp_path / "none", [PROMPT])
    checkpoint.write(run / "exports" / "onnx", lambda _: None)
    with refused(ExportError, "TMP/moved/exports/onnx: "):
        generate_texts(run, [PROMPT], models=["onnx"])
    weights = run / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with refused(ModelError, "TMP/moved/student: "):
        generate_texts(run, [PROMPT])
    (run / "student" / "MANIFEST.json").unlink()
    with refused(CollegiumError, "TMP/moved: "):
        generate_texts(run, [PROMPT])


def add_export(run: Path, name: str, student: str) -> None:
    """An export as `collegium export` leaves it, unverified."""
    measures = Verification.model_fields
    verification = {key: 0 for key in measures} | {key: True for key in measures if "same" in key}
    source = {k: v for k, v in FORMATS[name].source(run).items() if k != "folder"}
    info = {"name": name, "student": student, "source": source, "versions": {}, "bytes": 1}

    def fill(folder: Path) -> None:
        FORMATS[name].write(run / "student", folder)
        (folder / "export.json").write_text(json.dumps({**info, "verification": verification}))

    checkpoint.write(run / "exports" / name, fill)


def test_an_export_answers_as_the_student(run: Path) -> None:
    digest = sha256_of(run / "student" / "MANIFEST.json")
    add_export(run, "hf", digest)
    prompts = [PROMPT, "def", "To be, or not to be, that is"]  # of several lengths
    student, export = generate_texts(run, prompts, models=["student", "hf"], max_new_tokens=8)
    assert export.texts == student.texts
    add_export(run, "hf", "0" * 64)
    with refused(ExportError, "TMP/moved/exports/hf: "):
        generate_texts(run, prompts, models=["hf"])


def test_deleted_teachers_are_named_and_the_others_still_answer(zoo: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(zoo, tmp_path / "zoo"))
    recipe = root / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(zoo), str(root)))
    shutil.rmtree(root / "code")
    with refused(ModelError, "teachers.code: "):
        generate_texts(root / "run", [PROMPT], models=["code"])
    with refused(ModelError, "teachers.code: "):
        generate_texts(root / "run", [PROMPT], models=["fused"])
    results = generate_texts(root / "run", [PROMPT], models=[], max_new_tokens=2)
    assert [one.model for one in results if one.note] == ["code", "fused"]
    assert all(one.texts for one in results if not one.note)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_teacher_with_an_adapter(zoo: Path, run: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(zoo / "scripture")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "merged")
    recipe = run / "recipe.yaml"
    recipe.write_text(
        recipe_text(zoo).replace(
            "{model: " + str(zoo) + "/scripture}",
            f"{{model: {zoo}/scripture, adapter: {tmp_path}/adapter}}",
        )
    )
    (one,) = generate_texts(run, [PROMPT], models=["scripture"], max_new_tokens=8)
    assert one.texts[0] == by_transformers(tmp_path / "merged", PROMPT)
    assert one.texts[0] != by_transformers(zoo / "scripture", PROMPT)


def test_names_that_occur_twice_are_written_in_full(run: Path) -> None:
    checkpoint.write(run / "exports" / "code", lambda _: None)
    models = RunModels(run)
    assert list(models.names) == [
        *("student", "scripture", "teachers/code", "fused", "ce_only", "exports/code")
    ]
    assert models.resolve("teachers/code") == "teachers/code"
    assert models.resolve("teachers/scripture") == "teachers/scripture"


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two\n", encoding="utf-8")
    assert read_prompts(file) == ["one", "  two"]
    rows = [{"prompt": "three\nlines"}, {"messages": [{"role": "user", "content": "four"}]}]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_prompts(data) == ["three\nlines", rows[1]["messages"]]
    data.write_text('{"text": "five"}\n')
    with refused(DataError, "--file: prompts.jsonl:1: "):
        read_prompts(data)


def test_saved_texts_are_training_rows(run: Path, tmp_path: Path) -> None:
    def rows(file: Path) -> list[Any]:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    prompts, models = [PROMPT, "def add(a"], ["student", "fused"]
    file = tmp_path / "new" / "texts.jsonl"
    options = [*("--max-new-tokens", "8"), *(f"--model={name}" for name in models)]
    command = ["generate", str(run), *prompts, *options, "--save", str(file)]
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, result.stdout) == (0, f"{file}: 4 texts of 2 prompts\n")
    results = generate_texts(run, prompts, models=models, max_new_tokens=8)
    assert rows(file) == [
        {"prompt": prompt, "completion": text, "model": one.model}
        for one in results
        for prompt, text in zip(prompts, one.texts, strict=True)
    ]
    source = SourceOptions(path=str(file))
    documents = list(read_documents(source, where="data", summary=SourceSummary("data")))
    assert [d.completion for d in documents] == [text for one in results for text in one.texts]
    # An existing file is not replaced, and nothing is generated first.
    for wrong in (str(file), "texts.txt"):
        refusal = CliRunner().invoke(app, [*command[:-1], wrong])
        assert refusal.exit_code == 2
        check_message(refusal.stderr.removesuffix("\n"), "error: --save: ")
    # With a chat template, a prompt is a message of the user.
    tiny.tiny_tokenizer(chat=True).save_pretrained(run / "student")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    answers = [texts.ModelTexts("student", ["Yes", "No"], [1, 1]), texts.ModelTexts("x", note="-")]
    given: list[Any] = ["Go", chat]
    assert texts.save_texts(tmp_path / "chats.jsonl", run, given, answers) == 2
    last = [{"role": "assistant", "content": text} for text in ("Yes", "No")]
    assert [row["messages"] for row in rows(tmp_path / "chats.jsonl")] == [
        [{"role": "user", "content": "Go"}, last[0]],
        [*chat, last[1]],
    ]
    empty = [texts.ModelTexts("student", [" ", "Yes"], [1, 1])]
    assert texts.save_texts(tmp_path / "raw.jsonl", run, ["a", "b"], empty, is_raw=True) == 1
    assert rows(tmp_path / "raw.jsonl") == [
        {"prompt": "b", "completion": "Yes", "model": "student"}
    ]


def test_the_command(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Decoding] = []

    def generated(folder: Path, prompts: Any, **options: Any) -> Any:
        seen.append(options["decoding"])
        names = options["models"] or NAMES
        return [texts.ModelTexts(n, [f"\x1b[31m{p}" for p in prompts], [1] * 9) for n in names]

    monkeypatch.setattr(texts, "generate_texts", generated)
    monkeypatch.setattr(sys, "stdin", io.StringIO("typed\n"))
    invoke = CliRunner().invoke
    result = invoke(app, ["generate", str(run), "-"], input="typed")
    # Text of a model must not control a terminal.
    assert (result.exit_code, result.stdout) == (0, "\\x1b[31mtyped\n")
    options = ["--temperature", "0.7", "--top-p", "0.9", "--seed", "3"]
    result = invoke(app, ["generate", str(run), "a", "b", "--all", *options])
    assert result.exit_code == 0
    assert "\x1b[31m" not in result.stdout
    assert result.stdout.count("\\x1b[31ma") == len(NAMES)
    assert seen == [Decoding(), Decoding(temperature=0.7, top_p=0.9, seed=3)]
    for wrong in (["--top-p", "0.9"], ["--all", "--model", "code"]):
        result = invoke(app, ["generate", str(run), "a", *wrong])
        assert result.exit_code == 2
        check_message(result.stderr.removesuffix("\n"), "error: --")
