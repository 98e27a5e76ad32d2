"""Headline and key figures of a run. A student that loses is reported as such."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from collegium.report.files import ResultRow, RunFiles
from collegium.report.formats import (
    amount,
    duration,
    fixed,
    percent,
    perplexity,
    perplexity_of,
    ratio,
    signed_percent,
)

# Three seeds of the demo reach 169.8 ± 5.0, a spread of 3 % (docs/results/demo.md).
TIE = 0.01
"""Relative difference of perplexity below which one seed cannot separate two students."""


@dataclass(frozen=True, slots=True)
class Headline:
    """Result of a run in one sentence, with supporting facts and a tone."""

    text: str
    facts: tuple[str, ...] = ()
    tone: Literal["good", "bad", "even", "open"] = "open"


@dataclass(frozen=True, slots=True)
class Tile:
    """One key figure."""

    label: str
    value: str
    note: str = ""


def score(row: ResultRow) -> float | None:
    """Return the perplexity of a row, or None if it has none."""
    return perplexity_of(row.nll, row.perplexity)


def best(rows: tuple[ResultRow, ...]) -> ResultRow | None:
    """Return the row with the lowest perplexity, or None if no row has one."""
    scored = [(value, i) for i, row in enumerate(rows) if (value := score(row)) is not None]
    return rows[min(scored)[1]] if scored else None


def headline_of(run: RunFiles) -> Headline:
    """Compare the student with its best control, and list the other reference points."""
    student = best(run.rows("student"))
    if student is None:
        return _without_student(run)
    reached = score(student) or 0.0
    facts = tuple(_facts(run, reached))
    control = best(run.rows("control"))
    start = f"The distilled student reaches perplexity {perplexity(reached)}"
    if control is None:
        return Headline(
            f"{start}. There is no control to compare it with, so nothing shows that "
            "distillation helped.",
            facts,
        )
    limit = score(control) or 0.0
    against = (
        f"the best control, “{control.title}” ({perplexity(limit)}{_effort(control, student)})"
    )
    if limit <= 0 or reached <= 0:
        return Headline(f"{start}. It cannot be compared with {against}.", facts)
    change = reached / limit - 1
    if abs(change) < TIE:
        return Headline(
            f"{start}, on par with {against}: a difference of {signed_percent(change)} is too "
            "small to call with one seed.",
            facts,
            "even",
        )
    if change > 0:
        return Headline(
            f"{start}, {percent(change)} above {against}: a simpler method did better in this run.",
            facts,
            "bad",
        )
    return Headline(f"{start}, {percent(-change)} below {against}.", facts, "good")


def _effort(control: ResultRow, student: ResultRow) -> str:
    if control.steps is None or student.steps is None:
        return ""
    if control.steps == student.steps:
        return f", {fixed(student.steps, 0)} steps each"
    return f", {fixed(control.steps, 0)} steps vs. {fixed(student.steps, 0)}"


def _without_student(run: RunFiles) -> Headline:
    if run.results is not None:
        return Headline("The evaluation has no distilled student yet.", tuple(_facts(run, None)))
    if run.log:
        return Headline(
            f"Training has reached step {run.log[-1].step}; the student is not evaluated yet."
        )
    return Headline("The student is not trained yet.")


def _facts(run: RunFiles, reached: float | None) -> list[str]:
    references = [("Best single teacher", best(run.rows("teacher")))]
    references.append(("Fused target", best(run.rows("fused"))))
    references.append(("Student before training", best(run.rows("untouched"))))
    facts = []
    # The best control is already in the headline.
    best_control = best(run.rows("control"))
    for row in run.rows("control"):
        if row is not best_control:
            references.insert(0, ("Control", row))
    for label, row in references:
        value = None if row is None else score(row)
        if row is None or value is None:
            continue
        name = "" if row.kind in ("fused", "untouched") else f" {row.title}"
        change = ""
        if reached and value > 0 and row.kind in ("control", "teacher"):
            change = f" (student {signed_percent(reached / value - 1)})"
        facts.append(f"{label}{name}: {perplexity(value)}{change}")
    return facts


def key_figures(run: RunFiles) -> list[Tile]:
    """Return the tiles under the headline, only those whose values are available."""
    student = best(run.rows("student"))
    if student is None:
        return []
    tiles = [Tile("Student perplexity", perplexity(score(student)), _held_out(student))]
    closed = gap_closed(run)
    if closed is not None:
        tiles.append(
            Tile(
                "Gap closed",
                percent(closed, 0),
                "from the best control to the fused target, in NLL",
            )
        )
    if student.bits_per_byte is not None:
        tiles.append(
            Tile("Bits per byte", fixed(student.bits_per_byte), "independent of the vocabulary")
        )
    if student.agreement_fused is not None:
        tiles.append(
            Tile(
                "Agreement with the target",
                percent(student.agreement_fused),
                "same top-1 token as the fused target",
            )
        )
    teachers = [row.num_parameters for row in run.rows("teacher") if row.num_parameters]
    if student.num_parameters and teachers:
        tiles.append(
            Tile(
                "Compression",
                ratio(sum(teachers) / student.num_parameters),
                f"{amount(student.num_parameters)} parameters vs. {amount(sum(teachers))} "
                f"in {len(teachers)} teachers",
            )
        )
    if student.train_seconds is not None:
        tiles.append(
            Tile(
                "Training",
                duration(student.train_seconds),
                f"{amount(student.train_tokens)} tokens",
            )
        )
    return tiles


def _held_out(row: ResultRow) -> str:
    return (
        "held-out text" if row.num_tokens is None else f"{amount(row.num_tokens)} held-out tokens"
    )


def gap_closed(run: RunFiles) -> float | None:
    """Return (NLL control - NLL student) / (NLL control - NLL fused), with the best control.

    1 is the fused target, 0 the control; None if the fused target is not better than the control.
    """
    rows = [best(run.rows(kind)) for kind in ("student", "control", "fused")]
    values = [None if row is None else row.nll for row in rows]
    student, control, fused = values
    if student is None or control is None or fused is None or control - fused <= 1e-6:
        return None
    return (control - student) / (control - fused)
