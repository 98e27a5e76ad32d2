"""Tables of generated text: continuations, tasks, and lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from collegium.report import formats as form
from collegium.report.colors import row_color
from collegium.report.run_files import CONTINUATION, RunFiles
from collegium.report.run_tables import GROUPS
from collegium.report.tables import Column, Line, Table
from collegium.storage.records import MetricScore, TaskRow

TITLES = {
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "token_f1": "token F1",
    "entity_f1": "entity F1",
    "bleu": "BLEU",
    # It drops all letters beyond a to z and 0 to 9, and rewards overlap, not meaning.
    "rouge_l": "ROUGE-L (legacy)",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "repetition": "repetition",
}
Scores = Mapping[tuple[str, str], MetricScore]
"""(suite, metric) -> score of one model."""


def score_text(score: MetricScore | None, factor: float = 100.0) -> str:
    """Format a score with its standard error: `38.2 ± 1.4`."""
    if score is None or score.value is None:
        return form.MISSING
    text = form.fixed(factor * score.value, 1)
    return text if score.stderr is None else f"{text} ± {form.fixed(factor * score.stderr, 1)}"


def task_table(run: RunFiles) -> Table[Scores]:
    """Return the scores of all models on all suites. Shares are in percent."""
    models: dict[str, TaskRow] = {}
    scores: dict[str, dict[tuple[str, str], MetricScore]] = {}
    for suite, results in run.suites.items():
        for row in results.rows:
            models.setdefault(row.name, row)
            new = scores.setdefault(row.name, {})
            new |= {(suite, metric): score for metric, score in row.scores.items()}
    colors = {row.name: row_color(row, run) for row in run.results or ()}
    lines: list[Line[Scores]] = []
    for kind, group in GROUPS:
        of_kind = [row for row in models.values() if row.kind == kind]
        for row in of_kind:
            heading = group if row is of_kind[0] else ""
            own: Scores = scores[row.name]
            color, is_marked = colors.get(row.name, ""), kind == "student"
            lines.append(Line(row.title, own, color, heading, is_marked=is_marked))
    title = "Generated text and tasks (± one standard error, n texts)"
    return Table(title, "Model", _columns(lines), lines)


def domain_score_table(run: RunFiles) -> Table[Scores]:
    """Return the scores of the continuations of each domain."""
    results = run.suites.get(CONTINUATION)
    lines: list[Line[Scores]] = [
        Line(f"{row.title}, {domain}", {(CONTINUATION, metric): own[metric] for metric in own})
        for row in (results.rows if results else ())
        for domain, own in row.domains.items()
    ]
    title = f"Continuations by domain, {len(lines)} rows"
    return Table(title, "Model and domain", _columns(lines), lines)


def _columns(lines: Sequence[Line[Scores]]) -> list[Column[Scores]]:
    keys = dict.fromkeys(key for line in lines for key in line.row)
    return [_column(key, [line.row[key] for line in lines if key in line.row]) for key in keys]


def _column(key: tuple[str, str], scores: Sequence[MetricScore]) -> Column[Scores]:
    suite, metric = key
    sizes = sorted({score.num_samples for score in scores})
    size = " to ".join(form.whole(n) for n in dict.fromkeys((sizes[0], sizes[-1])))
    unit = "" if metric == "bleu" else ", %"
    write = partial(score_text, factor=1.0 if metric == "bleu" else 100.0)
    name = TITLES.get(metric, metric) + unit
    # A terminal is narrow, and the other metrics of continuations occur nowhere else.
    place = "" if suite == CONTINUATION else f"{suite}\n"
    short = f"{place}{name}\nn = {size}".replace(" (", "\n(")
    count = f"(n = {size})".replace(" ", "\N{NO-BREAK SPACE}")
    return Column(f"{suite}: {name} {count}", lambda own: own.get(key), write, short=short)


def task_notes(run: RunFiles) -> Iterator[str]:
    """Yield the reasons for missing scores, and the signatures of the metrics."""
    reasons = dict.fromkeys(
        f"{row.name}: no text, since {row.note}"
        for results in run.suites.values()
        for row in results.rows
        if row.note is not None
    )
    yield from reasons
    for suite, results in run.suites.items():
        for metric, text in results.signatures.items():
            yield f"{suite}: {TITLES.get(metric, metric)}: {text}"
    if run.suites.get(CONTINUATION):
        yield (
            "continuation: each model continues the start of held-out documents; distinct-n and "
            "repetition (repeated 4-grams) are means over texts, in tokens"
        )


def harness_table(run: RunFiles) -> Table[MetricScore]:
    """Return the student's scores by lm-evaluation-harness."""
    tasks = {} if run.harness is None else run.harness.tasks
    lines = [
        Line(f"{task}: {metric}", score)
        for task, scores in tasks.items()
        for metric, score in scores.items()
    ]
    columns: list[Column[MetricScore]] = [
        Column("Value", "value", partial(form.fixed, digits=4)),
        Column("Standard error", "stderr", partial(form.fixed, digits=4)),
        Column("n", "num_samples", form.whole),
    ]
    version = "" if run.harness is None else f" {run.harness.version}"
    return Table(f"lm-evaluation-harness{version}, student", "Task and metric", columns, lines)
