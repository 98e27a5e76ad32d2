"""Options of the loss terms that read no hidden states of teachers.

Shapes: N rows.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from collegium.errors import DataError
from collegium.losses.divergences import DIVERGENCES, Divergence, ForwardKL
from collegium.losses.schedule import Term
from collegium.options import OneOf, Tensor, option, torch
from collegium.types import Rows, domain_number


@option
class RowTerm(Term):
    """A term over the vocabulary, at all rows or those of some domains."""

    domains: Annotated[list[str], Field(min_length=1)] | None = None
    """Domains of the data whose rows have the term; null for all rows."""

    def is_read(self, rows: Rows) -> Tensor | None:
        """(N,) bool: the rows that have the term. None for all of them.

        Raises:
            DataError: the data has no domains.
        """
        if self.domains is None:
            return None
        if rows.domains is None:
            raise DataError(
                f"objective.terms: got the domains {', '.join(self.domains)} for data without "
                "domains; must have some; set `domain` of each source"
            )
        numbers = torch.tensor([domain_number(name) for name in self.domains])
        return torch.isin(rows.domains, numbers.to(rows.domains.device))


@option
class DivergenceTerm(RowTerm):
    """T^2 D(P^(1/T), softmax(z / T)) between the fused target P and the student."""

    log_name: ClassVar[str] = "kd"

    divergence: Annotated[Divergence, OneOf(DIVERGENCES)] = ForwardKL()
    """Divergence between fused target and student."""
    temperature: float = 1.0
    """Softens target and student. The divergence is multiplied by its square."""

    @field_validator("temperature")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError(f"got {value:g}; must be > 0; for hard labels use a `ce` term")
        return value

    def weight_at(self, step: int, num_steps: int) -> float:
        """Return the weight of D: it includes T^2."""
        return super().weight_at(step, num_steps) * self.temperature**2


@option
class CrossEntropyTerm(RowTerm):
    """Cross-entropy of the student at the label, at temperature 1."""

    log_name: ClassVar[str] = "ce"


@option
class RouterTerm(Term):
    """The load-balancing loss that a mixture of experts asks for, with the factor of its config.

    Without this term its weight is 1.
    """

    log_name: ClassVar[str] = "router"
