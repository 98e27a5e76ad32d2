"""Tables of a run, built from its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from operator import neg, pos
from typing import Any

from collegium.report import formats as form
from collegium.report.colors import row_color, teacher_color
from collegium.report.headline import best
from collegium.report.run_files import RunFiles
from collegium.report.tables import Column, Line, Table
from collegium.storage import records

GROUPS = (
    ("student", "Distilled"),
    ("control", "Controls"),
    ("fused", "Fused target"),
    ("teacher", "Teachers"),
    ("untouched", "Before training"),
)
TRAINED = ("student", "control")
NUM_FUSIONS = 10
"""Number of preflight candidates above the fold, besides the chosen one."""
METRICS: tuple[Column[records.ResultRow], ...] = (
    Column("Parameters", "num_parameters", form.amount, short="params"),
    Column("Perplexity", "perplexity", form.perplexity, pos, short="ppl"),
    Column("NLL", "nll", form.fixed, pos, short=None),
    Column("Bits / byte", "bits_per_byte", form.fixed, pos, short="bits/\nbyte"),
    Column("Top-1", "top1", form.percent, neg, short=None),
    Column("ECE", "ece", form.percent, pos),
    # By magnitude: underconfidence is as far from calibrated as overconfidence.
    Column("NLL − H", "overconfidence", form.signed, abs),
    Column("KL to target", "kl_to_fused", form.fixed, pos, short="KL to\ntarget"),
    Column("Agreement", "agreement_fused", form.percent, neg, short="agree"),
)

OTHER_COST = "preparation"
COST_PARTS = {
    "preflight": "preflight",
    "cache": "teacher cache",
    "train": "student",
    "control": "controls",
    "evaluate": "evaluation",
    "generation": "generated text",
    "samples": "generated text",
    "task": "generated text",
    "harness": "evaluation",
    "export": "exports",
    "measure": "measurements on this machine",
    "draft": "measurements on this machine",
}
"""First word of a stage -> part of the cost. Live teachers are part of student and controls."""
VALIDATION_COST = "of which evaluations during training"


def _calibration(fusion: records.CandidateFusion) -> str | None:
    ends = ", ".join(fusion.grid_ends)
    return f"{fusion.calibration} (end of the grid: {ends})" if ends else fusion.calibration


FUSION_COLUMNS: tuple[Column[records.CandidateFusion], ...] = (
    Column("Calibration", _calibration, form.text, is_text=True, short=None),
    # Candidates within 0.002 nats count as equal, which three digits would not show.
    Column("NLL", "nll", partial(form.fixed, digits=4)),
    Column("95 % CI", "interval", form.interval, short=None),
    Column("Vs. chosen, 95 % CI", "interval_to_chosen", partial(form.interval, write=form.signed)),
    Column("Best teacher first", "best_teacher_share", form.percent, short="best\nfirst"),
    Column(
        "Rank correlation", "rank_correlation", partial(form.signed, digits=2), short="rank\ncorr."
    ),
    Column("Regret", lambda fusion: (fusion.regret or {}).get("constant"), form.signed),
    Column("", lambda fusion: "chosen" if fusion.is_chosen else "", str, short=None),
)


def evaluation_table(run: RunFiles) -> Table[records.ResultRow]:
    """Return all rows of the evaluation, student first, with the best trained model in bold."""
    columns = [c for c in METRICS if any(c.value(row) is not None for row in run.results or ())]
    return Table("Held-out evaluation", "Model", columns, _result_lines(run))


def domain_table(run: RunFiles) -> Table[records.ResultRow]:
    """Return perplexity by row and domain, with the best trained model in bold."""
    names = dict.fromkeys(name for row in run.results or () for name in row.domains)
    columns: list[Column[records.ResultRow]] = [
        Column(name, lambda row, name=name: _of(row, name).perplexity, form.perplexity, pos)
        for name in names
    ]
    return Table("Perplexity by domain", "Model", columns, _result_lines(run) if columns else [])


def _of(scores: records.ResultRow | records.CalibrationScore, domain: str) -> records.DomainScore:
    return scores.domains.get(domain, records.DomainScore())


def _result_lines(run: RunFiles) -> list[Line[records.ResultRow]]:
    return [
        # The fused target and the teachers are not alternatives to the trained models.
        _line(run, row, group="" if i else group, competes=kind in TRAINED)
        for kind, group in GROUPS
        for i, row in enumerate(run.rows(kind))
    ]


def _line(run: RunFiles, row: records.ResultRow, **options: Any) -> Line[records.ResultRow]:
    return Line(row.title, row, row_color(row, run), is_marked=row.kind == "student", **options)


def agreement_table(run: RunFiles) -> Table[str]:
    """Return the share of tokens on which a model and a teacher have the same top-1 token."""
    rows = [row for row in run.rows(*TRAINED, "fused") if any(row.agreement.values())]
    columns = [Column(row.title, row.agreement.get, form.percent, neg) for row in rows]
    names = dict.fromkeys(name for row in rows for name in row.agreement)
    return Table("Agreement with each teacher", "Teacher", columns, _teacher_lines(run, names))


def _teacher_lines(run: RunFiles, names: Mapping[str, Any]) -> list[Line[str]]:
    return [Line(name, name, teacher_color(name, run.teachers())) for name in names]


def teacher_tables(run: RunFiles) -> list[Table[str]]:
    """Return the preflight scores of each teacher, then its NLL by domain."""
    teachers, chosen = run.measured.teachers, run.measured.chosen

    def of(key: str) -> Callable[[str], Any]:
        return lambda name: getattr(teachers[name], key)

    columns: list[Column[str]] = [
        Column("NLL", of("nll"), form.fixed, pos),
        Column("Perplexity", of("perplexity"), form.perplexity, short="ppl"),
        Column("Entropy", of("entropy"), short=None),
        Column("NLL − H", of("overconfidence"), form.signed),
        Column("ECE", of("ece"), form.percent),
        Column("T", teachers.get, _temperature),
        Column("Top-1", of("top1"), form.percent),
        Column("Weight", chosen.weights.get, form.percent, short=None),
        Column("ΔNLL without", chosen.leave_one_out.get, form.signed, short=None),
    ]
    if any(score.cut_mass is not None for score in teachers.values()):
        columns.append(Column("Cut mass", of("cut_mass"), partial(form.percent, digits=2)))
    domains = dict.fromkeys(name for score in teachers.values() for name in score.domains)
    by_domain: list[Column[str]] = [
        Column(d, lambda name, d=d: teachers[name].domains.get(d), form.fixed, pos) for d in domains
    ]
    lines = _teacher_lines(run, teachers)
    return [
        Table("Individual teachers", "Teacher", columns, lines),
        Table("NLL of teachers by domain", "Teacher", by_domain, lines if by_domain else []),
    ]


def _temperature(measure: records.TeacherMeasure) -> str:
    text = form.fixed(measure.temperature, 2)
    sign = {"lowest": "≤ ", "highest": "≥ ", None: ""}[measure.grid_end]
    return f"{sign}{text}"


def fusion_tables(run: RunFiles) -> list[Table[records.CandidateFusion]]:
    """Return the best candidate fusions with the chosen one, then a table of the others."""
    fusions = run.measured.fusions
    lines = [Line(records.fusion_title(f.fusion), f, is_marked=f.is_chosen) for f in fusions]
    shown = [line for i, line in enumerate(lines) if i < NUM_FUSIONS or line.is_marked]
    rest = [line for line in lines if line not in shown]
    return [
        Table("Candidate fusions", "Fusion", FUSION_COLUMNS, shown),
        Table(f"{len(rest)} more", "Fusion", FUSION_COLUMNS, rest),
    ]


def number_table(fusion: Mapping[str, Any], title: str = "") -> Table[Mapping[str, Any]]:
    """Return the fitted numbers of a fusion in recipe form that its title leaves out.

    Empty unless it has a table of numbers, such as weights or temperatures by teacher.
    """
    weighting = fusion.get("weighting", {})
    is_table = any(isinstance(value, dict) for value in weighting.values())
    options = {key: value for key, value in weighting.items() if is_table and key != "name"}
    rows: dict[str, Mapping[str, Any]] = {}
    for key, value in {**options, "temperatures": fusion.get("temperatures", {})}.items():
        if not isinstance(value, dict):
            rows[key] = {"all": value}
        elif any(isinstance(inner, dict) for inner in value.values()):
            rows |= {f"{key}, {name}": inner for name, inner in value.items()}
        elif value:
            rows[key] = value
    names = sorted({name: 0 for row in rows.values() for name in row}, key=lambda n: n == "all")
    columns: list[Column[Mapping[str, Any]]] = [
        Column(name, lambda row, name=name: row.get(name, ""), _option) for name in names
    ]
    lines = [Line(name, row) for name, row in rows.items()]
    return Table(title + records.fusion_title(fusion), "Option", columns, lines)


def _option(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} knots"
    return f"{value:.3g}".replace("-", form.MINUS) if isinstance(value, float) else str(value)


def chosen_table(run: RunFiles) -> Table[Mapping[str, Any]]:
    """Return the numbers of the chosen fusion."""
    return number_table(run.measured.chosen.fusion, "Chosen fusion: ")


def calibration_tables(run: RunFiles) -> list[Table[Any]]:
    """Return calibration on held-out text: models by domain, then all measures of each pair."""
    models = _calibrated_models(run)
    domains = dict.fromkeys(name for line in models for name in line.row.domains)
    # A single domain would repeat the total.
    names = ("all", *(domains if len(domains) > 1 else ()))

    def score(domain: str, model: records.CalibrationScore) -> records.DomainScore:
        return model if domain == "all" else _of(model, domain)

    def write(score: records.DomainScore) -> str:
        return f"{form.signed(score.overconfidence, 2)} / {form.percent(score.ece).rstrip(' %')}"

    by_domain = [Column(name, partial(score, name), write) for name in names]
    details: list[Column[records.DomainScore]] = [
        Column("NLL", "nll"),
        Column("Entropy", "entropy"),
        Column("NLL − H", "overconfidence", form.signed),
        Column("ECE", "ece", form.percent),
        Column("ECE over", "ece_over", form.percent),
        Column("ECE under", "ece_under", form.percent),
    ]
    lines = [
        Line(f"{m.name}, {name}", score(name, m.row), m.color, is_marked=m.is_marked)
        for m in models
        for name in names
    ]
    title = "Calibration on held-out text: NLL − H in nats / ECE in %"
    return [
        Table(title, "Model", by_domain, models),
        Table(f"All measures, {len(lines)} rows", "Model and domain", details, lines),
    ]


def _calibrated_models(run: RunFiles) -> list[Line[records.CalibrationScore]]:
    held_out = run.measured.held_out
    if held_out is None:
        return []
    lines = []
    for name, measure in held_out.teachers.items():
        rows = {name: measure.raw}
        # T = 1 would repeat the raw rows.
        if measure.temperature not in (None, 1.0):
            rows[f"{name}, T = {form.fixed(measure.temperature, 2)}"] = measure.calibrated
        color = teacher_color(name, run.teachers())
        lines += [Line(title, row, color) for title, row in rows.items()]
    return [*lines, Line("fused target", held_out.fused, is_marked=True)]


def disagreement_table(run: RunFiles) -> Table[int]:
    """Return Jensen-Shannon divergence and share of differing top-1 tokens per teacher pair."""
    pairs = run.measured.disagreement or records.Disagreement()

    def write(j: int, i: int) -> str:
        return f"{form.fixed(pairs.jsd[i][j])} / {form.percent(pairs.top1[i][j], 0)}"

    title = "Disagreement: Jensen-Shannon divergence in nats / share of differing top-1 tokens"
    columns = [Column(name, partial(write, j), str) for j, name in enumerate(pairs.teachers)]
    lines = [Line(name, i) for i, name in enumerate(pairs.teachers)]
    return Table(title, "Teacher", columns, lines)


def preflight_tables(run: RunFiles) -> list[Table[Any]]:
    """Return the tables that `collegium preflight` prints."""
    tables: list[Table[Any]] = [*teacher_tables(run), fusion_tables(run)[0], chosen_table(run)]
    tables += [disagreement_table(run), calibration_tables(run)[0]]
    return [table for table in tables if table.lines]


def cost_table(run: RunFiles) -> Table[Any]:
    """Return the size of each model and the cost of its training, also relative to the student."""
    student = best(run.rows("student")) or records.ModelInfo(name="", kind="student")
    size, time = student.num_parameters, student.train_seconds
    rows = [row for row in run.rows(*TRAINED, "teacher") if row.num_parameters or row.steps]
    lines: list[Line[Any]] = [_line(run, row) for row in rows]
    sizes = [row.num_parameters for row in run.rows("teacher") if row.num_parameters]
    if len(sizes) > 1:
        title = "all teachers combined"
        combined = records.ModelInfo(name=title, kind="teacher", num_parameters=sum(sizes))
        lines.append(Line(title, combined))

    def compression(row: records.ModelInfo) -> float | None:
        return row.num_parameters / size if row.num_parameters and size else None

    def speed(row: records.ModelInfo) -> str:
        tokens, seconds = row.train_tokens, row.train_seconds
        return f"{form.amount(tokens / seconds)}/s" if tokens and seconds else form.MISSING

    def slowdown(row: records.ModelInfo) -> float | None:
        if row.kind != "control" or not row.train_seconds or not time:
            return None
        return row.train_seconds / time - 1

    columns: list[Column[records.ModelInfo]] = [
        Column("Parameters", "num_parameters", form.whole),
        Column("Relative to student", compression, form.ratio),
        Column("Steps", "steps", form.whole),
        Column("Tokens", "train_tokens", form.amount),
        Column("Time", "train_seconds", form.duration),
        Column("Tokens/s", speed, str),
        Column("Time vs. student", slowdown, form.signed_percent),
    ]
    return Table("Size and training", "Model", columns, lines)


def cost_parts(run: RunFiles) -> dict[str, float]:
    """Return the seconds of each part of a run: all that was paid for the student."""
    parts = dict.fromkeys([OTHER_COST, *COST_PARTS.values()], 0.0)
    for name, stage in (run.stages or {}).items():
        parts[COST_PARTS.get(name.partition(" ")[0], OTHER_COST)] += stage.seconds or 0.0
    logs = (run.log or (), *run.controls.values())
    scores = [line.validation for log in logs for line in log if line.validation]
    seconds = {name: value for name, value in parts.items() if value > 0}
    if scores:
        seconds[VALIDATION_COST] = sum(score.seconds or 0.0 for score in scores)
    return seconds


def cost_note(run: RunFiles) -> str:
    """Return the parts as a sentence: `preflight 61 s, student 2 min 35 s`."""
    return ", ".join(f"{name} {form.duration(value)}" for name, value in cost_parts(run).items())


def stage_table(run: RunFiles) -> Table[records.Stage]:
    """Return status, wall time and share of the total time of each stage."""
    stages = run.stages or {}
    total = sum(stage.seconds or 0.0 for stage in stages.values())
    lines = [Line(name, stage) for name, stage in stages.items()]
    if lines:
        lines.append(Line("total", records.Stage(seconds=total), is_marked=True))
    columns: list[Column[records.Stage]] = [
        Column("Status", "status", form.text, is_text=True),
        # Without the UTC offset.
        Column(
            "Started", lambda s: (s.started or "")[:19].replace("T", " "), form.text, is_text=True
        ),
        Column("Time", "seconds", form.duration),
        Column("Share", lambda s: s.seconds / total if s.seconds and total else None, form.percent),
        Column("Note", lambda stage: stage.note or "", str, is_text=True),
    ]
    return Table("Stages", "Stage", columns, lines)


def environment_table(run: RunFiles) -> Table[Any]:
    """Return the machine and the versions of the packages."""
    values = run.environment.to_json() if run.environment else {}
    values |= values.pop("packages", {})
    lines = [Line(name, value) for name, value in values.items()]
    return Table("Environment", "Key", [Column("Value", str, form.text, is_text=True)], lines)
