"""Metrics of generated texts, against naive references."""

from __future__ import annotations

import math
import random
import re

import numpy as np
import pytest

from collegium.errors import CollegiumError
from collegium.evaluate import text_metrics
from collegium.evaluate.text_metrics import (
    TEXT_METRICS,
    TextSample,
    bootstrap_score,
    mean_score,
    require_packages,
    signatures,
)
from refusals import refused

WORDS = ["the", "cat", "sat", "on", "a", "mat", "An", "Cat,", "dog!", "ran"]


def score(metric: str, *samples: TextSample) -> float | None:
    return TEXT_METRICS[metric].score(samples).value


def words(rng: random.Random, most: int = 8) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(0, most)))


def squad_words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def naive_f1(text: str, reference: str) -> float:
    answer, rest = squad_words(text), squad_words(reference)
    if not answer and not rest:
        return 1.0
    common = 0
    size = len(rest)
    for word in answer:
        if word in rest:
            rest.remove(word)
            common += 1
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / size
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("seed", range(20))
def test_token_f1_and_exact_match(seed: int) -> None:
    rng = random.Random(seed)
    samples = [TextSample(words(rng, 4), [], [words(rng, 4), words(rng, 4)]) for _ in range(9)]
    f1 = [max(naive_f1(s.text, reference) for reference in s.references) for s in samples]
    assert score("token_f1", *samples) == pytest.approx(sum(f1) / 9, abs=1e-12)
    same = [any(squad_words(s.text) == squad_words(r) for r in s.references) for s in samples]
    assert score("exact_match", *samples) == pytest.approx(sum(same) / 9, abs=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_entity_f1(seed: int) -> None:
    rng = random.Random(seed)
    names = ["person: Ada", "PERSON:  ada", "place: Rome", "place:Oslo", "none", ""]

    def some() -> str:
        return rng.choice(["; ", ";", "\n"]).join(rng.choices(names, k=rng.randint(1, 4)))

    samples = [TextSample(some(), [], [some()]) for _ in range(7)]
    both = answered = expected = 0
    for sample in samples:
        parts = [
            [re.sub(r"\s+", " ", p).strip().lower() for p in re.split("[;\n]", text)]
            for text in (sample.text, sample.references[0])
        ]
        answer, rest = ([p for p in part if p and p != "none"] for part in parts)
        answered, expected = answered + len(answer), expected + len(rest)
        for entity in answer:
            if entity in rest:
                rest.remove(entity)
                both += 1
    naive = 2 * both / (answered + expected) if answered + expected else None
    assert score("entity_f1", *samples) == pytest.approx(naive)


def test_entity_f1_takes_the_closest_reference_and_counts_entities_not_texts() -> None:
    first = TextSample("a: x; a: y; a: z", [], ["none", "a: x; a: y; a: z"])
    assert score("entity_f1", first) == 1.0
    second = TextSample("b: w", [], ["b: v"])
    assert score("entity_f1", first, second) == pytest.approx(2 * 3 / (4 + 4))
    assert score("entity_f1", TextSample("none", [], ["none", "a: x"])) is None


@pytest.mark.parametrize("seed", range(20))
def test_distinct_and_repetition(seed: int) -> None:
    rng = random.Random(seed)
    samples = [
        TextSample("", [rng.randint(0, 3) for _ in range(rng.randint(0, 14))], []) for _ in range(6)
    ]
    for order, name in ((1, "distinct_1"), (2, "distinct_2"), (4, "repetition")):
        shares = []
        for sample in samples:
            seen: list[list[int]] = []
            total = repeated = 0
            for at in range(len(sample.tokens)):
                gram = list(sample.tokens[at : at + order])
                if len(gram) == order:
                    total += 1
                    repeated += gram in seen
                    seen.append(gram)
            if total:
                shares.append(repeated / total if name == "repetition" else 1 - repeated / total)
        got = TEXT_METRICS[name].score(samples)
        assert got.num_samples == len(shares)
        assert got.value == pytest.approx(sum(shares) / len(shares), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_bleu_is_that_of_sacrebleu(seed: int) -> None:
    from sacrebleu.metrics.bleu import BLEU

    rng = random.Random(seed)
    samples = [TextSample(words(rng), [], [words(rng), words(rng)]) for _ in range(12)]
    samples.append(TextSample("the cat sat on the mat", [], ["the cat sat on a mat", "x"]))
    bleu = BLEU()
    streams = [[s.references[i] for s in samples] for i in range(2)]
    theirs = bleu.corpus_score([s.text for s in samples], streams)
    assert score("bleu", *samples) == pytest.approx(theirs.score, abs=1e-9)
    # Without a common 4-gram the score is smoothed.
    (smooth,) = [TextSample("the cat sat in", [], ["the cat sat on", "the cat ran"])]
    exact = bleu.sentence_score(smooth.text, list(smooth.references)).score
    assert 0 < exact == pytest.approx(score("bleu", smooth))
    bleu = BLEU()
    bleu.corpus_score([s.text for s in samples], streams)
    assert signatures(["bleu", "accuracy"], 2) == {"bleu": bleu.get_signature().format()}
    assert "nrefs:2" in bleu.get_signature().format()


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    samples = [TextSample("the cat sat", [], ["the sat", "dogs"]), TextSample("ran", [], ["a cat"])]
    # LCS 2 of 3 and 2 words: F1 = 2 * (2/3) * 1 / (5/3) = 0.8.
    assert score("rouge_l", *samples) == pytest.approx(0.4)
    assert "rouge-score" in signatures(["rouge_l"], 1)["rouge_l"]


def test_the_standard_error_of_a_mean() -> None:
    got = mean_score([1.0, 0.0, None, 0.0, 1.0])
    assert (got.value, got.num_samples) == (0.5, 4)
    # s^2 = 4 * 0.25 / 3
    assert got.stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    assert mean_score([0.3]).stderr is None
    assert mean_score([None]).value is None


def test_the_bootstrap_of_a_mean_has_the_standard_error_of_the_mean() -> None:
    rng = np.random.default_rng(1)
    value_N = rng.normal(size=400)
    counts_NS = np.stack([value_N, np.ones(400)], axis=1)
    got = bootstrap_score(counts_NS, lambda sum_S: float(sum_S[0] / sum_S[1]))
    exact = mean_score(value_N.tolist())
    assert got.value == pytest.approx(exact.value)
    # 1,000 bootstrap samples give a deviation to within 1 / sqrt(2,000), at 4 of them.
    assert got.stderr == pytest.approx(exact.stderr, rel=4 / math.sqrt(2000))
    assert bootstrap_score(counts_NS, lambda sum_S: float(sum_S[0] / sum_S[1])) == got
    assert bootstrap_score(counts_NS[:1], lambda sum_S: float(sum_S[0])).stderr is None


def test_a_metric_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    require_packages([*TEXT_METRICS], "evaluate.tasks.qa")
    monkeypatch.setattr(text_metrics, "find_spec", lambda name: None)
    require_packages(["accuracy", "distinct_1"], "evaluate.tasks.qa")
    with refused(CollegiumError, "evaluate.tasks.qa: "):
        require_packages(["bleu"], "evaluate.tasks.qa")
