"""The plots of a report: each function takes the run's files and gives SVG bytes, or None when there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from collegium.report import canvas
from collegium.report.canvas import (
    CONTROLS,
    FUSED,
    MUTED,
    STUDENT,
    house_style,
    label,
    new_figure,
    render,
    teacher_color,
    teacher_dash,
)
from collegium.report.files import LogStep, Number, ResultRow, RunFiles
from collegium.report.formats import perplexity
from collegium.report.verdict import score

WIDE = 10.4
"""Width of a figure in inches; the page is as wide."""
SMOOTH_FROM = 60
"""Curves with more points than this are drawn as a running mean over a faint line."""
MAX_ANNOTATED = 14
"""Heat maps with more rows or columns than this carry no numbers."""
TERM_COLORS = {"kd": STUDENT, "ce": "#e0a030"}
FEATURE_COLORS = ("#44aa99", "#aa4499", "#999933", "#88ccee", "#cc6677", "#117733")
GROUP_ORDER = ("student", "control", "fused", "teacher", "untouched")


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure of the page."""

    key: str
    title: str
    caption: str
    svg: bytes


def draw_all(run: RunFiles) -> list[Plot]:
    """Every plot the run has data for, in the order of the page."""
    figures: list[tuple[str, str, str, Callable[[RunFiles], bytes | None]]] = [
        ("perplexity", "Perplexity of every model", "Lower is better. The fused target is what the student imitates.", perplexity_plot),
        ("loss", "Training", "Per target token, on the training text; the left panel is the same measure for all.", loss_plot),
        ("weights", "Who teaches", "Mean fusion weight of each teacher, over the steps and on each domain.", weights_plot),
        ("trust", "Can the teachers be trusted?", "Left: does a low entropy mean being right? A line that does not fall says no. Right: below the diagonal is over-confident.", trust_plot),
        ("disagreement", "Do the teachers disagree?", "Measured before training. Teachers that agree everywhere have nothing to add to each other.", disagreement_plot),
        ("gradients", "What moves the student", "Share of each loss term in the gradient at the hidden states, and training speed.", gradient_plot),
    ]  # fmt: skip
    with house_style():
        drawn = [(key, title, caption, draw(run)) for key, title, caption, draw in figures]
    return [Plot(key, title, caption, svg) for key, title, caption, svg in drawn if svg is not None]


def perplexity_plot(run: RunFiles) -> bytes | None:
    """Perplexity of all rows as bars; as points on a logarithmic axis when the range is wide."""
    rows = [
        (row, value)
        for row in run.rows(*GROUP_ORDER)
        if (value := score(row)) is not None and value > 0
    ]
    if not rows:
        return None
    values = [value for _, value in rows]
    figure, (axes,) = new_figure(WIDE, 0.9 + 0.3 * len(rows))
    is_wide = max(values) / min(values) > 8
    colors = [_row_color(row, run) for row, _ in rows]
    places = np.arange(len(rows))
    if is_wide:
        floor = min(values) / 1.6
        axes.set_xscale("log")
        axes.hlines(places, floor, values, colors=colors, linewidth=2.5, alpha=0.55)
        axes.scatter(values, places, c=colors, s=46, zorder=3)
        axes.set_xlim(floor, max(values) * 1.8)
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.barh(places, values, color=colors, height=0.66)
        axes.set_xlim(0, max(values) * 1.12)
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            perplexity(value), (value, place), (7, 0), textcoords="offset points", va="center"
        )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.set_yticks(places, [label(row.name) for row, _ in rows])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("perplexity (logarithmic)" if is_wide else "perplexity")
    return render(figure)


def _row_color(row: ResultRow, run: RunFiles) -> str:
    if row.kind == "teacher":
        return teacher_color(row.name, run.teachers())
    if row.kind == "control":
        names = [control.name for control in run.rows("control")]
        return CONTROLS[names.index(row.name) % len(CONTROLS)]
    return {"student": STUDENT, "fused": FUSED}.get(row.kind, canvas.UNTOUCHED)


def loss_plot(run: RunFiles) -> bytes | None:
    """Cross-entropy of the student and its controls, and the terms of the student."""
    curves = [("student", run.log or (), STUDENT, "-")]
    for i, (name, log) in enumerate(run.controls.items()):
        curves.append((name, log, CONTROLS[i % len(CONTROLS)], "--"))
    terms = _keys(run.log or (), lambda line: line.terms)
    has_ce = any("ce" in line.terms for line in run.log or ())
    if not any(log for _, log, _, _ in curves):
        return None
    figure, (left, right) = new_figure(WIDE, 3.5, 2)
    for name, log, color, dash in curves:
        _curve(left, log, lambda line: line.terms.get("ce", line.loss), name, color, dash)
    left.set_title("Cross-entropy" if has_ce else "Loss")
    right.set_title("Terms of the student's loss")
    _curve(right, run.log or (), lambda line: line.loss, "total", canvas.INK, ":")
    for i, term in enumerate(terms):
        color = _term_color(term, i)
        _curve(right, run.log or (), lambda line, term=term: line.terms.get(term), term, color, "-")
    for axes in (left, right):
        _steps_axis(axes)
        axes.set_ylabel("nats per token")
        _legend(axes)
    return render(figure)


