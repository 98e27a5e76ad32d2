"""Weights of terms over the steps of a run."""

from __future__ import annotations

import pydantic
import pytest

from collegium.losses.row_terms import CrossEntropyTerm, DivergenceTerm
from collegium.losses.schedule import Linear, ScheduleStage, Stages, first_idle_step


def stages(*pairs: tuple[float, float | None]) -> Stages:
    return Stages(stages=[ScheduleStage(factor=f, until=until) for f, until in pairs])


@pytest.mark.parametrize(
    ("schedule", "num_steps", "expected"),
    [
        (Linear(initial=1, final=0), 4, [1, 0.75, 0.5, 0.25]),
        (Linear(initial=0.2, final=1, start=2, end=6), 8, [0.2] * 3 + [0.4, 0.6, 0.8, 1, 1]),
        (Linear(initial=0, final=2, start=0.25, end=0.75), 8, [0, 0, 0, 0.5, 1, 1.5, 2, 2]),
        (stages((1, 0.5), (0, None)), 5, [1, 1, 1, 0, 0]),
        (stages((1, 2), (3, 4), (0.5, None)), 6, [1, 1, 3, 3, 0.5, 0.5]),
        (stages((2, 1), (0, None)), 3, [2, 2, 2]),  # a fraction: all of the run
        (stages((2, None)), 2, [2, 2]),
    ],
)
def test_factors(schedule, num_steps, expected):
    factors = [schedule.factor(step, num_steps) for step in range(num_steps)]
    assert factors == pytest.approx(expected)
    term = CrossEntropyTerm(weight=0.5, schedule=schedule)
    assert term.weight_at(1, num_steps) == pytest.approx(0.5 * expected[1])


def test_a_divergence_has_the_square_of_its_temperature():
    term = DivergenceTerm(weight=0.5, temperature=3.0)
    assert term.weight_at(7, 10) == 4.5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: stages((1, None), (0, None)),
        lambda: stages((1, 0.5), (0, 0.9)),
        lambda: stages((1, 0.5), (0, 0.4), (1, None)),
        lambda: stages((1, 0.5), (0, 10), (1, None)),
        lambda: Stages(stages=[]),
        lambda: Linear(initial=0, final=1, start=0.5, end=0.5),
        lambda: Linear(initial=0, final=1, start=10),
        lambda: Linear(initial=-1, final=1),
    ],
)
def test_impossible_schedules(wrong):
    with pytest.raises(pydantic.ValidationError):
        wrong()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    "schedules",
    [
        [None],
        [stages((1, 0.3), (0, None))],
        [stages((0, 0.3), (1, None))],
        [stages((1, 0.3), (0, None)), stages((0, 0.3), (1, None))],
        [stages((1, 0.3), (0, None)), stages((0, 0.35), (1, None))],
        [stages((1, 3), (0, 5), (1, None))],
        [Linear(initial=0, final=1)],
        [Linear(initial=1, final=0, start=0.1, end=0.7)],
        [Linear(initial=0, final=1, start=2, end=4), stages((1, 2), (0, None))],
        [Linear(initial=0, final=1, start=2, end=4), stages((1, 3), (0, None))],
    ],
)
def test_the_first_idle_step_is_found(schedules, num_steps):
    terms = [CrossEntropyTerm(schedule=schedule) for schedule in schedules]
    truth = [
        step
        for step in range(num_steps)
        if all(term.weight_at(step, num_steps) == 0 for term in terms)
    ]
    assert first_idle_step(terms, num_steps) == (truth[0] if truth else None)
