"""Exports of the student: size and distance to the student, before and after a recovery."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from collegium.report import colors
from collegium.report import formats as form
from collegium.report.run_files import RunFiles
from collegium.report.tables import Column, Line, Table
from collegium.storage.records import ExportInfo, Number, Verification


class ExportRow(NamedTuple):
    """An export, or a state of it that is not kept."""

    measured: Verification
    bytes: int | None = None


def export_table(run: RunFiles) -> Table[ExportRow]:
    """Return the verification of each export. That of a recovery has a line of its own."""
    lines = [
        Line(name, row, colors.STUDENT) for info in run.exports for name, row in _rows(info).items()
    ]
    columns: list[Column[ExportRow]] = [
        Column("Bytes", "bytes", form.amount),
        Column("Δ bits / byte", _change, partial(form.signed, digits=4), short="Δ bits/\nbyte"),
        Column("KL", lambda row: row.measured.kl, _rounded),
        Column("Top-1 agreement", lambda row: row.measured.top1_agreement, form.percent),
        Column("Largest logit difference", lambda row: row.measured.max_logit_difference, _rounded),
        Column("Differing texts", lambda row: row.measured.differing_texts, form.percent),
    ]
    return Table("Exports against the student", "Export", columns, lines)


def export_notes(run: RunFiles) -> Iterator[str]:
    """Yield the text on which the exports were compared, and the training of each recovery."""
    for tokens in dict.fromkeys(info.verification.num_tokens for info in run.exports):
        yield f"On {tokens:,} tokens of held-out text, each in the tool that loads it"
    for info in run.exports:
        if (recovery := info.recovery) is not None:
            yield (
                f"{info.name} costs more than {recovery.bits_per_byte:g} bits per byte, so the "
                f"student was trained for {recovery.steps} steps with rounded weights at a "
                f"learning rate of {recovery.learning_rate:g}"
                f"{'' if recovery.is_kept else ', which is no gain and not kept'}"
            )


def _rows(info: ExportInfo) -> dict[str, ExportRow]:
    recovery, kept = info.recovery, ExportRow(info.verification, info.bytes)
    if recovery is None:
        return {info.name: kept}
    steps = f"{recovery.steps} steps of recovery"
    if recovery.is_kept:
        return {f"{info.name}, before {steps}": ExportRow(recovery.before), info.name: kept}
    return {info.name: kept, f"{info.name}, after {steps}": ExportRow(recovery.after)}


def _change(row: ExportRow) -> Number:
    return row.measured.bits_per_byte_change


def _rounded(value: Number) -> str:
    return form.MISSING if value is None else f"{value:.2g}"
