"""Metrics of generated texts, each with its standard error and its number of samples.

A mean over samples has the standard error s / sqrt(n). BLEU and entity F1 are ratios of sums over
the corpus: their standard error is the standard deviation over bootstrap samples of the texts.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from collegium.errors import CollegiumError
from collegium.storage.records import MetricScore

NUM_BOOTSTRAP = 1000
"""Bootstrap samples of a corpus metric."""
BLEU_ORDER = 4
NO_ENTITY = "none"
"""Answer and reference without an entity."""
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True)
class TextSample:
    """One generated text and its references."""

    text: str
    tokens: Sequence[int]
    references: Sequence[str]


@dataclass(frozen=True, slots=True)
class TextMetric:
    """A metric of generated texts. `package` is the module that it needs, if any."""

    score: Callable[[Sequence[TextSample]], MetricScore]
    package: str | None = None


def mean_score(values: Sequence[float | None]) -> MetricScore:
    """Return the mean of n values and its standard error s / sqrt(n), leaving out None."""
    value_n = np.array([value for value in values if value is not None], np.float64)
    size = len(value_n)
    if size == 0:
        return MetricScore(value=None, stderr=None, num_samples=0)
    stderr = float(value_n.std(ddof=1) / math.sqrt(size)) if size > 1 else None
    return MetricScore(value=float(value_n.mean()), stderr=stderr, num_samples=size)


def bootstrap_score(
    counts_NS: NDArray[np.float64], score: Callable[[NDArray[np.float64]], float | None]
) -> MetricScore:
    """Score the sum (S,) of the counts of N texts, with the deviation of resampled sums.

    Source: Koehn 2004, "Statistical significance tests for machine translation evaluation".
    """
    size = len(counts_NS)
    value = score(counts_NS.sum(0)) if size else None
    stderr = None
    if size > 1 and value is not None:
        # The same texts for every model, so that their differences are those of the models.
        random = np.random.default_rng(0)
        sums = random.multinomial(size, np.full(size, 1 / size), NUM_BOOTSTRAP) @ counts_NS
        resampled = [one for one in map(score, sums) if one is not None]
        stderr = float(np.std(resampled, ddof=1))
    return MetricScore(value=value, stderr=stderr, num_samples=size)


def exact_match(text: str, reference: str) -> float:
    """Return 1 if the normalized answers are equal, else 0."""
    return float(_normalized(text) == _normalized(reference))


def token_f1(text: str, reference: str) -> float:
    """Return F1 of the bags of normalized words: 2 |A and B| / (|A| + |B|), 1 for two empty ones.

    Source: Rajpurkar et al. 2016, arXiv 1606.05250.
    """
    answer, expected = (Counter(_normalized(one).split()) for one in (text, reference))
    total = answer.total() + expected.total()
    return 2 * (answer & expected).total() / total if total else 1.0


def _normalized(text: str) -> str:
    """Return lower-case words without punctuation and English articles, as SQuAD compares them."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def distinct(tokens: Sequence[int], order: int) -> float | None:
    """Return the distinct n-grams of a text over all of them, None for a text without one.

    Source: Li et al. 2016, arXiv 1510.03055, here per text instead of over the corpus, whose value
    falls with its size.
    """
    grams = _ngrams(tokens, order)
    return len(set(grams)) / len(grams) if grams else None


def repetition(tokens: Sequence[int]) -> float | None:
    """Return the share of 4-grams that repeat an earlier one: 1 - distinct-4 of a text.

    Source: Welleck et al. 2020, arXiv 1908.04319 (seq-rep-4).
    """
    share = distinct(tokens, 4)
    return None if share is None else 1 - share


def _ngrams(tokens: Sequence[int], order: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[at : at + order]) for at in range(len(tokens) - order + 1)]


def entity_counts(text: str, reference: str) -> tuple[int, int, int]:
    """Return the entities in both texts, in the answer and in the reference.

    Entities such as `person: Ada Lovelace` are separated by semicolons or lines. Case and spaces
    do not count, and `none` is no entity.
    """
    answer, expected = (_entities(one) for one in (text, reference))
    return (answer & expected).total(), answer.total(), expected.total()


def _entities(text: str) -> Counter[str]:
    parts = (" ".join(part.lower().split()) for part in re.split(r"[;\n]", text))
    return Counter(part for part in parts if part not in ("", NO_ENTITY))


