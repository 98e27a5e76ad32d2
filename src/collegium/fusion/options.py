"""Options of a fusion: weighting, pool, temperatures and conflict policy."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import field
from typing import Annotated, Any

from pydantic import Field, model_validator

from collegium.errors import nearest
from collegium.fusion.conflict import CONFLICTS, Conflict, NoConflictPolicy
from collegium.fusion.fitted import WEIGHTINGS
from collegium.fusion.pools import PoolKind
from collegium.fusion.rules import PrefixLikelihood
from collegium.fusion.weighting import Weighting
from collegium.options import OneOf, option, plain
from collegium.storage.records import fusion_title


@option
class Fusion:
    """The rule that turns several teachers into one target."""

    weighting: Annotated[Weighting, OneOf(WEIGHTINGS)] = field(default_factory=PrefixLikelihood)
    """Weight of each teacher at each row."""
    pool: PoolKind = "linear"
    """linear: sum_k w_k P_k, covers every mode of every teacher.
    log_linear: prod_k P_k^w_k / Z, keeps what all teachers allow.
    power_mean: (sum_k w_k P_k^r)^(1/r) / Z, between the two."""
    exponent: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """r of power_mean. Near 1 it is the linear pool, near 0 the log-linear one."""
    temperatures: dict[str, Annotated[float, Field(gt=0)]] = field(default_factory=dict)
    """T_k by teacher name, applied to its logits first. 1 where missing."""
    pooled_temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the pooled distribution: p^(1/T), renormalized."""
    conflict: Annotated[Conflict, OneOf(CONFLICTS)] = field(default_factory=NoConflictPolicy)
    """Policy for rows where the teachers contradict each other."""

    @model_validator(mode="after")
    def _exponent_has_effect(self) -> Fusion:
        if self.pool != "power_mean" and self.exponent != 0.5:
            raise ValueError(
                f"exponent: got {self.exponent:g} with pool `{self.pool}`; must be omitted unless "
                "the pool is `power_mean`; remove it"
            )
        return self

    def problems(self, teachers: Collection[str]) -> Iterator[str]:
        """Yield `key: problem` for names that are no teacher, and teachers without an entry."""
        rule = self.weighting
        remedy = "0 leaves it out" if rule.zero_excludes else "fit it again"
        fields = {path: [name] for path, name in rule.teacher_fields().items()}
        tables = rule.teacher_tables()
        for path, table in tables.items():
            for name in (name for name in teachers if name not in table):
                text = f"got none for teacher `{name}`; must give one to each; {remedy}"
                yield f"fusion.weighting.{'.'.join(path)}: {text}"
        listed = {("weighting", *path): names for path, names in {**fields, **tables}.items()}
        for path, names in {("temperatures",): self.temperatures, **listed}.items():
            for name in (name for name in names if name not in teachers):
                hint = nearest(name, teachers)
                yield f"fusion.{'.'.join(path)}: got `{name}`; must be a teacher{hint}"


def describe(fusion: Fusion) -> str:
    """Return a short name, such as `prefix_likelihood(eta=0.3, decay=0.9), linear`."""
    return fusion_title(to_recipe(fusion))


def to_recipe(fusion: Fusion) -> dict[str, Any]:
    """Return the `fusion:` section of a recipe for this fusion, in plain dicts and numbers."""
    snippet = plain(fusion)
    # Other pools reject an exponent other than the default.
    if fusion.pool != "power_mean":
        del snippet["exponent"]
    if not fusion.conflict.is_active:
        del snippet["conflict"]
    return snippet
