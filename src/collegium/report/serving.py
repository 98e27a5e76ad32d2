"""Models as they would be served: table and Pareto plots of measure.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import neg, pos

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from collegium.report import canvas, colors
from collegium.report import formats as form
from collegium.report.run_files import RunFiles
from collegium.report.tables import Column, Line, Table
from collegium.storage.records import MeasuredModel, Number

GROUPS = {"student": "Student", "export": "Exports", "teacher": "Teachers"}
NEAR_ACROSS, NEAR_UP = 0.2, 0.05
"""Share of a panel within which two labels overlap."""


def decode_speed(model: MeasuredModel, batch: int = 1) -> Number:
    """Return the decoded tokens per second at a batch size, None if it was not measured."""
    speed = model.speeds.get(str(batch))
    return None if speed is None else speed.decode_tokens_per_s


def best_teacher(run: RunFiles) -> MeasuredModel | None:
    """Return the measured teacher with the fewest bits per byte, which one would serve instead."""
    scored = [
        (model.bits_per_byte, model)
        for model in run.measured_models("teacher")
        if model.bits_per_byte is not None and model.speeds
    ]
    return min(scored, key=lambda pair: pair[0])[1] if scored else None


def serving_table(run: RunFiles) -> Table[MeasuredModel]:
    """Return size, memory and speed of each model, also relative to the best teacher."""
    lines = []
    for kind, group in GROUPS.items():
        for number, model in enumerate(run.measured_models(kind)):
            heading, is_own = "" if number else group, kind != "teacher"
            color, is_student = _color(run, model), kind == "student"
            lines.append(
                Line(model.name, model, color, heading, is_marked=is_student, competes=is_own)
            )
    teacher = best_teacher(run)

    def relative(read: Callable[[MeasuredModel], Number]) -> Callable[[MeasuredModel], Number]:
        base = None if teacher is None else read(teacher)

        def share(model: MeasuredModel) -> Number:
            value = read(model)
            return value / base if value is not None and base else None

        return share

    def speed(batch: int, key: str) -> Callable[[MeasuredModel], Number]:
        return lambda model: getattr(model.speeds.get(str(batch)), key, None)

    throughput = [
        Column(
            f"{title}, batch {size}", speed(size, key), form.amount, neg, short=f"{title}\n×{size}"
        )
        for title, key in (("Prefill", "prefill_tokens_per_s"), ("Decode", "decode_tokens_per_s"))
        for size in (1, 8)
    ]
    columns: list[Column[MeasuredModel]] = [
        Column("Bytes", "bytes", form.amount, pos),
        Column("Memory", "peak_bytes", form.amount, pos),
        Column(
            "First token, ms", _first_token_ms, partial(form.fixed, digits=1), pos, short="ttft"
        ),
        *throughput,
        Column("Bits / byte", "bits_per_byte", form.fixed, pos, short="bits/\nbyte"),
        Column("Size vs. teacher", relative(lambda model: model.bytes), form.ratio, short="size"),
        Column("Speed vs. teacher", relative(decode_speed), form.ratio, short="speed"),
        Column("Note", lambda model: model.note or "", str, is_text=True, short=None),
    ]
    return Table("Served on this machine", "Model", columns, lines)


def _first_token_ms(model: MeasuredModel) -> Number:
    return None if model.first_token_s is None else 1000 * model.first_token_s


def serving_sentences(run: RunFiles) -> Iterator[str]:
    """Yield the conditions of the measurements, and the gain over the best teacher."""
    measured = run.measurements
    if measured is None:
        return
    yield (
        f"{measured.processor}, {measured.threads} thread{'s' * (measured.threads != 1)}, prompts "
        f"of {measured.prompt_tokens} tokens and {measured.new_tokens} new ones, medians of "
        f"{measured.rounds} interleaved rounds, each model in a process of its own."
    )
    teacher, own = best_teacher(run), run.measured_models("student", "export")
    base = None if teacher is None else decode_speed(teacher)
    fast = max(
        (one for one in own if decode_speed(one)), key=lambda m: decode_speed(m) or 0, default=None
    )
    if teacher is None or not base or fast is None or not fast.bytes or not teacher.bytes:
        return
    yield (
        f"{fast.name} decodes {form.ratio((decode_speed(fast) or 0) / base)} as fast as the best "
        f"teacher, {teacher.name}, with {form.percent(fast.bytes / teacher.bytes)} of its bytes."
    )


def _color(run: RunFiles, model: MeasuredModel) -> str:
    if model.kind == "teacher":
        return colors.teacher_color(model.name, run.teachers())
    return colors.STUDENT


def pareto_plot(run: RunFiles) -> Figure | None:
    """Plot bits per byte against decode speed at batch 1, and against bytes, with Pareto fronts."""
    models = [
        model
        for model in run.measured_models(*GROUPS)
        if model.bits_per_byte and decode_speed(model)
    ]
    if len(models) < 2:
        return None
    figure, (left, right) = canvas.new_figure(4.0, 2)
    _scatter(left, run, models, decode_speed, is_more_better=True)
    left.set(title="Quality and speed", xlabel="decoded tokens per second, batch 1 (logarithmic)")
    _scatter(right, run, models, lambda model: model.bytes, is_more_better=False)
    right.set(title="Quality and size", xlabel="bytes of weights (logarithmic)")
    return figure


def _scatter(
    axes: Axes,
    run: RunFiles,
    models: Sequence[MeasuredModel],
    read: Callable[[MeasuredModel], Number],
    *,
    is_more_better: bool,
) -> None:
    points = [(float(read(one) or 0), float(one.bits_per_byte or 0), one) for one in models]
    front = pareto_front([(x, y) for x, y, _ in points], is_more_better=is_more_better)
    xs, ys = zip(*front, strict=True)
    axes.plot(xs, ys, color=colors.MUTED, linewidth=1, zorder=1)
    for x, y, model in points:
        marker = {"student": "D", "export": "o", "teacher": "s"}[model.kind]
        axes.scatter([x], [y], color=_color(run, model), marker=marker, s=36, zorder=3)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.12)
    # Models at one place, as exports of one student are, have one label with a line each.
    for (x, y), names in _places(axes, points).items():
        text = "\n".join(map(canvas.label, names))
        axes.annotate(text, (x, y), (5, 4), textcoords="offset points", fontsize=8)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    # The text of a tick of a logarithmic axis is a formula by default, which the page shows raw.
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form.amount(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("bits per byte")


def _places(
    axes: Axes, points: Sequence[tuple[float, float, MeasuredModel]]
) -> dict[tuple[float, float], list[str]]:
    """Return the names at each point, together where their labels would overlap."""
    places: dict[tuple[float, float], list[str]] = {}
    to_axes = (axes.transData - axes.transAxes).transform
    for x, y, model in points:
        across, up = to_axes((x, y))
        for place, names in places.items():
            other_across, other_up = to_axes(place)
            if abs(across - other_across) < NEAR_ACROSS and abs(up - other_up) < NEAR_UP:
                names.append(model.name)
                break
        else:
            places[x, y] = [model.name]
    return places


def pareto_front(
    points: Sequence[tuple[float, float]], *, is_more_better: bool
) -> list[tuple[float, float]]:
    """Return the points (x, y) that no other beats in both, by x. Less of y is better."""
    sign = -1 if is_more_better else 1
    front = []
    for x, y in sorted(set(points), key=lambda point: (sign * point[0], point[1])):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return sorted(front)
