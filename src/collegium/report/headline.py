"""Headline and key figures of a run. A student that loses is reported as such."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from collegium.report.formats import percent, perplexity, ratio, signed_percent, whole
from collegium.report.run_files import RunFiles
from collegium.storage.records import ResultRow

# Three seeds of the demo reach 169.8 ± 5.0, a spread of 3 % (docs/results/demo.md).
TIE = 0.01
"""Relative difference of perplexity below which one seed cannot separate two students."""
FAR = 0.25
"""Relative perplexity above the best teacher from which a student is no substitute for it."""
FALLING = 0.05
"""Relative fall of the training loss late in the run from which more steps would help. The demo,
whose learning rate decays to 0, has 0.02."""


Tone = Literal["good", "bad", "even", "open"]


@dataclass(frozen=True, slots=True)
class Headline:
    """Result of a run in one sentence, with supporting facts and a tone."""

    text: str
    facts: tuple[str, ...] = ()
    tone: Tone = "open"


def best(rows: tuple[ResultRow, ...]) -> ResultRow | None:
    """Return the row with the lowest perplexity, or None if no row has one."""
    scored = [(row.perplexity, i) for i, row in enumerate(rows) if row.perplexity is not None]
    return rows[min(scored)[1]] if scored else None


def headline_of(run: RunFiles) -> Headline:
    """Compare the student with the models that one would serve instead.

    Those are the best control, the best teacher and the untouched student. Only a student that
    beats the control, is not `FAR` above the teacher and has finished learning is good.
    """
    student = best(run.rows("student"))
    if student is None:
        return _without_student(run)
    reached = student.perplexity or 0.0
    facts = tuple(_facts(run, reached))
    control, teacher = best(run.rows("control")), best(run.rows("teacher"))
    start = f"The distilled student reaches perplexity {perplexity(reached)}"
    to_control = change(reached, control)
    tone: Tone = "open"
    compared, rest = list[str](), list[str]()
    if control is not None and to_control is None:
        effort = f"{perplexity(control.perplexity)}{_effort(control, student)}"
        text = f"It cannot be compared with the best control, “{control.title}” ({effort})."
        return Headline(f"{start}. {text}", facts)
    if control is None or to_control is None:
        rest.append("There is no control, so nothing shows that distillation helped.")
    else:
        effort = f"{perplexity(control.perplexity)}{_effort(control, student)}"
        against = f"the best control, “{control.title}” ({effort})"
        tone = "even" if abs(to_control) < TIE else "bad" if to_control > 0 else "good"
        compared.append(f"{_direction(to_control)} {against}")
        if tone == "bad":
            rest.append("A simpler method did better in this run.")
        elif tone == "even":
            rest.append(
                f"{signed_percent(to_control)} is too small a difference to call with one seed."
            )
    to_teacher = change(reached, teacher)
    if teacher is not None and to_teacher is not None:
        size = _times_the_size(teacher, student)
        against = f"the best teacher, “{teacher.title}” ({perplexity(teacher.perplexity)}{size})"
        compared.append(f"{_direction(to_teacher)} {against}")
        if to_teacher > FAR:
            tone = "even" if tone == "good" else tone
    to_start = change(reached, best(run.rows("untouched")))
    if to_start is not None and to_start > -TIE:
        tone = "bad"
        rest.append("Training has not improved the untouched student.")
    if (problem := _learning_problem(run, student)) is not None:
        tone = "even" if tone == "good" else tone
        rest.append(problem)
    rest += _selection(student)
    sentence = ", ".join([start, " and ".join(compared)]) if compared else start
    return Headline(" ".join([f"{sentence}.", *rest]), facts, tone)


def _learning_problem(run: RunFiles, student: ResultRow) -> str | None:
    """Return the sentence about a training that is too short, or too long for its last step."""
    rise = validation_rise(run)
    if is_still_learning(run):
        return (
            f"It is not ready: its training loss still fell by {percent(loss_fall(run))} over the "
            "last fifth of the steps."
        )
    if rise is None or rise <= TIE or student.best_step is not None:
        return None
    lowest = min(validation(run), key=lambda point: point[1])[0]
    return (
        f"It was better earlier: its validation perplexity rose by {percent(rise)} after step "
        f"{whole(lowest)}."
    )


def _selection(student: ResultRow) -> list[str]:
    """Return the sentence about an early stop, or about a chosen checkpoint."""
    where = f"step {whole(student.steps)} of {whole(student.max_steps)}"
    chosen = f"the student is that of step {whole(student.best_step)}"
    if student.stopped_early:
        rest = "" if student.best_step is None else f", and {chosen}"
        return [f"Training stopped early at {where}{rest}."]
    if student.best_step is not None and student.best_step != student.steps:
        return [f"Of {whole(student.steps)} steps, {chosen}."]
    return []


def loss_fall(run: RunFiles) -> float | None:
    """Return the relative fall of the training loss from the fourth fifth of the run to the last.

    None for short logs, and for losses whose terms changed their weights.
    """
    lines = [line for line in run.log or () if line.loss is not None]
    size = len(lines) // 5
    before, after = lines[-2 * size : -size], lines[-size:]
    if size < 4 or len({tuple(sorted(one.term_weights.items())) for one in before + after}) > 1:
        return None
    first, last = [fmean(line.loss or 0.0 for line in part) for part in (before, after)]
    return 1 - last / first if first > 0 else None


def validation(run: RunFiles) -> list[tuple[int, float]]:
    """Return step and NLL of each evaluation during the training of the student."""
    scored = [(line.step, line.validation.nll) for line in run.log or () if line.validation]
    return [(step, nll) for step, nll in scored if nll is not None]


def validation_rise(run: RunFiles) -> float | None:
    """Return the relative rise of the validation perplexity since its lowest, None without any."""
    curve = [nll for _, nll in validation(run)]
    return math.expm1(min(curve[-1] - min(curve), 700.0)) if curve else None


def is_still_learning(run: RunFiles) -> bool:
    """Return True if more steps would help: the loss falls, and the validation NLL not less."""
    student, fall, rise = best(run.rows("student")), loss_fall(run), validation_rise(run)
    if fall is None or fall <= FALLING or (student is not None and student.stopped_early):
        return False
    return rise is None or rise <= 0


def change(reached: float, row: ResultRow | None) -> float | None:
    """Return the relative difference of a perplexity to that of a row, None without one."""
    limit = 0.0 if row is None else row.perplexity or 0.0
    return reached / limit - 1 if reached > 0 and limit > 0 else None


def _direction(change: float) -> str:
    if abs(change) < TIE:
        return "on par with"
    return f"{percent(abs(change))} {'above' if change > 0 else 'below'}"


def _times_the_size(teacher: ResultRow, student: ResultRow) -> str:
    if not teacher.num_parameters or not student.num_parameters:
        return ""
    return f", with {ratio(teacher.num_parameters / student.num_parameters)} the parameters"


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
    # The best control and the best teacher are already in the headline.
    controls = [row for row in run.rows("control") if row is not best(run.rows("control"))]
    references = [
        *((f"Control {row.title}", row) for row in reversed(controls)),
        ("Fused target", best(run.rows("fused"))),
        ("Student before training", best(run.rows("untouched"))),
    ]
    student = best(run.rows("student"))
    if student is not None and student.best_step is not None:
        yield "Checkpoints were chosen on the text of this score, which is a little too good for it"
    for label, row in references:
        if row is None or row.perplexity is None:
            continue
        change = ""
        if reached and row.perplexity > 0 and row.kind == "control":
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