def _term_color(term: str, place: int) -> str:
    return TERM_COLORS.get(term, FEATURE_COLORS[place % len(FEATURE_COLORS)])


def _curve(
    axes: Axes,
    log: Sequence[LogStep],
    read: Callable[[LogStep], Number],
    name: str,
    color: str,
    dash: str,
) -> None:
    steps = np.array([line.step for line in log], dtype=float)
    values = _array([read(line) for line in log])
    if not np.isfinite(values).any():
        return
    if len(values) > SMOOTH_FROM:
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.25)
        values = _running_mean(values, max(3, len(values) // 40))
    marker = "o" if len(values) <= 3 else None
    axes.plot(steps, values, color=color, linestyle=dash, marker=marker, label=label(name))


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    known = np.isfinite(values)
    kernel = np.ones(width)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    mean = np.full_like(values, np.nan)
    return np.divide(total, count, out=mean, where=known & (count > 0))


def _array(values: Sequence[Number]) -> NDArray[np.float64]:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _keys(log: Sequence[LogStep], read: Callable[[LogStep], Mapping[str, Number]]) -> list[str]:
    return list(
        dict.fromkeys(key for line in log for key, value in read(line).items() if value is not None)
    )


def _steps_axis(axes: Axes) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _legend(axes: Axes, columns: int = 1) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles, names, loc="best", ncols=columns)


def weights_plot(run: RunFiles) -> bytes | None:
    """Mean teacher weights over the steps as stacked areas, and per domain as a heat map."""
    log = [
        line for line in run.log or () if any(v is not None for v in line.teacher_weights.values())
    ]
    if not log:
        return None
    names = _keys(log, lambda line: line.teacher_weights)
    domains, table = _domain_weights(log, names)
    figure, panels = new_figure(WIDE, max(3.7, 1.6 + 0.3 * len(domains)), 2 if domains else 1)
    shares = {name: [line.teacher_weights.get(name) for line in log] for name in names}
    colors = [teacher_color(name, run.teachers()) for name in names]
    _stack(panels[0], [line.step for line in log], shares, colors)
    panels[0].set_title("Mean weight over the steps")
    if domains:
        panels[1].set_title("Mean weight on each domain")
        _heat_map(
            panels[1],
            table,
            [label(d, 18) for d in domains],
            [label(n, 14) for n in names],
            "{:.2f}",
        )
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=min(5, len(names)))
    return render(figure)


def _domain_weights(
    log: Sequence[LogStep], names: Sequence[str]
) -> tuple[list[str], NDArray[np.float64]]:
    """Mean over the logged steps, (domains, teachers); NaN where a pair was never logged."""
    domains = list(dict.fromkeys(domain for line in log for domain in line.domain_weights))
    table = np.full((len(domains), len(names)), np.nan)
    for i, domain in enumerate(domains):
        for j, name in enumerate(names):
            values = [line.domain_weights.get(domain, {}).get(name) for line in log]
            known = [value for value in values if value is not None]
            if known:
                table[i, j] = sum(known) / len(known)
    return domains, table


def _stack(
    axes: Axes, steps: Sequence[int], shares: Mapping[str, Sequence[Number]], colors: Sequence[str]
) -> None:
    values = np.nan_to_num(np.stack([_array(column) for column in shares.values()]), nan=0.0)
    places = np.array(steps, dtype=float)
    if len(steps) == 1:
        # One logged step has no width: draw it as a bar.
        places, values = np.array([places[0] - 0.5, places[0] + 0.5]), np.repeat(values, 2, axis=1)
    polygons = axes.stackplot(places, values, colors=colors, edgecolor="white", linewidth=0.4)
    for polygon, name in zip(polygons, shares, strict=True):
        polygon.set_label(label(name))
    axes.set_xlim(places[0], places[-1])
    axes.set_ylim(0, max(1.0, float(values.sum(axis=0).max())))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False)
    _steps_axis(axes)


def _heat_map(
    axes: Axes, table: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], form: str
) -> None:
    known = table[np.isfinite(table)]
    top = float(known.max()) if known.size else 1.0
    axes.imshow(np.ma.masked_invalid(table), cmap="Blues", vmin=0.0, vmax=top or 1.0, aspect="auto")
    is_crowded = max(len(columns), max(map(len, columns)) * len(columns) // 10) > 5
    axes.set_xticks(np.arange(len(columns)), columns)
    if is_crowded:
        for text in axes.get_xticklabels():
            text.set(rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(rows)), rows)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if max(table.shape) > MAX_ANNOTATED:
        return
    for (i, j), value in np.ndenumerate(table):
        if math.isfinite(value):
            color = "white" if value > 0.6 * top else canvas.INK
            axes.text(j, i, form.format(value), ha="center", va="center", color=color, fontsize=8.5)


