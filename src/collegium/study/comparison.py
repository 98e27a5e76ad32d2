"""Differences of the students of a study to those of one setting, with intervals."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from collegium.evaluate.documents import DOCUMENTS, difference_sums
from collegium.evaluate.intervals import Interval, document_interval, seed_interval
from collegium.report.formats import interval, signed
from collegium.report.tables import Column, Line, Table
from collegium.storage import records
from collegium.study.measurements import by_setting
from collegium.study.options import ContrastOptions


@dataclass(frozen=True)
class Comparison:
    """NLL of the students of one setting minus those of another, in nats per token."""

    differences: Mapping[int, float]
    """By seed, on the same documents."""
    over_documents: Interval | None
    """Of the mean over the seeds, for other documents."""
    over_seeds: Interval | None
    """Of the mean, for other seeds."""

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.differences.values())

    @property
    def verdict(self) -> str:
        """`better` or `worse` if both intervals exclude 0 on that side, else `undecided`."""
        edges = [edge for pair in (self.over_documents, self.over_seeds) for edge in pair or (0.0,)]
        if max(edges) < 0:
            return "better"
        return "worse" if min(edges) > 0 else "undecided"


def compare(
    rows: Sequence[records.StudyRow],
    others: Sequence[records.StudyRow],
    domains: Collection[str] = (),
) -> Comparison:
    """Compare the students of two settings, seed by seed, on some domains or on all.

    Raises:
        CollegiumError: the runs of a seed were evaluated on different documents, or on none of
            these domains.
    """
    folder_of = {row.seed: Path(row.folder) for row in others}
    strata = {}
    for row in rows:
        if (other := folder_of.get(row.seed)) is not None:
            one = Path(row.folder)
            names = _student(one), _student(other)
            strata[row.seed] = difference_sums(
                one / DOCUMENTS, names[0], other / DOCUMENTS, names[1], domains
            )
    means = {seed: float(total.sum() / count.sum()) for seed, (total, count) in strata.items()}
    over_seeds = seed_interval([*means.values()])
    return Comparison(means, document_interval([*strata.values()]), over_seeds)


def comparison_table(
    rows: Sequence[records.StudyRow], factors: Sequence[str], baseline: Mapping[str, str]
) -> Table[Comparison]:
    """Return the comparison of every other setting with the baseline."""
    settings = by_setting(rows, factors)
    name = next(n for n, group in settings.items() if dict(group[0].levels) == dict(baseline))
    lines = [
        Line(other, compare(group, settings[name]))
        for other, group in settings.items()
        if other != name
    ]
    return Table(f"NLL minus that of {name}", " · ".join(factors), _columns(), lines)


def contrast_table(
    rows: Sequence[records.StudyRow],
    factors: Sequence[str],
    contrasts: Sequence[ContrastOptions],
    baseline: Mapping[str, str],
) -> Table[Comparison]:
    """Return the differences that the study asks for, of settings that have runs."""
    settings = {
        frozenset(group[0].levels.items()): (name, group)
        for name, group in by_setting(rows, factors).items()
    }
    lines = []
    for contrast in contrasts:
        pair = [{**baseline, **levels} for levels in (contrast.of, contrast.minus)]
        found = [settings.get(frozenset(levels.items())) for levels in pair]
        if None not in found:
            (name, group), (other, others) = (one for one in found if one)
            where = f", on {', '.join(contrast.domains)}" if contrast.domains else ""
            lines.append(Line(f"{name} − {other}{where}", compare(group, others, contrast.domains)))
    return Table("Differences of two settings", "difference", _columns(), lines)


def _columns() -> list[Column[Comparison]]:
    return [
        Column("ΔNLL", lambda row: row.mean, signed),
        Column("by seed", lambda row: ", ".join(map(signed, row.differences.values())), str),
        Column("95 %, documents", lambda row: row.over_documents, _interval),
        Column("95 %, seeds", lambda row: row.over_seeds, _interval),
        Column("", lambda row: row.verdict, str, is_text=True),
    ]


def _interval(edges: Interval | None) -> str:
    return interval(edges, write=signed)


def _student(folder: Path) -> str:
    rows = records.open_record(folder / "results.json", list[records.ResultRow])
    return next(row.name for row in rows if row.kind == "student")
