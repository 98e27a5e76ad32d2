"""Rows of results.json, and tables of an evaluation and a preflight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from collegium.errors import CollegiumError
from collegium.evaluate.metrics import Metrics
from collegium.evaluate.scoring import FUSED

Kind = Literal["untouched", "teacher", "fused", "student", "control"]
ResultsRow = Mapping[str, Any]
"""One object of results.json."""

KINDS: tuple[Kind, ...] = ("untouched", "teacher", "fused", "control", "student")
"""Kinds of rows in the order of the table."""

COLUMNS = (
    "model",
    "params",
    "perplexity",
    "bits/byte",
    "NLL-H",
    "ECE",
    "KL to fused",
    "agreement",
)
SHORT_HEADINGS = {
    "perplexity": "ppl",
    "bits/byte": "bits/\nbyte",
    "KL to fused": "KL to\nfused",
    "agreement": "agree",
}
"""Headings that let the table fit a terminal of 80 columns."""

MAX_SHOWN_FUSIONS = 15
"""Number of fusions in the terminal table, best first. The chosen one is always included."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Facts about a scored model besides its metrics, None where not applicable."""

    kind: Kind
    num_parameters: int | None = None
    steps: int | None = None
    train_tokens: int | None = None
    train_seconds: float | None = None
    note: str | None = None


def results_rows(
    metrics: Mapping[str, Metrics], model_info: Mapping[str, ModelInfo]
) -> list[dict[str, Any]]:
    """Return the rows of results.json: the description and the metrics of each model.

    Rows are ordered untouched, teacher, fused, control, student, and within one kind as in
    `metrics`. The fused target needs no entry in `model_info`.

    Raises:
        CollegiumError: a scored model is missing in `model_info`.
    """
    rows = []
    for name, scored in metrics.items():
        info = model_info.get(name, ModelInfo(kind="fused") if name == FUSED else None)
        if info is None:
            raise CollegiumError(
                f"results: got metrics of `{name}`; must have a description; add it to `model_info`"
            )
        row: dict[str, Any] = {
            "name": name,
            "kind": info.kind,
            "num_parameters": info.num_parameters,
            "steps": info.steps,
            "train_tokens": info.train_tokens,
            "train_seconds": info.train_seconds,
            "note": info.note,
        }
        rows.append(row | scored.to_dict())
    return sorted(rows, key=lambda row: KINDS.index(row["kind"]))


