"""Task files and held-out continuations: reading, encoding, answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from collegium.data.encode import Encoder
from collegium.data.tokens import Encoded
from collegium.data.windows import PackedDataset
from collegium.errors import DataError
from collegium.evaluate.generation import Decoding, FusedSource, SingleSource
from collegium.evaluate.options import GenerationOptions
from collegium.evaluate.tasks import Suite, answer_suite, continuations, read_task, score_samples
from collegium.fusion.fitted import Route
from collegium.fusion.fuse import Fusion
from collegium.fusion.rules import PrefixLikelihood
from collegium.teachers.local import LocalTeacher
from refusals import check_message, refused

ASK = {"prompt": "To be, or", "references": ["not to be"], "metric": "exact_match"}
PICK = {"prompt": "To be,", "references": ["or"], "choices": ["or", "and"], "metric": "accuracy"}
CHAT = [{"role": "user", "content": "To be?"}]


def encoder(chat: bool = False) -> Encoder:
    tokenizer = tiny.tiny_tokenizer(chat=chat)
    return Encoder(tokenizer, max_length=sys.maxsize, where="evaluate.tasks.qa")


def write(folder: Path, *rows: object) -> Path:
    path = folder / "qa.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return path


def read(folder: Path, *rows: object, chat: bool = False) -> Suite:
    return read_task(write(folder, *rows), encoder(chat))


def without(row: Mapping[str, Any], *keys: str, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys} | more


HOSTILE: dict[str, list[object]] = {
    "empty": [],
    "blank": ["", "   "],
    "no JSON": ["{'prompt': 1}"],
    "cut off": ['{"prompt": "a'],
    "no object": [["a"]],
    "nested": ["[" * 100_000],
    "unknown key": [ASK | {"reference": "x"}],
    "a key of another tool": [ASK | {"doc_to_text": "x"}],
    "no prompt": [without(ASK, "prompt")],
    "two prompts": [ASK | {"messages": CHAT}],
    "prompt is a number": [ASK | {"prompt": 3}],
    "prompt is a list": [ASK | {"prompt": CHAT}],
    "blank prompt": [ASK | {"prompt": " \n"}],
    "null prompt": [ASK | {"prompt": None}],
    "NUL in the prompt": [ASK | {"prompt": "a\0b"}],
    "surrogate in the prompt": ['{"prompt": "\\ud800", "references": "a", "metric": "bleu"}'],
    "no references": [without(ASK, "references")],
    "empty references": [ASK | {"references": []}],
    "empty reference": [ASK | {"references": ["a", ""]}],
    "blank reference": [ASK | {"references": ["  "]}],
    "references of numbers": [ASK | {"references": [1, 2]}],
    "a reference twice": [ASK | {"references": ["a", "a"]}],
    "no metric": [without(ASK, "metric")],
    "unknown metric": [ASK | {"metric": "exact_matches"}],
    "metric of continuations": [ASK | {"metric": "distinct_1"}],
    "no metrics": [ASK | {"metric": []}],
    "metric twice": [ASK | {"metric": ["bleu", "bleu"]}],
    "metrics differ": [ASK, ASK | {"metric": "token_f1"}],
    "choices with another metric": [ASK | {"choices": ["a", "b"]}],
    "no choices": [without(PICK, "choices")],
    "one choice": [PICK | {"choices": ["or"]}],
    "a choice twice": [PICK | {"choices": ["or", "or"]}],
    "reference is no choice": [PICK | {"references": ["OR"]}],
    "accuracy and another metric": [PICK | {"metric": ["accuracy", "bleu"]}],
    "accuracy with a limit": [PICK | {"max_new_tokens": 4}],
    "accuracy with a stop": [PICK | {"stop": ["\n"]}],
    "limit of 0": [ASK | {"max_new_tokens": 0}],
    "limit is true": [ASK | {"max_new_tokens": True}],
    "limit is a text": [ASK | {"max_new_tokens": "4"}],
    "empty stop": [ASK | {"stop": [""]}],
    "stop is a number": [ASK | {"stop": 3}],
    "empty domain": [ASK | {"domain": ""}],
    "domain is a number": [PICK | {"domain": 3}],
    "messages is a text": [without(ASK, "prompt", messages="hello")],
    "no messages": [without(ASK, "prompt", messages=[])],
    "unknown role": [without(ASK, "prompt", messages=[{"role": "me", "content": "a"}])],
    "message without content": [without(ASK, "prompt", messages=[{"role": "user"}])],
    "several": [ASK | {"metric": "x"}, ASK, ASK | {"prompt": ""}, "{", [1]],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_task_file_is_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, *HOSTILE[case], chat=True)
    text = str(caught.value)
    check_message(text, "evaluate.tasks.qa: ")
    assert len(text.splitlines()) == (4 if case == "several" else 1)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with refused(DataError, "evaluate.tasks.qa: "):
        read_task(tmp_path / "qa.jsonl", encoder())
    with refused(DataError, "evaluate.tasks.qa: "):
        read_task(tmp_path, encoder())
    (tmp_path / "qa.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    with refused(DataError, "evaluate.tasks.qa: "):
        read_task(tmp_path / "qa.jsonl", encoder())


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    with refused(DataError, "evaluate.tasks.qa: "):
        read(tmp_path, without(ASK, "prompt", messages=CHAT))


def test_prompts_and_choices_are_encoded_as_in_training(tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    suite = read(tmp_path, PICK, without(PICK, choices=["or", "and not"]))
    assert suite.metrics == ("accuracy",)
    for item, second in zip(suite.items, ("and", "and not"), strict=True):
        assert tokenizer.decode(item.prompt.ids) == "To be,"
        assert item.choices is not None
        assert {text: tokenizer.decode(ids) for text, ids in item.choices.items()} == {
            "or": "or", second: second,
        }  # fmt: skip


def test_messages_end_with_the_generation_prompt(tmp_path: Path) -> None:
    messages = [*CHAT, {"role": "assistant", "content": "Or not."}, *CHAT]
    generated = read(tmp_path, without(ASK, "prompt", messages=messages), chat=True)
    chosen = read(tmp_path, without(PICK, "prompt", messages=messages), chat=True)
    tokenizer = tiny.tiny_tokenizer(chat=True)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for suite in (generated, chosen):
        assert tokenizer.decode(suite.items[0].prompt.ids) == expected
    assert chosen.items[0].choices is not None
    assert [tokenizer.decode(ids) for ids in chosen.items[0].choices.values()] == ["or", "and"]


def model(seed: int = 0) -> LocalTeacher:
    one = tiny.tiny_model(len(tiny.tiny_tokenizer()), seed=seed)
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return LocalTeacher(f"m{seed}", one, vocab_size=len(tiny.tiny_tokenizer()))


def test_the_likeliest_choice_is_chosen(tmp_path: Path) -> None:
    words = ["or", "and not", "to", "the question", "mind", "sea of"]
    rows = [
        {"prompt": f"To be{p}", "references": [words[n]], "choices": words[n : n + 3]}
        | {"metric": "accuracy"}
        for n in range(4)
        for p in (",", ", that is", " nobler in the mind")
    ]
    # Of one token each: the first one counts.
    letters = ["a", "b", "c", "d", "e", "f", "g", "h"]
    rows += [
        {"prompt": prompt, "references": ["a"], "choices": letters, "metric": "accuracy"}
        for prompt in ("To be", "mind", "sea of")
    ]
    suite, one = read(tmp_path, *rows), model()
    naive = []
    for item in suite.items:
        assert item.choices is not None
        totals = {}
        for text, ids in item.choices.items():
            whole = torch.tensor([[*item.prompt.ids, *ids]])
            logp = one.model(whole).logits[0].double().log_softmax(-1)
            start = len(item.prompt.ids) - 1
            totals[text] = sum(float(logp[start + i, token]) for i, token in enumerate(ids))
        naive.append(max(totals, key=lambda text: totals[text]))
    assert len({*naive}) > 1
    for batch_size in (1, 4, 99):
        decoding = Decoding(batch_size=batch_size)
        samples = answer_suite(SingleSource(one), suite, tiny.tiny_tokenizer(), decoding)
        assert [sample.text for sample in samples] == naive
    scores, domains = score_samples(suite, samples)
    hits = [answer == row["references"][0] for answer, row in zip(naive, rows, strict=True)]
    assert scores["accuracy"].value == pytest.approx(np.mean(hits))
    assert domains == {}
    # A fused target of one model twice is that model, whatever the weights.
    twice = [one, LocalTeacher("again", one.model, vocab_size=one.vocab_size)]
    source = FusedSource(Fusion(weighting=PrefixLikelihood()), twice)
    fused = answer_suite(source, suite, tiny.tiny_tokenizer(), Decoding())
    assert [sample.text for sample in fused] == naive


def test_a_prompt_with_a_domain_is_answered_by_the_teacher_of_the_domain(tmp_path: Path) -> None:
    teachers = [model(0), model(1)]
    source = FusedSource(Fusion(weighting=Route(default="m0", domains={"law": "m1"})), teachers)
    prompts = ("To be,", "To be nobler in the mind", "mind", "sea of")
    choices = ["a", "b", "c", "d", "e", "f", "g", "h"]
    ask = [ASK | {"prompt": prompt, "max_new_tokens": 6} for prompt in prompts]
    pick = [without(PICK, prompt=p, references=["a"], choices=choices) for p in prompts]
    for rows in (ask, pick):
        routed = [row | {"domain": "law"} for row in rows[:3]] + rows[3:]
        one, other, both = (
            [
                sample.text
                for sample in answer_suite(model, suite, tiny.tiny_tokenizer(), Decoding())
            ]
            for model, suite in (
                (SingleSource(teachers[0]), read(tmp_path, *rows)),
                (SingleSource(teachers[1]), read(tmp_path, *rows)),
                (source, read(tmp_path, *routed)),
            )
        )
        assert one[:3] != other[:3]
        assert both == [*other[:3], one[3]]


def test_an_answer_ends_at_a_stop_text(tmp_path: Path) -> None:
    one, tokenizer = model(), tiny.tiny_tokenizer()
    long = read(tmp_path, ASK | {"max_new_tokens": 12})
    (whole,) = answer_suite(SingleSource(one), long, tokenizer, Decoding())
    assert len(whole.tokens) == 12
    mark = whole.text[5:7]
    cut = read(tmp_path, ASK | {"max_new_tokens": 12, "stop": ["not in there", mark]})
    (short,) = answer_suite(SingleSource(one), cut, tokenizer, Decoding())
    assert short.text == whole.text[: whole.text.index(mark)].strip()


def documents(max_length: int, shuffle: bool) -> tuple[PackedDataset, list[Encoded]]:
    rng = np.random.default_rng(0)
    encoded = []
    for number in range(12):
        size = int(rng.integers(3, 40))
        is_target = np.arange(size) > 0
        encoded.append(Encoded(rng.integers(9, 300, size), is_target, np.ones(size, int), True))
        if number % 3 == 0:  # a chat: prompt, answer, question, answer
            size = int(rng.integers(12, 20))
            is_target = np.isin(np.arange(size), [4, 5, 6, 9, 10, 11])
            ids = rng.integers(9, 300, size)
            encoded.append(Encoded(ids, is_target, np.ones(size, int), False))
    domains = ["law" if number % 4 else "art" for number in range(len(encoded))]
    seed = 3 if shuffle else None
    return PackedDataset(encoded, max_length=max_length, domains=domains, order_seed=seed), encoded


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("max_length", [20, 23, 64])
def test_documents_are_put_together_from_their_windows(max_length: int, shuffle: bool) -> None:
    dataset, encoded = documents(max_length, shuffle)
    for (ids, is_target), document in zip(dataset.documents(), encoded, strict=True):
        np.testing.assert_array_equal(ids, document.ids)
        np.testing.assert_array_equal(is_target, document.is_target)


def test_continuations_of_texts_and_chats() -> None:
    dataset, encoded = documents(20, shuffle=True)
    tokenizer = tiny.tiny_tokenizer()
    options = GenerationOptions(prompt_tokens=7, max_new_tokens=5)
    items = {item.place: item for item in continuations(dataset, tokenizer, options, None).items}
    for number, document in enumerate(encoded):
        item = items.get(str(number))
        ids = document.ids.tolist()
        if document.can_split and len(ids) <= 7:
            assert item is None
            continue
        start, stop = (7, 12) if document.can_split else (4, 7)
        assert item is not None
        assert list(item.prompt.ids) == ids[:start]
        assert item.references == (tokenizer.decode(ids[start:stop]),)
        assert item.prompt.domain == ("law" if number % 4 else "art")


def test_continuations_alternate_over_the_domains_and_fit_the_models() -> None:
    dataset, _ = documents(20, shuffle=False)
    tokenizer = tiny.tiny_tokenizer()
    options = GenerationOptions(max_prompts=4, prompt_tokens=3, max_new_tokens=5)
    some = continuations(dataset, tokenizer, options, None)
    assert [item.prompt.domain for item in some.items] == ["art", "law"] * 2
    assert some.num_references == 1
    short = continuations(dataset, tokenizer, options, 8)
    assert max(item.num_tokens for item in short.items) == 8
    with refused(DataError, "evaluate.generation: "):
        continuations(dataset, tokenizer, options, 7)


def test_scores_by_domain_cover_all_texts() -> None:
    dataset, _ = documents(20, shuffle=False)
    tokenizer = tiny.tiny_tokenizer()
    options = GenerationOptions(prompt_tokens=3, max_new_tokens=6)
    suite = continuations(dataset, tokenizer, options, None)
    samples = answer_suite(SingleSource(model()), suite, tokenizer, Decoding())
    scores, domains = score_samples(suite, samples)
    assert set(domains) == {"art", "law"}
    for metric in ("rouge_l", "distinct_1"):
        parts = [domains[name][metric] for name in domains]
        total = sum(part.value * part.num_samples for part in parts if part.value is not None)
        assert scores[metric].value == pytest.approx(total / scores[metric].num_samples)
        assert scores[metric].num_samples == sum(part.num_samples for part in parts)


def test_the_examples_of_the_documentation_are_task_files(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lines = page.partition("```json\n")[2].partition("```")[0].splitlines()
    suites = [read(tmp_path, line, chat=True) for line in lines]
    assert [suite.metrics for suite in suites] == [
        ("exact_match", "token_f1"), ("accuracy",), ("entity_f1",),
    ]  # fmt: skip


def test_scorers_of_other_packages_are_imported_when_they_score() -> None:
    names = ["sacrebleu", "rouge_score", "lm_eval"]
    code = (
        "import sys, collegium.run.artifacts, collegium.run.harness, collegium.run.checks\n"
        f"print([name for name in {names} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
