"""Weights of loss terms over the steps of a run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from collegium.options import OneOf, option

Position = Annotated[float, Field(ge=0)]
"""A place in a run: a fraction of all steps if at most 1, else a number of steps."""
Factor = Annotated[float, Field(ge=0)]


class Schedule(ABC):
    """A factor of a weight that depends on the optimizer step only."""

    @abstractmethod
    def factor(self, step: int, num_steps: int) -> float:
        """Return the factor at step 0, 1, ... of a run of `num_steps`."""

    @abstractmethod
    def positions(self) -> Sequence[float]:
        """Return the positions at which the factor changes, ascending."""

    def start_steps(self, num_steps: int) -> Iterable[int]:
        """Yield the steps at which the factor may become zero."""
        return (math.ceil(_steps(position, num_steps)) for position in self.positions())


def _steps(position: float, num_steps: int) -> float:
    return position if position > 1 else position * num_steps


def _require_order(key: str, positions: Sequence[float]) -> None:
    """Check that positions have one unit and increase."""
    units = {position > 1 for position in positions if position > 0}
    is_ascending = all(before < after for before, after in pairwise(positions))
    if len(units) > 1 or not is_ascending:
        raise ValueError(
            f"{key}: got {', '.join(f'{position:g}' for position in positions)}; must increase, "
            "and be all fractions of the run (at most 1) or all steps"
        )


@option
class Linear(Schedule):
    """`initial` until `start`, `final` from `end` on, and a straight line in between."""

    initial: Factor
    """Factor until `start`."""
    final: Factor
    """Factor from `end` on."""
    start: Position = 0.0
    """In steps, or as a fraction of all steps if at most 1."""
    end: Position = 1.0
    """In steps, or as a fraction of all steps if at most 1."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _require_order("end", self.positions())
        return self

    def positions(self) -> Sequence[float]:
        return self.start, self.end

    def factor(self, step: int, num_steps: int) -> float:
        start, end = (_steps(position, num_steps) for position in self.positions())
        share = min(max((step - start) / (end - start), 0.0), 1.0)
        return self.initial + (self.final - self.initial) * share


@option
class ScheduleStage:
    """A stretch of a run with one factor."""

    factor: Factor
    """Factor of the term's weight. At 0 the term is not computed."""
    until: Position | None = None
    """End in steps, or as a fraction of all steps if at most 1. Null for the last stage only."""


@option
class Stages(Schedule):
    """One factor after the other."""

    stages: Annotated[list[ScheduleStage], Field(min_length=1)]
    """In order. All but the last one have an end."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        ends = [stage.until for stage in self.stages]
        if None in ends[:-1] or ends[-1] is not None:
            raise ValueError(
                "stages: must have `until` in all stages but the last, which ends with the run"
            )
        _require_order("stages", self.positions())
        return self

    def positions(self) -> Sequence[float]:
        return [stage.until for stage in self.stages if stage.until is not None]

    def factor(self, step: int, num_steps: int) -> float:
        ends = [_steps(position, num_steps) for position in self.positions()]
        return self.stages[sum(step >= end for end in ends)].factor


SCHEDULES: dict[str, type[Schedule]] = {"linear": Linear, "stages": Stages}
"""Name in a recipe -> class."""


@option
class Term:
    """One term of the loss."""

    log_name: ClassVar[str]
    """Its name in the log, where a second term of the kind gets `_2`."""

    weight: Factor = 1.0
    """Factor of the term."""
    schedule: Annotated[Schedule, OneOf(SCHEDULES)] | None = None
    """Further factor that changes during the run; null for 1."""

    def factor_at(self, step: int, num_steps: int) -> float:
        """Return the factor of the schedule at step 0, 1, ... of a run of `num_steps`."""
        return 1.0 if self.schedule is None else self.schedule.factor(step, num_steps)

    def weight_at(self, step: int, num_steps: int) -> float:
        """Return the weight at step 0, 1, ... of a run of `num_steps`."""
        return self.weight * self.factor_at(step, num_steps)


def first_idle_step(terms: Sequence[Term], num_steps: int) -> int | None:
    """Return a step of a run in which no term has a weight, None if there is none."""
    schedules = [term.schedule for term in terms if term.schedule is not None]
    starts = {0, *(step for one in schedules for step in one.start_steps(num_steps))}
    idle = [
        step
        for step in sorted(starts)
        if step < num_steps and not any(term.weight_at(step, num_steps) > 0 for term in terms)
    ]
    return idle[0] if idle else None
