"""Plots of a report. Each function returns SVG bytes, or None if there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from collegium.report import canvas
from collegium.report.canvas import (
    MUTED,
    STUDENT,
    house_style,
    label,
    legend_below,
    new_figure,
    render,
    teacher_color,
    teacher_dash,
)
from collegium.report.colors import control_color, row_color
from collegium.report.files import LogStep, Number, ResultRow, RunFiles
from collegium.report.formats import perplexity
from collegium.report.headline import score
from collegium.report.marks import MAX_DRAWN, curve, heat_map, keys, legend, stack, steps_axis

WIDE = 10.4
"""Width of a figure in inches, the same as that of the page."""
TERM_COLORS = {"kd": STUDENT, "ce": "#e0a030"}
# From the palette of Paul Tol; these never share a panel with teachers.
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
    """Draw all plots that the run has data for, in page order."""
    figures: list[tuple[str, str, str, Callable[[RunFiles], bytes | None]]] = [
        ("perplexity", "Perplexity of all models",
         "Lower is better. The student is trained to match the fused target.", perplexity_plot),
        ("loss", "Training loss",
         "Nats per target token of the training text. The left panel shows the same measure for "
         "all runs.", loss_plot),
        ("weights", "Teacher weights",
         "Mean fusion weight of each teacher over the steps and on each domain.", weights_plot),
        ("trust", "Can the teachers be trusted?",
         "Left: does low entropy mean high accuracy? If a line does not fall, it does not. "
         "Right: points below the diagonal are overconfident.", trust_plot),
        ("disagreement", "Teacher disagreement",
         "Measured before training. Teachers that always agree add nothing to each other.",
         disagreement_plot),
        ("gradients", "Gradient shares and training speed",
         "Share of each loss term in the gradient at the hidden states, and training throughput.",
         gradient_plot),
    ]  # fmt: skip
    with house_style():
        drawn = [(key, title, caption, draw(run)) for key, title, caption, draw in figures]
    return [Plot(key, title, caption, svg) for key, title, caption, svg in drawn if svg is not None]


def perplexity_plot(run: RunFiles) -> bytes | None:
    """Plot the perplexity of all rows as bars, or as points on a log axis if the range is wide."""
    rows = [
        (row, value)
        for row in run.rows(*GROUP_ORDER)
        if (value := score(row)) is not None and value > 0
    ]
    if not rows:
        return None
    values = [min(value, MAX_DRAWN) for _, value in rows]
    figure, (axes,) = new_figure(WIDE, 0.9 + 0.3 * len(rows))
    # A bar starts at zero, which a logarithmic axis does not have.
    is_wide = max(values) / min(values) > 8
    colors = [row_color(row, run) for row, _ in rows]
    positions = np.arange(len(rows))
    if is_wide:
        floor = min(values) / 1.6
        axes.set_xscale("log")
        axes.hlines(positions, floor, values, colors=colors, linewidth=2.5, alpha=0.55)
        axes.scatter(values, positions, c=colors, s=46, zorder=3)
        axes.set_xlim(floor, max(values) * 1.8)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.barh(positions, values, color=colors, height=0.66)
        axes.set_xlim(0, max(values) * 1.12)
    for position, value, (_, exact) in zip(positions, values, rows, strict=True):
        axes.annotate(
            perplexity(exact), (value, position), (7, 0), textcoords="offset points", va="center"
        )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_yticks(positions, [label(row.title, 44) for row, _ in rows])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("perplexity (logarithmic)" if is_wide else "perplexity")
    return render(figure)


def loss_plot(run: RunFiles) -> bytes | None:
    """Plot the cross-entropy of student and controls, and the loss terms of the student."""
    log = run.log or ()
    figure, panels = new_figure(WIDE, 3.5, 2 if log else 1)
    # Only cross-entropy is comparable: totals of different objectives are not.
    has_ce = any("ce" in line.terms for line in log)
    panels[0].set_title("Cross-entropy" if has_ce or not log else "Loss")
    curve(panels[0], log, lambda line: line.terms.get("ce", line.loss), "student", STUDENT, "-")
    for i, (name, steps) in enumerate(run.controls.items()):
        color = control_color(i)
        curve(panels[0], steps, lambda line: line.terms.get("ce", line.loss), name, color, "--")
    if log:
        panels[1].set_title("Student loss terms")
        curve(panels[1], log, lambda line: line.loss, "total", canvas.INK, ":")
        for i, term in enumerate(keys(log, lambda line: line.terms)):
            color = _term_color(term, i)
            curve(panels[1], log, lambda line, term=term: line.terms.get(term), term, color, "-")
    if not any(axes.lines for axes in panels):
        return None
    for axes in panels:
        _finish_curves(axes, run)
        axes.set_ylabel("nats per token")
    return render(figure)


def _finish_curves(axes: Axes, run: RunFiles) -> None:
    logs = (run.log or (), *run.controls.values())
    steps_axis(axes, [line.step for log in logs for line in log])
    legend(axes)


def _term_color(term: str, index: int) -> str:
    return TERM_COLORS.get(term, FEATURE_COLORS[index % len(FEATURE_COLORS)])


def weights_plot(run: RunFiles) -> bytes | None:
    """Plot mean teacher weights over the steps (stacked areas) and per domain (heat map)."""
    log = [
        line for line in run.log or () if any(v is not None for v in line.teacher_weights.values())
    ]
    if not log:
        return None
    names = keys(log, lambda line: line.teacher_weights)
    domains, table = _domain_weights(log, names)
    figure, panels = new_figure(WIDE, max(3.7, 1.6 + 0.3 * len(domains)), 2 if domains else 1)
    shares = {name: [line.teacher_weights.get(name) for line in log] for name in names}
    colors = [teacher_color(name, run.teachers()) for name in names]
    stack(panels[0], [line.step for line in log], shares, colors)
    panels[0].set_title("Mean weight over steps")
    if domains:
        panels[1].set_title("Mean weight by domain")
        heat_map(
            panels[1],
            table,
            [label(d, 18) for d in domains],
            [label(n, 18) for n in names],
            "{:.2f}",
        )
    legend_below(figure, panels[0])
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
            logged = [value for value in values if value is not None]
            if logged:
                table[i, j] = sum(logged) / len(logged)
    return domains, table


def trust_plot(run: RunFiles) -> bytes | None:
    """Plot accuracy against entropy and confidence for teachers, fused target and student."""
    rows = [
        row
        for row in run.rows("teacher", "fused", "student")
        if row.entropy_bins or row.reliability
    ]
    if not rows:
        return None
    figure, (left, right) = new_figure(WIDE, 4.1, 2)
    # On the diagonal, confidence equals accuracy.
    right.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    for row in rows:
        bins, trust = row.entropy_bins, row.reliability
        if bins:
            _plot_bins(left, run, row, bins.entropy, bins.accuracy)
        if trust:
            _plot_bins(right, run, row, trust.confidence, trust.accuracy)
    left.set(
        title="Accuracy by entropy",
        xlabel="predictive entropy (nats)",
        ylabel="top-1 accuracy",
    )
    right.set(
        title="Reliability", xlabel="confidence", ylabel="top-1 accuracy", xlim=(0, 1), ylim=(0, 1)
    )
    left.set_ylim(bottom=0)
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    # Any model may lack one of the two; the legend needs a panel that has labels.
    source = left if left.get_legend_handles_labels()[0] else right
    if not source.get_legend_handles_labels()[0]:
        return None
    legend_below(figure, source)
    return render(figure)


def _plot_bins(
    axes: Axes, run: RunFiles, row: ResultRow, xs: Sequence[Number], ys: Sequence[Number]
) -> None:
    # Empty bins are null in results.json.
    pairs = [(x, y) for x, y in zip(xs, ys, strict=False) if x is not None and y is not None]
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
        color=row_color(row, run),
        linestyle=dash,
        linewidth=1.4 if is_teacher else 2.0,
        marker="o" if is_teacher else "D",
        markersize=3.5,
        label=label(row.title),
    )


def disagreement_plot(run: RunFiles) -> bytes | None:
    """Plot Jensen-Shannon divergence and share of differing top-1 tokens per teacher pair."""
    pairs = run.preflight.disagreement if run.preflight else None
    if pairs is None or len(pairs.teachers) < 2:
        return None
    size = len(pairs.teachers)
    tables = [
        ("Jensen-Shannon divergence (nats)", _square(pairs.jsd, size), "{:.3f}"),
        ("Share of differing top-1 tokens", _square(pairs.top1, size), "{:.0%}"),
    ]
    tables = [entry for entry in tables if np.isfinite(entry[1]).any()]
    if not tables:
        return None
    names = [label(name, 18) for name in pairs.teachers]
    figure, panels = new_figure(WIDE, max(2.8, 1.3 + 0.38 * size), len(tables))
    for axes, (title, table, form) in zip(panels, tables, strict=True):
        axes.set_title(title)
        heat_map(axes, table, names, names, form)
    return render(figure)


def _square(values: Sequence[Sequence[Number]], size: int) -> NDArray[np.float64]:
    """Return the values as (size, size), with NaN where nothing was measured."""
    # The diagonal is zero by definition and stays empty.
    table = np.full((size, size), np.nan)
    for i, line in enumerate(values[:size]):
        for j, value in enumerate(line[:size]):
            if i != j and value is not None:
                table[i, j] = value
    return table


def gradient_plot(run: RunFiles) -> bytes | None:
    """Plot the gradient share of each term and the target tokens per second."""
    # Shares are measured where a term acts: kd and ce at the last hidden state, features at taps.
    log = [line for line in run.log or () if any(v is not None for v in line.grad_shares.values())]
    logs = [("student", run.log or (), STUDENT, "-")]
    for i, (name, steps) in enumerate(run.controls.items()):
        logs.append((name, steps, control_color(i), "--"))
    has_speed = any(line.tokens_per_s is not None for _, steps, _, _ in logs for line in steps)
    num_panels = bool(log) + has_speed
    if not num_panels:
        return None
    figure, panels = new_figure(WIDE, 3.3, num_panels)
    if log:
        terms = keys(log, lambda line: line.grad_shares)
        shares = {term: [line.grad_shares.get(term) for line in log] for term in terms}
        colors = [_term_color(term, i) for i, term in enumerate(terms)]
        stack(panels[0], [line.step for line in log], shares, colors)
        panels[0].set_title("Gradient share by term")
        legend_below(figure, panels[0])
    if has_speed:
        axes = panels[-1]
        axes.set_title("Target tokens per second")
        for name, steps, color, dash in logs:
            curve(axes, steps, lambda line: line.tokens_per_s, name, color, dash)
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _finish_curves(axes, run)
    return render(figure)
