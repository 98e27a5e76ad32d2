"""Tables of a study: one line per setting, mean ± standard deviation over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from collegium.report.formats import MISSING, fixed, perplexity
from collegium.study.figures import by_setting, measure_label
from collegium.study.measurements import Summary, summarize
from collegium.study.sweep import StudyRow

LOWER_IS_BETTER = (
    "fused_nll",
    "student_nll",
    "student_perplexity",
    "student_kl",
    "calibration_nll",
    "regret",
)
COARSE = ("bytes_per_token", "train_seconds", "tokens_per_s")
"""Measures written with one decimal."""


@dataclass(frozen=True)
class StudyTable:
    """A table as text: a title, column headings, and lines that start with their name."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    best: tuple[int | None, ...]
    """Per column but the first, the line with the lowest mean. None unless lower is better."""

    def markdown(self) -> str:
        """Render as Markdown, with the best of each column in bold."""
        head = [f"| {' | '.join(self.columns)} |", "|" + "---|" + "---:|" * (len(self.columns) - 1)]
        body = []
        for number, line in enumerate(self.lines):
            marks = [
                f"**{cell}**" if best == number else cell
                for cell, best in zip(line[1:], self.best, strict=True)
            ]
            # A bar in a setting's name would split its cell.
            body.append("| " + " | ".join([line[0].replace("|", "\\|"), *marks]) + " |")
        return "\n".join([*head, *body])


def setting_table(
    rows: Sequence[StudyRow], measures: Sequence[str], factors: Sequence[str]
) -> StudyTable:
    """Return a table with one line per setting and one column per measure."""
    groups = by_setting(rows, factors)
    table = [[summarize(group, measure) for measure in measures] for group in groups.values()]
    lines = tuple(
        (name, *(cell(measure, value) for measure, value in zip(measures, summaries, strict=True)))
        for name, summaries in zip(groups, table, strict=True)
    )
    best = tuple(
        _lowest(measure, [line[i] for line in table]) for i, measure in enumerate(measures)
    )
    columns = (" · ".join(factors), *(measure_label(measure) for measure in measures))
    return StudyTable("All settings", columns, lines, best)


def pivot_table(rows: Sequence[StudyRow], measure: str, *, down: str, across: str) -> StudyTable:
    """Return one measure of two factors, with a line per `down` level and a column per `across`."""
    downs = list(dict.fromkeys(row["levels"][down] for row in rows if down in row["levels"]))
    acrosses = list(dict.fromkeys(row["levels"][across] for row in rows if across in row["levels"]))

    def at(y: str, x: str) -> Summary:
        return summarize(
            [r for r in rows if r["levels"].get(down) == y and r["levels"].get(across) == x],
            measure,
        )

    table = [[at(y, x) for x in acrosses] for y in downs]
    lines = tuple(
        (y, *(cell(measure, summary) for summary in line))
        for y, line in zip(downs, table, strict=True)
    )
    best = tuple(_lowest(measure, [line[i] for line in table]) for i in range(len(acrosses)))
    return StudyTable(measure_label(measure), (f"{down} \\ {across}", *acrosses), lines, best)


def cell(measure: str, summary: Summary) -> str:
    """Format as `4.768 ± 0.012`, without the deviation if there is only one seed."""
    name = measure.partition("@")[0]
    digits = 1 if name in COARSE else 3
    if summary.mean is None:
        return MISSING
    if name == "student_perplexity":
        text, digits = perplexity(summary.mean), 1
    else:
        text = fixed(summary.mean, digits)
    return text if summary.deviation is None else f"{text} ± {fixed(summary.deviation, digits)}"


def _lowest(measure: str, column: Sequence[Summary]) -> int | None:
    if measure.partition("@")[0] not in LOWER_IS_BETTER:
        return None
    means = {i: summary.mean for i, summary in enumerate(column) if summary.mean is not None}
    return min(means, key=lambda i: means[i]) if len(means) > 1 else None
