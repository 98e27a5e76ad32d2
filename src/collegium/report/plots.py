"""Plots of a run. Each function returns a figure, or None if there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from collegium.report import canvas, colors
from collegium.report.formats import perplexity
from collegium.report.run_files import RunFiles
from collegium.report.serving import pareto_plot
from collegium.storage.records import LogStep, Number, Numbers, ResultRow

TERM_COLORS = {"kd": colors.STUDENT, "ce": "#e0a030"}
# From the palette of Paul Tol; these never share a panel with teachers.
FEATURE_COLORS = ("#44aa99", "#aa4499", "#999933", "#88ccee", "#cc6677", "#117733")
GROUP_ORDER = ("student", "control", "fused", "teacher", "untouched")


def draw_all(run: RunFiles) -> dict[str, bytes]:
    """Return the SVG of each plot that the run has data for, in page order."""
    plots: dict[str, Callable[[RunFiles], Figure | None]] = {
        "perplexity": perplexity_plot,
        "pareto": pareto_plot,
        "loss": loss_plot,
        "validation": validation_plot,
        "weights": weights_plot,
        "conflict": conflict_plot,
        "trust": trust_plot,
        "disagreement": disagreement_plot,
        "gradients": gradient_plot,
    }
    with canvas.house_style():
        drawn = {key: draw(run) for key, draw in plots.items()}
        return {
            key: canvas.render_svg(figure) for key, figure in drawn.items() if figure is not None
        }


def perplexity_plot(run: RunFiles) -> Figure | None:
    """Plot the perplexity of all rows as bars, or as points on a log axis if the range is wide."""
    rows = [(row, row.perplexity) for row in run.rows(*GROUP_ORDER) if row.perplexity]
    if not rows:
        return None
    values = [min(value, canvas.MAX_DRAWN) for _, value in rows]
    figure, (axes,) = canvas.new_figure(0.9 + 0.3 * len(rows))
    # A bar starts at zero, which a logarithmic axis does not have.
    is_wide = max(values) / min(values) > 8
    row_colors = [colors.row_color(row, run) for row, _ in rows]
    positions = np.arange(len(rows))
    if is_wide:
        floor = min(values) / 1.6
        axes.set_xscale("log")
        axes.hlines(positions, floor, values, colors=row_colors, linewidth=2.5, alpha=0.55)
        axes.scatter(values, positions, c=row_colors, s=46, zorder=3)
        axes.set_xlim(floor, max(values) * 1.8)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.barh(positions, values, color=row_colors, height=0.66)
        axes.set_xlim(0, max(values) * 1.12)
    for position, value, (_, exact) in zip(positions, values, rows, strict=True):
        axes.annotate(
            perplexity(exact), (value, position), (7, 0), textcoords="offset points", va="center"
        )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_yticks(positions, [canvas.label(row.title, 44) for row, _ in rows])
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("perplexity (logarithmic)" if is_wide else "perplexity")
    return figure


def loss_plot(run: RunFiles) -> Figure | None:
    """Plot the cross-entropy of student and controls, and the loss terms of the student."""
    log = run.log or ()
    figure, panels = canvas.new_figure(3.5, 2 if log else 1)
    # Only cross-entropy is comparable: totals of different objectives are not.
    has_ce = any("ce" in line.terms for line in log)
    panels[0].set_title("Cross-entropy" if has_ce or not log else "Loss")
    _all_curves(panels[0], run, lambda line: line.terms.get("ce", line.loss))
    if log:
        panels[1].set_title("Student loss terms")
        canvas.curve(panels[1], log, lambda line: line.loss, "total", colors.INK, ":")
        for i, term in enumerate(canvas.keys(log, lambda line: line.terms)):
            color = _term_color(term, i)
            canvas.curve(panels[1], log, lambda line, t=term: line.terms.get(t), term, color)
        canvas.finish_curves(panels[1], [line.step for line in log])
    for axes in panels:
        axes.set_ylabel("nats per token")
    return figure if any(axes.lines for axes in panels) else None


def validation_plot(run: RunFiles) -> Figure | None:
    """Plot the NLL of the validation text during training, of the student and of all controls."""
    figure, (axes,) = canvas.new_figure(3.3)
    logs = {"student": run.log or (), **run.controls}
    curves = {name: [line for line in log if line.validation] for name, log in logs.items()}
    for i, (name, log) in enumerate(curves.items()):
        color = colors.control_color(i - 1) if i else colors.STUDENT
        dash = "--" if i else "-"
        canvas.curve(
            axes, log, lambda line: line.validation and line.validation.nll, name, color, dash
        )
    canvas.finish_curves(axes, [line.step for log in curves.values() for line in log])
    student = next(iter(run.rows("student")), None)
    if student is not None and student.best_step is not None:
        axes.axvline(student.best_step, color=colors.MUTED, linewidth=1, linestyle=(0, (2, 3)))
    axes.set_ylabel("nats per token")
    return figure if any(curves.values()) else None


def _all_curves(axes: Axes, run: RunFiles, read: Callable[[LogStep], Number]) -> None:
    """Plot one value of the student and of all controls."""
    canvas.curve(axes, run.log or (), read, "student", colors.STUDENT)
    for i, (name, steps) in enumerate(run.controls.items()):
        canvas.curve(axes, steps, read, name, colors.control_color(i), "--")
    logs = (run.log or (), *run.controls.values())
    canvas.finish_curves(axes, [line.step for log in logs for line in log])


def _term_color(term: str, index: int) -> str:
    return TERM_COLORS.get(term, FEATURE_COLORS[index % len(FEATURE_COLORS)])


def weights_plot(run: RunFiles) -> Figure | None:
    """Plot mean teacher weights over the steps (stacked areas) and per domain (heat map)."""
    log = [line for line in run.log or () if line.teacher_weights]
    names = canvas.keys(log, lambda line: line.teacher_weights)
    if not names:
        return None
    title = "Mean weight by domain"
    figure, axes = _beside_domains(3.7, title, log, names, lambda line: line.domain_weights)
    axes.set_title("Mean weight over steps")
    shares = {name: [line.teacher_weights.get(name) for line in log] for name in names}
    stack_colors = [colors.teacher_color(name, run.teachers()) for name in names]
    canvas.stack(axes, [line.step for line in log], shares, stack_colors)
    canvas.legend_below(figure, axes)
    return figure


def conflict_plot(run: RunFiles) -> Figure | None:
    """Plot the effect of the conflict policy over the steps and per domain."""
    log = [line for line in run.log or () if line.conflict.applied is not None]
    if not log:
        return None
    rates = {"disagreement": colors.MUTED, "applied": colors.STUDENT}

    def by_domain(line: LogStep) -> dict[str, Numbers]:
        return {domain: dict(effect) for domain, effect in line.conflict.domains.items()}

    figure, axes = _beside_domains(3.3, "Mean by domain", log, list(rates), by_domain)
    for rate, color in rates.items():
        canvas.curve(axes, log, lambda line, rate=rate: getattr(line.conflict, rate), rate, color)
    axes.set(title="Mean over steps", ylim=(0, 1))
    canvas.finish_curves(axes, [line.step for line in log])
    return figure


def _beside_domains(
    height: float,
    title: str,
    log: Sequence[LogStep],
    names: Sequence[str],
    read: Callable[[LogStep], Mapping[str, Numbers]],
) -> tuple[Figure, Axes]:
    """Create a figure with an empty panel, and beside it a heat map of the means by domain."""
    domains, table = domain_means(log, names, read)
    figure, panels = canvas.new_figure(max(height, 1.6 + 0.3 * len(domains)), 1 + bool(domains))
    if domains:
        panels[1].set_title(title)
        canvas.heat_map(panels[1], table, domains, names, "{:.2f}")
    return figure, panels[0]


def domain_means(
    log: Sequence[LogStep], names: Sequence[str], read: Callable[[LogStep], Mapping[str, Numbers]]
) -> tuple[list[str], NDArray[np.float64]]:
    """Return domains and means over the steps (domains, names), NaN where a pair has no value."""
    domains = list(dict.fromkeys(domain for line in log for domain in read(line)))
    table = np.full((len(domains), len(names)), np.nan)
    for i, domain in enumerate(domains):
        for j, name in enumerate(names):
            values = canvas.array(read(line).get(domain, {}).get(name) for line in log)
            if np.isfinite(values).any():
                table[i, j] = np.nanmean(values)
    return domains, table


def trust_plot(run: RunFiles) -> Figure | None:
    """Plot accuracy against entropy and confidence for teachers, fused target and student."""
    figure, (left, right) = canvas.new_figure(4.1, 2)
    # On the diagonal, confidence equals accuracy.
    right.plot([0, 1], [0, 1], color=colors.MUTED, linewidth=1, linestyle=(0, (2, 3)))
    for row in run.rows("teacher", "fused", "student"):
        if row.entropy_bins:
            _plot_bins(left, run, row, row.entropy_bins.entropy, row.entropy_bins.accuracy)
        if row.reliability:
            _plot_bins(right, run, row, row.reliability.confidence, row.reliability.accuracy)
    left.set(
        title="Accuracy by entropy", xlabel="predictive entropy (nats)", ylabel="top-1 accuracy"
    )
    right.set(
        title="Reliability", xlabel="confidence", ylabel="top-1 accuracy", xlim=(0, 1), ylim=(0, 1)
    )
    left.set_ylim(bottom=0)
    for axis in (left.yaxis, right.yaxis, right.xaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    # Any model may lack one of the two; the legend needs a panel that has labels.
    for panel in (left, right):
        if panel.get_legend_handles_labels()[0]:
            canvas.legend_below(figure, panel)
            return figure
    return None


def _plot_bins(
    axes: Axes, run: RunFiles, row: ResultRow, xs: Sequence[Number], ys: Sequence[Number]
) -> None:
    # Empty bins are null in results.json.
    pairs = [(x, y) for x, y in zip(xs, ys, strict=False) if x is not None and y is not None]
    if not pairs:
        return
    is_teacher = row.kind == "teacher"
    axes.plot(
        *zip(*sorted(pairs), strict=True),
        color=colors.row_color(row, run),
        linestyle="--" if row.kind == "fused" else colors.teacher_dash(row.name, run.teachers()),
        linewidth=1.4 if is_teacher else 2.0,
        marker="o" if is_teacher else "D",
        markersize=3.5,
        label=canvas.label(row.title),
    )


def disagreement_plot(run: RunFiles) -> Figure | None:
    """Plot Jensen-Shannon divergence and share of differing top-1 tokens per teacher pair."""
    pairs = run.measured.disagreement
    if pairs is None or len(pairs.teachers) < 2:
        return None
    figure, panels = canvas.new_figure(max(2.8, 1.3 + 0.38 * len(pairs.teachers)), 2)
    for axes, title, values, form in (
        (panels[0], "Jensen-Shannon divergence (nats)", pairs.jsd, "{:.3f}"),
        (panels[1], "Share of differing top-1 tokens", pairs.top1, "{:.0%}"),
    ):
        table = np.stack([canvas.array(line) for line in values])
        # The diagonal is zero by definition and stays empty.
        np.fill_diagonal(table, np.nan)
        axes.set_title(title)
        canvas.heat_map(axes, table, pairs.teachers, pairs.teachers, form)
    return figure


def gradient_plot(run: RunFiles) -> Figure | None:
    """Plot the gradient share of each term and the target tokens per second."""
    # Shares are measured where a term acts: kd and ce at the last hidden state, features at taps.
    log = [line for line in run.log or () if line.grad_shares]
    terms = canvas.keys(log, lambda line: line.grad_shares)
    logs = (run.log or (), *run.controls.values())
    has_speed = any(line.tokens_per_s is not None for steps in logs for line in steps)
    if not terms and not has_speed:
        return None
    figure, panels = canvas.new_figure(3.3, bool(terms) + has_speed)
    if terms:
        shares = {term: [line.grad_shares.get(term) for line in log] for term in terms}
        term_colors = [_term_color(term, i) for i, term in enumerate(terms)]
        canvas.stack(panels[0], [line.step for line in log], shares, term_colors)
        panels[0].set_title("Gradient share by term")
        canvas.legend_below(figure, panels[0])
    if has_speed:
        axes = panels[-1]
        axes.set_title("Target tokens per second")
        _all_curves(axes, run, lambda line: line.tokens_per_s)
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return figure
