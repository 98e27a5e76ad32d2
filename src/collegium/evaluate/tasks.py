"""Suites of prompts: held-out continuations, and tasks in JSONL files.

A line of a task file has `prompt` or `messages`, `references` and `metric`:

    {"prompt": "Q: Capital of Italy?\nA:", "references": ["Rome"], "metric": "exact_match"}

The metric is a name or a list of names, the same in every line. `accuracy` needs `choices`, and the
model chooses the one with the highest log-probability after the prompt. Other metrics generate
text: up to `max_new_tokens` (default 64), and up to the first of the strings in `stop`. `domain`
is the domain of the prompt, for weights by domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collegium.console import OnProgress
from collegium.data.collate import Collator
from collegium.data.documents import Document, parse_rows
from collegium.data.encode import Encoder
from collegium.data.readers import SourceOptions, read_rows, show
from collegium.data.sources import raise_refused
from collegium.data.windows import PackedDataset
from collegium.errors import DataError, nearest
from collegium.evaluate.generation import Decoding, Prompt, TextSource, generate
from collegium.evaluate.options import GenerationOptions
from collegium.evaluate.text_metrics import TEXT_METRICS, TextSample, require_packages
from collegium.models.loading import choose_device
from collegium.storage.records import MetricScore
from collegium.types import Batch, domain_number

CONTINUATION_METRICS = ("bleu", "rouge_l", "distinct_1", "distinct_2", "repetition")
TASK_METRICS = ("accuracy", "exact_match", "token_f1", "entity_f1", "bleu", "rouge_l")
MAX_NEW_TOKENS = 64
"""Default of a line of a task file."""
_KEYS = (
    "prompt", "messages", "references", "metric", "choices", "max_new_tokens", "stop", "domain",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SuiteItem:
    """A prompt and the answers that it is compared with."""

    place: str
    """The document or line that it comes from."""
    prompt: Prompt
    references: tuple[str, ...]
    stop: tuple[str, ...] = ()
    """Strings at which an answer ends."""
    choices: Mapping[str, tuple[int, ...]] | None = None
    """Text of each choice -> its tokens."""

    @property
    def num_tokens(self) -> int:
        """Length of the longest text that a model reads."""
        choices = (self.choices or {}).values()
        return len(self.prompt.ids) + max(map(len, choices), default=self.prompt.max_new_tokens)


@dataclass(frozen=True, slots=True)
class Suite:
    """Prompts that are scored by the same metrics."""

    metrics: tuple[str, ...]
    items: Sequence[SuiteItem]

    @property
    def num_references(self) -> int | None:
        """References of each item, None if their number varies."""
        sizes = {len(item.references) for item in self.items}
        return sizes.pop() if len(sizes) == 1 else None


def continuations(
    dataset: PackedDataset, tokenizer: Any, options: GenerationOptions, max_tokens: int | None
) -> Suite:
    """Cut held-out documents into a prompt and its continuation, evenly over the domains.

    Documents without text after the prompt, or of more than `max_tokens` tokens with their
    continuation, are skipped.

    Raises:
        DataError: none is left.
    """
    num_too_long = 0
    by_domain: dict[str, list[SuiteItem]] = {name: [] for name in dataset.domains}
    for number, (ids, is_target) in enumerate(dataset.documents()):
        start = int(is_target.argmax())
        # All tokens of a text but the first are targets.
        start = options.prompt_tokens if start <= 1 else start
        end = start + _run_length(is_target[start:])
        limit = options.max_new_tokens
        reference = tokenizer.decode(ids[start : min(end, start + limit)], skip_special_tokens=True)
        if max_tokens is not None and start + limit > max_tokens:
            num_too_long += 1
            continue
        if not reference.strip():
            continue
        domain = dataset.domains[dataset.sample_domains[number]]
        prompt = Prompt(tuple(ids[:start].tolist()), limit, domain, dataset.teacher_of(number))
        by_domain[domain].append(SuiteItem(dataset.sample_names[number], prompt, (reference,)))
    in_turn = chain.from_iterable(zip_longest(*by_domain.values()))
    items = [item for item in in_turn if item is not None][: options.max_prompts]
    if not items:
        too_long = f" ({num_too_long:,} exceed the {max_tokens} positions of a model with it)"
        raise DataError(
            f"evaluate.generation: got no document of the validation split with a continuation "
            f"after {options.prompt_tokens} tokens{too_long if num_too_long else ''}; must have at "
            "least one; lower prompt_tokens or max_new_tokens"
        )
    return Suite(CONTINUATION_METRICS, items)


def _run_length(is_target: np.ndarray) -> int:
    """Number of targets before the first token that is none."""
    return len(is_target) if is_target.all() else int(is_target.argmin())


def read_task(path: Path, encoder: Encoder) -> Suite:
    """Read a task file and encode its prompts.

    Raises:
        DataError: the file cannot be read, or a line cannot be used.
        CollegiumError: a metric needs a package that is not installed.
    """
    where = encoder.where
    options = SourceOptions(path=str(path), format="jsonl")
    if not path.is_file():
        raise DataError(f"{where}: {path}: no such file; must be a JSONL file")
    lines: list[_Line] = []
    errors: list[str] = []
    num_rows = 0
    for number, row in read_rows(path, options, where=where):
        num_rows += 1
        place = f"{where}: {path.name}:{number}"
        try:
            if isinstance(row, DataError):
                raise row
            lines.append(_Line.of(row, place))
        except DataError as error:
            errors.append(str(error))
    raise_refused(errors, num_rows, where=where)
    if not lines:
        raise DataError(f"{where}: {path}: got no line; must have at least one")
    metrics = lines[0].metrics
    for line in lines:
        if line.metrics != metrics:
            raise DataError(
                f"{line.place}: `metric` is {_joined(line.metrics)}, that of the first line "
                f"{_joined(metrics)}; must be the same in every line; use one file per metric"
            )
    require_packages(metrics, where)
    return Suite(metrics, _encode(lines, encoder))


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a task file."""

    place: str
    prompt: str | list[Any]
    references: tuple[str, ...]
    metrics: tuple[str, ...]
    choices: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    domain: str | None

    @classmethod
    def of(cls, row: object, place: str) -> _Line:
        """Check a line. Raises DataError."""
        if not isinstance(row, Mapping):
            raise DataError(f"{place}: got {show(row)}; must be an object with named fields")
        for key in row:
            if key not in _KEYS:
                raise DataError(f"{place}: unknown key `{key}`{nearest(key, _KEYS)}")
        prompt = prompt_of(row, place)
        metrics = _strings(row, "metric", place)
        for name in metrics:
            if name not in TASK_METRICS:
                raise DataError(f"{place}: unknown metric `{name}`{nearest(name, TASK_METRICS)}")
        references = _strings(row, "references", place)
        choices = _choices(row, metrics, references, place)
        limit = row.get("max_new_tokens", MAX_NEW_TOKENS)
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise DataError(f"{place}: `max_new_tokens` is {show(limit)}; must be at least 1")
        stop = _strings(row, "stop", place) if "stop" in row else ()
        domain = row.get("domain")
        if "domain" in row and not (isinstance(domain, str) and domain):
            raise DataError(f"{place}: `domain` is {show(domain)}; must be the name of a domain")
        return cls(place, prompt, references, metrics, choices, limit, stop, domain)

    @property
    def name(self) -> str:
        """File and line."""
        return self.place.rpartition(": ")[2]

    def documents(self) -> Iterator[Document | DataError | None]:
        """Yield the prompt with each choice, or with the first reference."""
        where = self.place.removesuffix(f": {self.name}")
        options = SourceOptions(path=self.name)
        for text in self.choices or self.references[:1]:
            row: dict[str, Any] = {"prompt": self.prompt, "completion": text}
            if isinstance(self.prompt, list):
                # Earlier turns of the assistant are context.
                answer = {"role": "assistant", "content": text}
                row = {"messages": [*map(_as_context, self.prompt), answer]}
            yield from parse_rows([(None, row)], self.name, options, domain="", where=where)


