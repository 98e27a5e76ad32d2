"""Tables of the report as plain values. The template only lays them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from collegium.report.colors import row_color
from collegium.report.files import DomainScore, ResultRow, RunFiles
from collegium.report.formats import (
    amount,
    duration,
    fixed,
    percent,
    perplexity,
    perplexity_of,
    ratio,
    signed,
    signed_percent,
    whole,
)
from collegium.report.headline import best, score

GROUPS = (
    ("student", "Distilled"),
    ("control", "Controls"),
    ("fused", "Fused target"),
    ("teacher", "Teachers"),
    ("untouched", "Before training"),
)
TRAINED = ("student", "control")


@dataclass(frozen=True, slots=True)
class Cell:
    """A formatted value. `strong` marks the best of its column."""

    text: str
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A row: a name with a color swatch, then its values. `group` starts a new block of rows."""

    name: str
    cells: tuple[Cell, ...]
    color: str = ""
    group: str = ""
    mark: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table with text in the first column and numbers in the others."""

    first: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """A column: reads a value from a row, formats it and ranks it (lowest is best, if any)."""

    title: str
    read: Callable[[ResultRow], float | None]
    write: Callable[[float | None], str]
    rank: Callable[[float], float] | None = None


def _low(value: float) -> float:
    return value


def _high(value: float) -> float:
    return -value


METRICS = (
    Column("Perplexity", score, perplexity, _low),
    Column("NLL", lambda row: row.nll, fixed, _low),
    Column("Bits / byte", lambda row: row.bits_per_byte, fixed, _low),
    Column("Top-1", lambda row: row.top1, percent, _high),
    Column("ECE", lambda row: row.ece, percent, _low),
    # By magnitude: underconfidence is as far from calibrated as overconfidence.
    Column("NLL − H", lambda row: row.overconfidence, signed, abs),
    Column("KL to target", lambda row: row.kl_to_fused, fixed, _low),
    Column("Agreement", lambda row: row.agreement_fused, percent, _high),
    Column("Steps", lambda row: row.steps, whole),
    Column("Tokens", lambda row: row.train_tokens, amount),
)


def evaluation_table(run: RunFiles) -> Table:
    """Return all rows of `results.json`, student first, with the best trained model in bold."""
    columns = [
        column
        for column in METRICS
        if any(column.read(row) is not None for row in run.results or ())
    ]
    return _result_table(run, columns, "Model")


def domain_table(run: RunFiles) -> Table:
    """Return perplexity by row and domain, with the best trained model in bold."""

    def reader(domain: str) -> Callable[[ResultRow], float | None]:
        def read(row: ResultRow) -> float | None:
            domain_score = row.domains.get(domain, DomainScore())
            return perplexity_of(domain_score.nll, domain_score.perplexity)

        return read

    columns = [Column(name, reader(name), perplexity, _low) for name in run.domains()]
    return _result_table(run, columns, "Model")


def agreement_table(run: RunFiles) -> Table:
    """Return the share of tokens on which a model and a teacher have the same top-1 token."""
    rows = [
        row
        for row in run.rows(*TRAINED, "fused")
        if any(v is not None for v in row.agreement.values())
    ]
    names = tuple(dict.fromkeys(name for row in rows for name in row.agreement))
    lines = []
    for row in rows:
        values = [row.agreement.get(name) for name in names]
        highest = max(value for value in values if value is not None)
        cells = tuple(Cell(percent(value), value == highest and len(names) > 1) for value in values)
        lines.append(Line(row.title, cells, row_color(row, run), mark=row.kind == "student"))
    return Table("Model", names, tuple(lines))


def _result_table(run: RunFiles, columns: Sequence[Column], first: str) -> Table:
    # Only trained models compete: the fused target and the teachers are not alternatives to them.
    trained = run.rows(*TRAINED)
    marks = [_best_of(column, trained) for column in columns]
    lines = []
    for kind, group in GROUPS:
        for i, row in enumerate(run.rows(kind)):
            cells = []
            for column, mark in zip(columns, marks, strict=True):
                value = column.read(row)
                text = column.write(value)
                # Compared as text: two values that look the same are both the best.
                cells.append(Cell(text, kind in TRAINED and mark is not None and text == mark))
            lines.append(
                Line(
                    row.title,
                    tuple(cells),
                    row_color(row, run),
                    "" if i else group,
                    kind == "student",
                )
            )
    return Table(first, tuple(column.title for column in columns), tuple(lines))


def _best_of(column: Column, rows: Iterable[ResultRow]) -> str | None:
    values = [value for row in rows if (value := column.read(row)) is not None]
    if column.rank is None or len(values) < 2:
        return None
    return column.write(min(values, key=column.rank))


def size_table(run: RunFiles) -> Table:
    """Return the parameters of each model, also relative to the student."""
    rows = [row for row in run.rows("student", "teacher") if row.num_parameters]
    student = best(run.rows("student"))
    base = student.num_parameters if student else None
    lines = [
        _size_line(row.title, row.num_parameters, base, row_color(row, run), row.kind)
        for row in rows
    ]
    sizes = [row.num_parameters or 0.0 for row in run.rows("teacher")]
    if len(sizes) > 1 and sum(sizes):
        lines.append(_size_line("all teachers combined", sum(sizes), base, "", "sum"))
    return Table("Model", ("Parameters", "Exact", "Relative to student"), tuple(lines))


def _size_line(name: str, size: float | None, base: float | None, color: str, kind: str) -> Line:
    relative = size / base if size and base else None
    cells = (Cell(amount(size)), Cell(whole(size)), Cell(ratio(relative)))
    return Line(name, cells, color, mark=kind == "student")


def cost_table(run: RunFiles) -> Table:
    """Return the training cost of the student and each control."""
    rows = [
        row for row in run.rows(*TRAINED) if row.steps is not None or row.train_seconds is not None
    ]
    student = best(run.rows("student"))
    base = student.train_seconds if student else None
    lines = []
    for row in rows:
        speed = (
            row.train_tokens / row.train_seconds if row.train_tokens and row.train_seconds else None
        )
        relative = row.train_seconds / base - 1 if row.train_seconds is not None and base else None
        texts = (
            whole(row.steps),
            amount(row.train_tokens),
            duration(row.train_seconds),
            "–" if speed is None else f"{amount(speed)}/s",
            signed_percent(relative) if row.kind == "control" else "",
        )
        lines.append(
            Line(
                row.title, tuple(map(Cell, texts)), row_color(row, run), mark=row.kind == "student"
            )
        )
    return Table("Model", ("Steps", "Tokens", "Time", "Tokens/s", "Time vs. student"), tuple(lines))


def stage_table(run: RunFiles) -> Table:
    """Return status, wall time and share of the total time of each stage."""
    stages = run.stages or {}
    total = sum(stage.seconds or 0.0 for stage in stages.values())
    lines = []
    for name, stage in stages.items():
        share = stage.seconds / total if stage.seconds is not None and total > 0 else None
        texts = (
            stage.status or "–",
            # Without the UTC offset.
            (stage.started or "–")[: len("2026-01-31T12:00:00")].replace("T", " "),
            duration(stage.seconds),
            percent(share),
            stage.note or "",
        )
        lines.append(Line(name, tuple(map(Cell, texts))))
    if lines:
        texts = ("", "", duration(total), "", "")
        lines.append(Line("total", tuple(map(Cell, texts)), mark=True))
    return Table("Stage", ("Status", "Started", "Time", "Share", "Note"), tuple(lines))


def environment_table(run: RunFiles) -> Table:
    """Return versions and machine, with nested keys joined by dots."""
    lines = [Line(key, (Cell(text),)) for key, text in _flat("", run.environment or {})]
    return Table("Key", ("Value",), tuple(lines))


def _flat(prefix: str, value: object) -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, list):
        yield prefix, ", ".join(map(str, value)) or "–"
    elif prefix:
        yield prefix, "–" if value is None or value == {} else str(value)
