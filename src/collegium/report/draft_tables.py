"""Tables of the student as a draft model for speculative decoding."""

from __future__ import annotations

from collections.abc import Callable

from collegium.report import formats as form
from collegium.report.colors import teacher_color
from collegium.report.run_files import RunFiles
from collegium.report.tables import Column, Line, Table
from collegium.storage.records import Acceptance, DraftRow

NUM_DRAFTED = 4
"""Drafted tokens per pass of the teacher, for the tokens that a pass yields."""


def expected_tokens(rate: float, num_drafted: int) -> float:
    """Return the mean tokens per pass of the target: 1 + a + ... + a^n for acceptance rate a.

    Source: Leviathan et al. 2023, arXiv 2211.17192, equation 1.
    """
    return sum(rate**power for power in range(num_drafted + 1))


def acceptance_table(run: RunFiles) -> Table[str]:
    """Return the expected acceptance of each trained model as a draft for each teacher."""
    rows = [row for row in run.rows("student", "control") if row.acceptance]
    columns: list[Column[str]] = []
    for row in rows:
        columns.append(Column(row.title, row.acceptance.get, _rate, _rank))
        if row.kind == "student":
            title = f"Tokens per pass, {NUM_DRAFTED} drafted"
            columns.append(Column(title, _tokens(row.acceptance.get), form.fixed))
    names = dict.fromkeys(name for row in rows for name in row.acceptance)
    lines = [Line(name, name, teacher_color(name, run.teachers())) for name in names]
    title = "Expected acceptance as a draft model, 95 % intervals"
    return Table(title, "Teacher as target", columns, lines)


def draft_table(run: RunFiles) -> Table[DraftRow]:
    """Return the measured acceptance and speed-up of the student as a draft for each teacher."""
    draft = run.draft
    lines = [
        Line(row.teacher, row, teacher_color(row.teacher, run.teachers()))
        for row in (draft.rows if draft else ())
    ]
    size = draft.num_prompts if draft else 0

    def identical(row: DraftRow) -> str:
        return form.MISSING if row.num_identical is None else f"{row.num_identical} of {size}"

    columns: list[Column[DraftRow]] = [
        Column("Identical texts", identical, str, short="same\ntexts"),
        Column("Accepted, 95 % CI", _accepted, _rate, short="accepted"),
        Column("Tokens per pass", "tokens_per_pass", form.fixed, short="tokens/\npass"),
        Column("Teacher, tokens/s", "teacher_tokens_per_s", form.amount, short="teacher\ntok/s"),
        Column("With drafts, tokens/s", "tokens_per_s", form.amount, short="drafted\ntok/s"),
        Column("Speed-up", "speedup", form.ratio),
        Column("Speed-up, 95 % CI", "speedup_interval", form.interval, short=None),
    ]
    if any(row.row.note for row in lines):
        columns.append(Column("Note", "note", form.text, is_text=True))
    settings = ""
    if draft is not None:
        settings = (
            f": greedy, {draft.num_drafted} tokens per pass, {size} held-out prompts, "
            f"{draft.threads} threads, transformers {draft.version}"
        )
    return Table(f"Student as draft model{settings}", "Teacher as target", columns, lines)


def _accepted(row: DraftRow) -> Acceptance:
    return Acceptance(value=row.accepted_share, interval=row.accepted_interval)


def _rate(acceptance: Acceptance | None) -> str:
    if acceptance is None or acceptance.value is None:
        return form.MISSING
    text = form.percent(acceptance.value)
    if acceptance.interval is None:
        return text
    low, high = (form.percent(edge).removesuffix(" %") for edge in acceptance.interval)
    return f"{text} ({low} … {high})"


def _rank(acceptance: Acceptance) -> float:
    return -(acceptance.value or 0.0)


def _tokens(read: Callable[[str], Acceptance | None]) -> Callable[[str], float | None]:
    def tokens(name: str) -> float | None:
        acceptance = read(name)
        if acceptance is None or acceptance.value is None:
            return None
        return expected_tokens(acceptance.value, NUM_DRAFTED)

    return tokens