def prompt_of(row: Mapping[str, Any], place: str) -> str | list[Any]:
    """Return the text or the chat to continue, or raise DataError."""
    if ("prompt" in row) == ("messages" in row):
        both = "both" if "prompt" in row else "neither"
        raise DataError(f"{place}: got {both} of `prompt` and `messages`; must have one")
    if "prompt" in row and not (isinstance(row["prompt"], str) and row["prompt"].strip()):
        raise DataError(f"{place}: `prompt` is {show(row['prompt'])}; must be a text")
    if "messages" in row and not (isinstance(row["messages"], list) and row["messages"]):
        raise DataError(
            f"{place}: `messages` is {show(row['messages'])}; must be a list of role and content"
        )
    return row["prompt"] if "prompt" in row else row["messages"]


def _as_context(message: Any) -> Any:
    is_answer = isinstance(message, Mapping) and message.get("role") == "assistant"
    return {**message, "weight": 0} if is_answer else message


def _strings(row: Mapping[str, Any], key: str, place: str) -> tuple[str, ...]:
    """Return a list of different texts, which may be given as one text."""
    value: Any = row.get(key)
    values: list[Any] = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, str) and one for one in values):
        got = f"is {show(value)}" if key in row else "is missing"
        raise DataError(f"{place}: `{key}` {got}; must be a text or a list of texts, none empty")
    if key == "references" and not all(one.strip() for one in values):
        raise DataError(f"{place}: `references` has a blank text; must have words")
    if len({*values}) < len(values):
        raise DataError(f"{place}: `{key}` names a text twice; must be different; remove one")
    return tuple(values)