def _f1(counts_3: NDArray[np.float64] | Sequence[int]) -> float | None:
    both, answered, expected = counts_3
    # No entity anywhere leaves precision and recall without a value.
    return float(2 * both / (answered + expected)) if answered + expected else None


def _entity_f1(samples: Sequence[TextSample]) -> MetricScore:
    def best(sample: TextSample) -> tuple[int, int, int]:
        counts = [entity_counts(sample.text, reference) for reference in sample.references]
        # A reference without an entity is matched exactly by an answer without one.
        f1s = [_f1(one) for one in counts]
        return counts[np.argmax([1.0 if f1 is None else f1 for f1 in f1s])]

    counts = [best(sample) for sample in samples]
    return bootstrap_score(np.array(counts, np.float64).reshape(-1, 3), _f1)


def _bleu(samples: Sequence[TextSample]) -> MetricScore:
    """Corpus BLEU of sacrebleu, 0 to 100."""
    from sacrebleu.metrics.bleu import BLEU

    # Sentences give the counts that the corpus sums. Their own scores are not used.
    sentences = BLEU(effective_order=True)
    rows = []
    for sample in samples:
        one = sentences.sentence_score(sample.text, list(sample.references))
        rows.append([*one.counts, *one.totals, one.sys_len, one.ref_len])

    def score(sum_S: NDArray[np.float64]) -> float:
        counts = [int(value) for value in sum_S]
        correct, total = counts[:BLEU_ORDER], counts[BLEU_ORDER : 2 * BLEU_ORDER]
        return BLEU.compute_bleu(correct, total, counts[-2], counts[-1], smooth_method="exp").score

    counts_NS = np.array(rows, np.float64).reshape(-1, 2 * BLEU_ORDER + 2)
    return bootstrap_score(counts_NS, score)


def _rouge_l(samples: Sequence[TextSample]) -> MetricScore:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return mean_score(
        [scorer.score_multi(list(s.references), s.text)["rougeL"].fmeasure for s in samples]
    )


def _best_reference(
    score: Callable[[str, str], float], samples: Sequence[TextSample]
) -> MetricScore:
    return mean_score([max(score(s.text, ref) for ref in s.references) for s in samples])


def _of_tokens(
    score: Callable[[Sequence[int]], float | None], samples: Sequence[TextSample]
) -> MetricScore:
    return mean_score([score(sample.tokens) for sample in samples])


def _accuracy(samples: Sequence[TextSample]) -> MetricScore:
    return mean_score([float(sample.text in sample.references) for sample in samples])


TEXT_METRICS: Mapping[str, TextMetric] = {
    "accuracy": TextMetric(_accuracy),
    "exact_match": TextMetric(partial(_best_reference, exact_match)),
    "token_f1": TextMetric(partial(_best_reference, token_f1)),
    "entity_f1": TextMetric(_entity_f1),
    "bleu": TextMetric(_bleu, "sacrebleu"),
    "rouge_l": TextMetric(_rouge_l, "rouge_score"),
    "distinct_1": TextMetric(partial(_of_tokens, partial(distinct, order=1))),
    "distinct_2": TextMetric(partial(_of_tokens, partial(distinct, order=2))),
    "repetition": TextMetric(partial(_of_tokens, repetition)),
}
"""Name in a task file -> metric. All are shares in [0, 1], except for BLEU."""


def require_packages(metrics: Sequence[str], where: str) -> None:
    """Raise CollegiumError if a package that a metric needs is not installed."""
    for name in metrics:
        package = TEXT_METRICS[name].package
        if package is not None and find_spec(package) is None:
            raise CollegiumError(
                f"{where}: the metric `{name}` needs the package {package}; must be installed; run "
                "`pip install 'collegium[tasks]'`"
            )


def signatures(metrics: Sequence[str], num_references: int | None) -> dict[str, str]:
    """Return how metrics of other packages were computed, by name.

    `num_references` is the number of references of each text, None if it varies.
    """
    from importlib.metadata import version

    lines = {}
    if "bleu" in metrics:
        from sacrebleu.metrics.bleu import BLEU

        bleu = BLEU()
        bleu.num_refs = num_references or -1
        lines["bleu"] = bleu.get_signature().format()
    if "rouge_l" in metrics:
        lines["rouge_l"] = f"rouge-score {version('rouge-score')}, rougeL F1, without stemming"
    return lines