def trust_plot(run: RunFiles) -> bytes | None:
    """Accuracy against entropy, and accuracy against confidence, of teachers, fused target and student."""
    rows = [
        row
        for row in run.rows("teacher", "fused", "student")
        if row.entropy_bins or row.reliability
    ]
    if not rows:
        return None
    figure, (left, right) = new_figure(WIDE, 4.1, 2)
    right.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    for row in rows:
        bins, trust = row.entropy_bins, row.reliability
        if bins:
            _bins(left, run, row, bins.entropy, bins.accuracy)
        if trust:
            _bins(right, run, row, trust.confidence, trust.accuracy)
    left.set(
        title="Correct when sure?",
        xlabel="entropy of the prediction (nats)",
        ylabel="top-1 accuracy",
    )
    right.set(
        title="Reliability", xlabel="confidence", ylabel="top-1 accuracy", xlim=(0, 1), ylim=(0, 1)
    )
    left.set_ylim(bottom=0)
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    source = left if left.get_legend_handles_labels()[0] else right
    handles, names = source.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)))
    return render(figure)


def _bins(
    axes: Axes, run: RunFiles, row: ResultRow, places: Sequence[Number], heights: Sequence[Number]
) -> None:
    """One line through the bins that hold both values; empty bins are null."""
    pairs = [
        (x, y) for x, y in zip(places, heights, strict=False) if x is not None and y is not None
    ]
    if not pairs:
        return
    x, y = zip(*sorted(pairs), strict=True)
    is_teacher = row.kind == "teacher"
    dash = (
        teacher_dash(row.name, run.teachers())
        if is_teacher
        else "--"
        if row.kind == "fused"
        else "-"
    )
    axes.plot(
        x,
        y,
        color=_row_color(row, run),
        linestyle=dash,
        linewidth=1.4 if is_teacher else 2.0,
        marker="o" if is_teacher else "D",
        markersize=3.5,
        label=label(row.name),
    )


def disagreement_plot(run: RunFiles) -> bytes | None:
    """Jensen-Shannon divergence and share of different top-1 tokens of each pair of teachers."""
    found = run.preflight.disagreement if run.preflight else None
    if found is None or len(found.teachers) < 2:
        return None
    size = len(found.teachers)
    tables = [
        ("Jensen-Shannon divergence (nats)", _square(found.jsd, size), "{:.3f}"),
        ("Share of different top-1 tokens", _square(found.top1, size), "{:.0%}"),
    ]
    tables = [one for one in tables if np.isfinite(one[1]).any()]
    if not tables:
        return None
    names = [label(name, 14) for name in found.teachers]
    figure, panels = new_figure(WIDE, max(2.8, 1.3 + 0.38 * size), len(tables))
    for axes, (title, table, form) in zip(panels, tables, strict=True):
        axes.set_title(title)
        _heat_map(axes, table, names, names, form)
    return render(figure)


def _square(values: Sequence[Sequence[Number]], size: int) -> NDArray[np.float64]:
    """(size, size); the diagonal says nothing and is left empty."""
    table = np.full((size, size), np.nan)
    for i, line in enumerate(values[:size]):
        for j, value in enumerate(line[:size]):
            if i != j and value is not None:
                table[i, j] = value
    return table


def gradient_plot(run: RunFiles) -> bytes | None:
    """Share of each term in the gradient, and target tokens per second."""
    log = [line for line in run.log or () if any(v is not None for v in line.grad_shares.values())]
    logs = [("student", run.log or (), STUDENT, "-")]
    for i, (name, steps) in enumerate(run.controls.items()):
        logs.append((name, steps, CONTROLS[i % len(CONTROLS)], "--"))
    has_speed = any(line.tokens_per_s is not None for _, steps, _, _ in logs for line in steps)
    num_panels = bool(log) + has_speed
    if not num_panels:
        return None
    figure, panels = new_figure(WIDE, 3.3, num_panels)
    if log:
        terms = _keys(log, lambda line: line.grad_shares)
        shares = {term: [line.grad_shares.get(term) for line in log] for term in terms}
        colors = [_term_color(term, i) for i, term in enumerate(terms)]
        _stack(panels[0], [line.step for line in log], shares, colors)
        panels[0].set_title("Gradient share of each term")
        handles, names = panels[0].get_legend_handles_labels()
        panels[0].legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4)
    if has_speed:
        axes = panels[-1]
        axes.set_title("Target tokens per second")
        for name, steps, color, dash in logs:
            _curve(axes, steps, lambda line: line.tokens_per_s, name, color, dash)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _steps_axis(axes)
        _legend(axes)
    return render(figure)
