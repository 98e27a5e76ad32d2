"""Preflight results as tables: teachers, fusions, and calibration on held-out text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from collegium.report.colors import teacher_color
from collegium.report.files import CalibrationMeasure, FusionMeasure, Number, Preflight, RunFiles
from collegium.report.formats import (
    fixed,
    percent,
    perplexity,
    perplexity_of,
    signed,
)
from collegium.report.tables import Cell, Line, Table


def teacher_table(run: RunFiles) -> Table:
    """Return the preflight metrics of each teacher, with the lowest NLL per column in bold."""
    if run.preflight is None:
        return Table("Teacher", (), ())
    teachers = run.preflight.teachers
    domains = tuple(
        dict.fromkeys(name for measure in teachers.values() for name in measure.domains)
    )
    best_nll = _lowest(measure.nll for measure in teachers.values())
    best_in = {name: _lowest(m.domains.get(name) for m in teachers.values()) for name in domains}
    lines = []
    for name, measure in teachers.items():
        cells = [
            Cell(fixed(measure.nll), measure.nll is not None and measure.nll == best_nll),
            Cell(perplexity(perplexity_of(measure.nll, measure.perplexity))),
            Cell(fixed(measure.entropy)),
            Cell(signed(measure.overconfidence)),
            Cell(percent(measure.ece)),
            Cell(fixed(measure.temperature, 2)),
            Cell(percent(measure.top1)),
            *_contribution(run.preflight, name),
        ]
        for domain in domains:
            value = measure.domains.get(domain)
            cells.append(Cell(fixed(value), value is not None and value == best_in[domain]))
        lines.append(Line(name, tuple(cells), teacher_color(name, run.teachers())))
    titles = (
        "NLL",
        "Perplexity",
        "Entropy",
        "NLL − H",
        "ECE",
        "T",
        "Top-1",
        "Weight",
        "ΔNLL without",
    )
    return Table("Teacher", titles + tuple(f"NLL {name}" for name in domains), tuple(lines))


def _contribution(preflight: Preflight, teacher: str) -> tuple[Cell, Cell]:
    """Return the weight under the chosen fusion, and the rise of its NLL without the teacher."""
    chosen = preflight.chosen or FusionMeasure()
    rise = chosen.leave_one_out.get(teacher)
    return Cell(percent(chosen.weights.get(teacher))), Cell(signed(rise))


def fusion_table(run: RunFiles, ranks: slice) -> Table:
    """Return the candidate fusions at these ranks by NLL, with the chosen one marked."""
    preflight = run.preflight
    if preflight is None or not preflight.fusions:
        return Table("Fusion", (), ())
    ranked = sorted(preflight.fusions, key=lambda f: float("inf") if f.nll is None else f.nll)
    lines = []
    for fusion in ranked[ranks]:
        chosen = _is_chosen(fusion, preflight)
        cells = (
            Cell(fusion.calibration or "raw"),
            Cell(fixed(fusion.nll)),
            Cell(_interval(fusion.interval)),
            Cell(_interval(fusion.interval_to_chosen, signed)),
            Cell(percent(fusion.best_teacher_share)),
            Cell(signed(fusion.rank_correlation, 2)),
            Cell(signed(fusion.regret.get("constant"))),
            Cell("chosen" if chosen else "", chosen),
        )
        lines.append(Line(fusion.name, cells, mark=chosen))
    # The chosen fusion is the simplest within noise of the best, so it need not be the first row.
    columns = (
        "Calibration", "NLL", "95 % CI", "Vs. chosen, 95 % CI", "Best teacher first",
        "Rank correlation", "Regret", "",
    )  # fmt: skip
    return Table("Fusion", columns, tuple(lines))


def _is_chosen(fusion: FusionMeasure, preflight: Preflight) -> bool:
    if any(candidate.is_chosen for candidate in preflight.fusions):
        return fusion.is_chosen
    chosen = preflight.chosen
    # Files without `is_chosen`: a name may occur once per calibration, so the NLL must match too.
    return chosen is not None and (fusion.name, fusion.nll) == (chosen.name, chosen.nll)


def _interval(edges: list[Number] | None, write=fixed) -> str:
    if not edges or any(edge is None for edge in edges):
        return "–"
    return " … ".join(write(edge) for edge in edges)


def calibration_table(run: RunFiles) -> Table:
    """Return NLL, entropy and ECE on held-out text by domain: teachers, calibrated ones, target."""
    held_out = run.preflight.held_out if run.preflight else None
    if held_out is None:
        return Table("Model", (), ())
    names = run.teachers()
    lines: list[Line] = []
    for name, measure in held_out.teachers.items():
        color = teacher_color(name, names)
        lines += _calibration_lines(name, measure.raw, color)
        # T = 1 would repeat the raw rows.
        if measure.temperature not in (None, 1.0):
            title = f"{name}, T = {fixed(measure.temperature, 2)}"
            lines += _calibration_lines(title, measure.calibrated, color)
    lines += _calibration_lines("fused target", held_out.fused, "", mark=True)
    columns = ("Domain", "NLL", "Entropy", "NLL − H", "ECE", "ECE over", "ECE under")
    return Table("Model", columns, tuple(lines))


def _calibration_lines(
    title: str, measure: CalibrationMeasure, color: str, *, mark: bool = False
) -> Iterator[Line]:
    # The row of a single domain would repeat the total.
    rows = {"all": measure, **(measure.domains if len(measure.domains) > 1 else {})}
    for domain, row in rows.items():
        cells = (
            Cell(domain),
            Cell(fixed(row.nll)),
            Cell(fixed(row.entropy)),
            Cell(signed(row.overconfidence)),
            Cell(percent(row.ece)),
            Cell(percent(row.ece_over)),
            Cell(percent(row.ece_under)),
        )
        yield Line(title if domain == "all" else "", cells, color, mark=mark)


def _lowest(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return min(measured, default=None)
