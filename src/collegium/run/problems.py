"""Results of independent checks: facts and warnings, and their problems in one error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from collegium.errors import CollegiumError


@dataclass
class CheckReport:
    """Facts and warnings about a run that can work."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Problems:
    """The errors of independent checks, raised together."""

    def __init__(self) -> None:
        self.errors: list[CollegiumError] = []

    def collect(self, check: Callable[..., None], *args: Any, **options: Any) -> bool:
        """Run a check, and return whether it found no problem."""
        try:
            check(*args, **options)
        except CollegiumError as error:
            self.errors.append(error)
            return False
        return True

    def raise_all(self) -> None:
        """Raise the error if there is one, or one error with the lines of all."""
        if len(self.errors) > 1:
            kinds = {type(error) for error in self.errors}
            kind = kinds.pop() if len(kinds) == 1 else CollegiumError
            raise kind("\n".join(dict.fromkeys(map(str, self.errors))))
        for error in self.errors:
            raise error