def render_table(rows: Sequence[ResultsRow], *, title: str = "Held-out evaluation") -> Table:
    """Render the evaluation for the terminal. The best student or control is bold."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.collapse_padding, table.pad_edge = True, False
    table.add_column("model", min_width=20)
    for column in COLUMNS[1:]:
        table.add_column(SHORT_HEADINGS.get(column, column), justify="right", no_wrap=True)
    best = _best_trained(rows)
    for number, row in enumerate(rows):
        style = "bold" if row["name"] == best else ""
        ends = number + 1 < len(rows) and rows[number + 1]["kind"] != row["kind"]
        # Text: a model name such as `[red]a` must not be read as rich markup.
        table.add_row(*(Text(cell) for cell in _cells(row)), style=style, end_section=ends)
    return table


def markdown_table(rows: Sequence[ResultsRow]) -> str:
    """Render the evaluation as a Markdown table without a trailing newline."""
    lines = [" | ".join(COLUMNS), " | ".join(["---"] + ["---:"] * (len(COLUMNS) - 1))]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in _cells(row)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def preflight_tables(report: Mapping[str, Any]) -> list[Table]:
    """Render the teachers, fusions, disagreement and held-out calibration of a preflight."""
    tables = [_teacher_table(report), _fusion_table(report), _disagreement_table(report)]
    if report.get("held_out"):
        tables.append(_held_out_table(report["held_out"]))
    return tables


def _teacher_table(report: Mapping[str, Any]) -> Table:
    domains = list(dict.fromkeys(d for t in report["teachers"].values() for d in t["domains"]))
    table = Table(title="Teachers on the calibration split", title_justify="left")
    table.add_column("teacher")
    for column in ("perplexity", "NLL", "NLL-H", "ECE", "T", "top-1", *domains):
        table.add_column(Text(column), justify="right", no_wrap=True)
    for name, teacher in report["teachers"].items():
        cells = [_number(teacher["perplexity"], ".2f"), _number(teacher["nll"], ".3f")]
        cells += [_number(teacher["overconfidence"], "+.3f"), _number(teacher["ece"], ".3f")]
        cells += [_number(teacher["temperature"], ".2f"), _number(teacher["top1"], ".1%")]
        cells += [_number(teacher["domains"].get(domain), ".3f") for domain in domains]
        table.add_row(Text(name), *cells)
    return table


def _fusion_table(report: Mapping[str, Any]) -> Table:
    entries = report["fusions"]
    is_shown = [
        at < MAX_SHOWN_FUSIONS or entry.get("is_chosen") for at, entry in enumerate(entries)
    ]
    shown = [entry for entry, is_here in zip(entries, is_shown, strict=True) if is_here]
    rest = len(entries) - len(shown)
    table = Table(
        title="Fused targets on the calibration split, "
        "each token scored under the fit of the other half",
        title_justify="left",
        caption=f"{rest} more in preflight.json and in the report" if rest else None,
        caption_justify="left",
    )
    table.add_column("fusion")
    table.add_column("calibration")
    for column in ("NLL", "against chosen, 95 %", "best first", "rank corr.", "regret"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in shown:
        cells = [_number(entry["nll"], ".4f"), _interval(entry.get("interval_to_chosen"))]
        cells += [_number(entry.get("best_teacher_share"), ".0%")]
        cells += [_number(entry.get("rank_correlation"), "+.2f")]
        cells += [_number((entry.get("regret") or {}).get("constant"), "+.3f")]
        is_chosen = entry.get("is_chosen", False)
        names = (Text(entry["name"]), Text(entry["calibration"]))
        table.add_row(*names, *cells, style="bold" if is_chosen else "")
    return table


def _interval(edges: Sequence[float | None] | None) -> str:
    return "–" if not edges else " … ".join(_number(edge, "+.3f") for edge in edges)


def _held_out_table(held_out: Mapping[str, Any]) -> Table:
    table = Table(
        title=f"Calibration on {held_out['num_tokens']:,} held-out tokens: NLL-H in nats / ECE",
        title_justify="left",
    )
    domains = list(held_out["fused"]["domains"])
    table.add_column("model")
    for column in ("all", *(domains if len(domains) > 1 else ())):
        table.add_column(Text(column), justify="right", no_wrap=True)
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for name, teacher in held_out["teachers"].items():
        rows.append((name, teacher["raw"]))
        if teacher["temperature"] not in (None, 1.0):
            rows.append((f"{name}, T={teacher['temperature']:.2f}", teacher["calibrated"]))
    rows.append(("fused target", held_out["fused"]))
    for title, figures in rows:
        groups = [figures, *(figures["domains"].get(domain, {}) for domain in domains)]
        # With a single domain its column would repeat `all`.
        if len(domains) < 2:
            groups = groups[:1]
        cells = [
            f"{_number(group.get('overconfidence'), '+.2f')} / {_number(group.get('ece'), '.3f')}"
            for group in groups
        ]
        table.add_row(Text(title), *cells, style="bold" if title == "fused target" else "")
    return table


def _disagreement_table(report: Mapping[str, Any]) -> Table:
    names = report["disagreement"]["teachers"]
    table = Table(
        title="Disagreement: Jensen-Shannon divergence in nats / share of different top-1 tokens",
        title_justify="left",
    )
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(Text(name), justify="right")
    pairs = zip(names, report["disagreement"]["jsd"], report["disagreement"]["top1"], strict=True)
    for name, jsd, top1 in pairs:
        cells = [
            f"{_number(a, '.3f')} / {_number(b, '.0%')}" for a, b in zip(jsd, top1, strict=True)
        ]
        table.add_row(Text(name), *cells)
    return table


def _cells(row: ResultsRow) -> list[str]:
    return [
        str(row["name"]),
        _count(row["num_parameters"]),
        _number(row["perplexity"], ".2f"),
        _number(row["bits_per_byte"], ".3f"),
        _number(row["overconfidence"], "+.3f"),
        _number(row["ece"], ".3f"),
        _number(row["kl_to_fused"], ".3f"),
        _number(row["agreement_fused"], ".1%"),
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _count(value: int | None) -> str:
    if value is None:
        return "–"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return str(value)


def _best_trained(rows: Sequence[ResultsRow]) -> str | None:
    trained = [r for r in rows if r["kind"] in ("student", "control") and r["nll"] is not None]
    return min(trained, key=lambda row: row["nll"])["name"] if trained else None
