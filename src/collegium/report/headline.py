"""Headline and key figures of a run. A student that loses is reported as such."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from collegium.report.formats import percent, perplexity, signed_percent, whole
from collegium.report.run_files import RunFiles
from collegium.storage.records import ResultRow

# Three seeds of the demo reach 169.8 ± 5.0, a spread of 3 % (docs/results/demo.md).
TIE = 0.01
"""Relative difference of perplexity below which one seed cannot separate two students."""


@dataclass(frozen=True, slots=True)
class Headline:
    """Result of a run in one sentence, with supporting facts and a tone."""

    text: str
    facts: tuple[str, ...] = ()
    tone: Literal["good", "bad", "even", "open"] = "open"


def best(rows: tuple[ResultRow, ...]) -> ResultRow | None:
    """Return the row with the lowest perplexity, or None if no row has one."""
    scored = [(row.perplexity, i) for i, row in enumerate(rows) if row.perplexity is not None]
    return rows[min(scored)[1]] if scored else None


def headline_of(run: RunFiles) -> Headline:
    """Compare the student with its best control, and list the other reference points."""
    student = best(run.rows("student"))
    if student is None:
        return _without_student(run)
    reached = student.perplexity or 0.0
    facts = tuple(_facts(run, reached))
    control = best(run.rows("control"))
    start = f"The distilled student reaches perplexity {perplexity(reached)}"
    if control is None:
        text = "There is no control to compare it with, so nothing shows that distillation helped."
        return Headline(f"{start}. {text}", facts)
    limit = control.perplexity or 0.0
    effort = f"{perplexity(limit)}{_effort(control, student)}"
    against = f"the best control, “{control.title}” ({effort})"
    if limit <= 0 or reached <= 0:
        return Headline(f"{start}. It cannot be compared with {against}.", facts)
    change = reached / limit - 1
    if abs(change) < TIE:
        even = f"a difference of {signed_percent(change)} is too small to call with one seed"
        return Headline(f"{start}, on par with {against}: {even}.", facts, "even")
    if change > 0:
        text = f"{percent(change)} above {against}: a simpler method did better in this run."
        return Headline(f"{start}, {text}", facts, "bad")
    return Headline(f"{start}, {percent(-change)} below {against}.", facts, "good")


def _effort(control: ResultRow, student: ResultRow) -> str:
    if control.steps is None or student.steps is None:
        return ""
    if control.steps == student.steps:
        return f", {whole(student.steps)} steps each"
    return f", {whole(control.steps)} steps vs. {whole(student.steps)}"


def _without_student(run: RunFiles) -> Headline:
    if run.results is not None:
        return Headline("The evaluation has no distilled student yet.", tuple(_facts(run, None)))
    if not run.log:
        return Headline("The student is not trained yet.")
    step = run.log[-1].step
    return Headline(f"Training has reached step {step}; the student is not evaluated yet.")


def _facts(run: RunFiles, reached: float | None) -> Iterator[str]:
    # The best control is already in the headline.
    controls = [row for row in run.rows("control") if row is not best(run.rows("control"))]
    teacher = best(run.rows("teacher"))
    references = [
        *((f"Control {row.title}", row) for row in reversed(controls)),
        (f"Best single teacher {teacher.title}" if teacher else "", teacher),
        ("Fused target", best(run.rows("fused"))),
        ("Student before training", best(run.rows("untouched"))),
    ]
    for label, row in references:
        if row is None or row.perplexity is None:
            continue
        change = ""
        if reached and row.perplexity > 0 and row.kind in ("control", "teacher"):
            change = f" (student {signed_percent(reached / row.perplexity - 1)})"
        yield f"{label}: {perplexity(row.perplexity)}{change}"


def gap_closed(run: RunFiles) -> float | None:
    """Return (NLL control - NLL student) / (NLL control - NLL fused), with the best control.

    1 is the fused target, 0 the control; None if the fused target is not better than the control.
    """
    rows = [best(run.rows(kind)) for kind in ("student", "control", "fused")]
    student, control, fused = [None if row is None else row.nll for row in rows]
    if student is None or control is None or fused is None or control - fused <= 1e-6:
        return None
    return (control - student) / (control - fused)