def _choices(
    row: Mapping[str, Any], metrics: Sequence[str], references: Sequence[str], place: str
) -> tuple[str, ...]:
    if "accuracy" not in metrics:
        if "choices" in row:
            raise DataError(
                f"{place}: got `choices` with {_joined(metrics)}; must go with the metric "
                "`accuracy`; remove them"
            )
        return ()
    if len(metrics) > 1:
        raise DataError(
            f"{place}: `metric` is {_joined(metrics)}; must be `accuracy` only, which generates no "
            "text; use another file for the others"
        )
    for key in ("max_new_tokens", "stop"):
        if key in row:
            raise DataError(
                f"{place}: got `{key}` with `accuracy`, which generates no text; must be omitted; "
                "remove it"
            )
    choices = _strings(row, "choices", place)
    if len(choices) < 2:
        raise DataError(f"{place}: `choices` has one text; must have at least two")
    for reference in references:
        if reference not in choices:
            raise DataError(
                f"{place}: `references` has {show(reference)}; must be one of the choices, "
                "letter by letter"
            )
    return choices


def _joined(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _encode(lines: Sequence[_Line], encoder: Encoder) -> list[SuiteItem]:
    """Encode prompts and choices as documents are encoded for training."""
    documents = [list(line.documents()) for line in lines]
    errors = [str(one) for one in chain.from_iterable(documents) if isinstance(one, DataError)]
    raise_refused(errors, len(lines), where=encoder.where)
    flat = [one for one in chain.from_iterable(documents) if isinstance(one, Document)]
    outcomes = list(encoder.encode(flat))
    refused = [one.error for one in outcomes if one.error]
    raise_refused(refused, len(outcomes), where=encoder.where)
    encoded = (one.encoded for one in outcomes)
    items = []
    for line, of_line in zip(lines, documents, strict=True):
        parts = [one for one in islice(encoded, len(of_line)) if one is not None]
        # A token across the border to the answer is part of the answer.
        first = min(int(one.is_target.argmax()) for one in parts)
        # The last target is the stop token.
        answers = [one.ids[first : one.is_target.nonzero()[0][-1]].tolist() for one in parts]
        choices = (
            dict(zip(line.choices, map(tuple, answers), strict=True)) if line.choices else None
        )
        prompt = Prompt(tuple(parts[0].ids[:first].tolist()), line.max_new_tokens, line.domain)
        items.append(SuiteItem(line.name, prompt, line.references, line.stop, choices))
    return items


def answer_suite(
    source: TextSource,
    suite: Suite,
    tokenizer: Any,
    decoding: Decoding,
    progress: OnProgress | None = None,
) -> list[TextSample]:
    """Return the answer of a model to each prompt: its choice, or a generated text.

    Raises:
        ModelError: the model gives NaN.
    """
    items = suite.items
    if items[0].choices is not None:
        return _choose(source, items, decoding.batch_size, progress)
    texts = generate(source, [item.prompt for item in items], decoding, progress)
    samples = []
    for item, ids in zip(items, texts, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        ends = [at for mark in item.stop if (at := text.find(mark)) >= 0]
        text = text[: min(ends, default=len(text))].strip()
        samples.append(TextSample(text, ids, item.references))
    return samples


def _choose(
    source: TextSource, items: Sequence[SuiteItem], batch_size: int, progress: OnProgress | None
) -> list[TextSample]:
    """Choose the text of the highest log-probability, summed over its tokens."""
    pairs = [(n, text, ids) for n, item in enumerate(items) for text, ids in _choices_of(item)]
    best: dict[int, tuple[float, str, tuple[int, ...]]] = {}
    if progress is not None:
        progress(0, len(pairs))
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        rows = [_choice_row(items[n].prompt, ids) for n, _, ids in part]
        batch = Batch.from_inputs(Collator()(rows)).to(choose_device("auto"))
        all_rows = batch.rows()
        with torch.no_grad():
            logp_N = source.label_logp(batch, all_rows)
        # Prompts are read with their labels: weights may depend on earlier tokens.
        place_N = all_rows.index % batch.input_ids.shape[1] + 1
        for number, (n, text, ids) in enumerate(part):
            is_choice_N = (all_rows.samples == number) & (place_N >= len(items[n].prompt.ids))
            total = float(logp_N[is_choice_N].double().sum())
            if n not in best or total > best[n][0]:
                best[n] = total, text, ids
        if progress is not None:
            progress(min(start + batch_size, len(pairs)), len(pairs))
    return [TextSample(best[n][1], best[n][2], item.references) for n, item in enumerate(items)]


def _choice_row(prompt: Prompt, ids: Sequence[int]) -> dict[str, object]:
    whole = [*prompt.ids, *ids]
    domain = 0 if prompt.domain is None else domain_number(prompt.domain)
    return {"input_ids": whole, "labels": whole, "domain_ids": [domain] * len(whole)}


def _choices_of(item: SuiteItem) -> Iterator[tuple[str, tuple[int, ...]]]:
    assert item.choices is not None
    yield from item.choices.items()


def score_samples(
    suite: Suite, samples: Sequence[TextSample]
) -> tuple[dict[str, MetricScore], dict[str, dict[str, MetricScore]]]:
    """Return the scores of all samples, and those of each domain if there are several."""
    by_domain: dict[str, list[TextSample]] = {}
    for item, sample in zip(suite.items, samples, strict=True):
        if item.prompt.domain is not None:
            by_domain.setdefault(item.prompt.domain, []).append(sample)

    def scores(some: Sequence[TextSample]) -> dict[str, MetricScore]:
        return {name: TEXT_METRICS[name].score(some) for name in suite.metrics}

    domains = by_domain if len(by_domain) > 1 else {}
    return scores(samples), {name: scores(some) for name, some in sorted(domains.items())}
