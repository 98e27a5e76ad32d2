"""The tables of a study: one line per setting, mean ± standard deviation over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from collegium.report.formats import MISSING, fixed, perplexity
from collegium.study.figures import by_setting, measure_label
from collegium.study.measurements import Summary, summarize
from collegium.study.sweep import Row

LOW_IS_GOOD = (
    "fused_nll",
    "student_nll",
    "student_perplexity",
    "student_kl",
    "calibration_nll",
    "regret",
)
COARSE = ("bytes_per_token", "train_seconds", "tokens_per_s")
"""Measures of few digits."""


@dataclass(frozen=True)
class StudyTable:
    """A table as text: a title, headings, and lines whose first cell names them."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    best: tuple[int | None, ...]
    """Of each column but the first, the line with the lowest mean; None where low is not good."""

    def markdown(self) -> str:
        """As Markdown; the best of a column is bold."""
        head = [f"| {' | '.join(self.columns)} |", "|" + "---|" + "---:|" * (len(self.columns) - 1)]
        body = []
        for number, line in enumerate(self.lines):
            marks = [
                f"**{cell}**" if at == number else cell
                for cell, at in zip(line[1:], self.best, strict=True)
            ]
            body.append("| " + " | ".join([line[0].replace("|", "\\|"), *marks]) + " |")
        return "\n".join([*head, *body])


def setting_table(
    rows: Sequence[Row], measures: Sequence[str], factors: Sequence[str]
) -> StudyTable:
    """One line per setting, one column per measure."""
    groups = by_setting(rows, factors)
    found = [[summarize(group, measure) for measure in measures] for group in groups.values()]
    lines = tuple(
        (name, *(cell(measure, one) for measure, one in zip(measures, summaries, strict=True)))
        for name, summaries in zip(groups, found, strict=True)
    )
    best = tuple(
        _lowest(measure, [line[at] for line in found]) for at, measure in enumerate(measures)
    )
    columns = (" · ".join(factors), *(measure_label(measure) for measure in measures))
    return StudyTable("All settings", columns, lines, best)


def pivot_table(rows: Sequence[Row], measure: str, *, down: str, across: str) -> StudyTable:
    """One measure of two factors: the levels of one go down, those of the other across."""
    downs = list(dict.fromkeys(row["levels"][down] for row in rows if down in row["levels"]))
    acrosses = list(dict.fromkeys(row["levels"][across] for row in rows if across in row["levels"]))

    def at(one: str, other: str) -> Summary:
        return summarize(
            [r for r in rows if r["levels"].get(down) == one and r["levels"].get(across) == other],
            measure,
        )

    found = [[at(one, other) for other in acrosses] for one in downs]
    lines = tuple(
        (one, *(cell(measure, summary) for summary in line))
        for one, line in zip(downs, found, strict=True)
    )
    best = tuple(_lowest(measure, [line[i] for line in found]) for i in range(len(acrosses)))
    return StudyTable(measure_label(measure), (f"{down} \\ {across}", *acrosses), lines, best)


def cell(measure: str, found: Summary) -> str:
    """`4.768 ± 0.012`, the deviation where there are seeds to have one."""
    name = measure.partition("@")[0]
    digits = 1 if name in COARSE else 3
    if found.mean is None:
        return MISSING
    if name == "student_perplexity":
        text, digits = perplexity(found.mean), 1
    else:
        text = fixed(found.mean, digits)
    return text if found.deviation is None else f"{text} ± {fixed(found.deviation, digits)}"


def _lowest(measure: str, column: Sequence[Summary]) -> int | None:
    if measure.partition("@")[0] not in LOW_IS_GOOD:
        return None
    known = {number: one.mean for number, one in enumerate(column) if one.mean is not None}
    return min(known, key=lambda number: known[number]) if len(known) > 1 else None
