"""The study file: a base recipe, the factors to vary, and the measures to read from each run."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from collegium.config.yaml import decode, read_text, read_yaml, shown
from collegium.errors import nearest
from collegium.evaluate.tasks import TASK_METRICS
from collegium.fusion.fitted import WEIGHTINGS
from collegium.options import option
from collegium.study.measurements import BY_DOMAIN, MEASURES, find_measure

PICK = "pick"
"""Level key that selects a fusion fitted by preflight, such as `{weighting: gate, pool: linear,
calibration: raw}`. Any other option of the weighting narrows the selection."""
RANK = "rank"
"""Level key that keeps some teachers by their NLL in preflight, such as `{order: best, number: 3}`
with the orders `best`, `worst` (first), or the seed of a random one."""
ZooName = Literal[
    "specialists", "generalists", "contradicting", "scaling", "generations", "tasks", "smollm2"
]
Level = dict[str, Any]


@option
class FigureOptions:
    """One plot of a study."""

    kind: Literal["scatter", "lines", "series", "dots"]
    """scatter: one point per setting and seed, x and y measures, with their rank correlation.
    lines: y over the levels of the factor x, one line per level of `by`.
    series: y over the number that ends a level such as `best first, K = 3`, one line per
    beginning. A level without one, such as `K = 5`, is part of all lines.
    dots: y of every setting, one dot per seed."""
    y: str
    """A measure."""
    x: str = ""
    """scatter: a measure. lines: a factor."""
    by: str = ""
    """lines: a factor, or a single line if empty."""
    title: str = ""
    caption: str = ""


@option
class ContrastOptions:
    """A difference of two settings, with its intervals over documents and over seeds."""

    of: dict[str, str]
    """Factor -> level. A factor that is left out has its level in the baseline."""
    minus: dict[str, str]
    """The same of the other setting."""
    domains: list[str] = field(default_factory=list)
    """Domains whose documents count. All if empty."""


@option
class StudyOptions:
    """A study: all combinations of factor levels, each with every seed."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    question: str
    """The question to answer, in one sentence."""
    base: Path
    """A recipe file, relative to this one. `{seed}` in it is replaced by the seed of the run."""
    factors: dict[str, dict[str, Level]]
    """Factor -> level -> changes to the base recipe by dotted key, as on the command line.
    `pick` selects the fusion of this weighting, pool and calibration that preflight fitted, `rank`
    some teachers by their NLL."""
    output_dir: Path = Path()
    """Folder of the study. Defaults to `runs/study/NAME`."""
    seeds: Annotated[list[int], Field(min_length=1)] = field(default_factory=lambda: [0])
    """Each seed runs all settings. `{seed}` in the base can select teachers per seed."""
    zoo: list[ZooName] = field(default_factory=list)
    """Sets of teachers in runs/zoo, or in runs/smollm2, to train first if they are missing."""
    students: bool = True
    """Train students. If false, the rows are the fusions in the preflight of each setting."""
    measures: Annotated[list[str], Field(min_length=1)] = field(
        default_factory=lambda: ["fused_nll", "student_nll", "student_perplexity"]
    )
    """Columns of the table."""
    baseline: dict[str, str] = field(default_factory=dict)
    """Factor -> level of the setting that all others are compared with, by document and by seed."""
    contrasts: list[ContrastOptions] = field(default_factory=list)
    """More differences of two settings."""
    figures: list[FigureOptions] = field(default_factory=list)
    """Plots on the page."""

    def settings(self) -> Iterator[tuple[dict[str, str], Level]]:
        """Yield each combination as factor -> level name, and its changes (later factors win)."""
        for chosen in itertools.product(*(levels.items() for levels in self.factors.values())):
            names = dict(zip(self.factors, (name for name, _ in chosen), strict=True))
            yield names, {key: value for _, level in chosen for key, value in level.items()}


def load_study(path: Path) -> StudyOptions:
    """Read a study file.

    Raises:
        RecipeError: lists every problem, one per line.
    """
    return decode(StudyOptions, read_yaml(read_text(path), path.name), _problems)


def _problems(study: StudyOptions) -> Iterator[str]:
    if not study.factors or not all(study.factors.values()):
        yield "factors: got none; must be at least one with one level; add one"
    yield from _measure_problems("measures", study.measures)
    # Without students, the rows of a preflight add the level `fusion`.
    factors = [*study.factors, *(() if study.students else ("fusion",))]
    for figure in study.figures:
        has_lines = figure.kind == "lines"
        measures = [figure.y, figure.x] if figure.kind == "scatter" else [figure.y]
        yield from _measure_problems("figures", measures)
        for factor in filter(None, [figure.x, figure.by] if has_lines else [figure.by]):
            if factor not in factors:
                yield f"figures: got `{factor}`; must be a factor{nearest(factor, factors)}"
        if has_lines and not figure.x:
            yield "figures: got `lines` without x; must name a factor; add `x`"
    yield from _baseline_problems(study)
    yield from _contrast_problems(study)
    for factor, levels in study.factors.items():
        yield from _level_problems(f"factors.{factor}", levels)


def _level_problems(factor: str, levels: Mapping[str, Level]) -> Iterator[str]:
    slugs: dict[str, str] = {}
    for name, level in levels.items():
        key = f"{factor}.{name}"
        other = slugs.setdefault(slug(name), name)
        if other != name:
            # One folder for two levels would mix their runs.
            yield f"{key}: same folder as `{other}`; must differ in a letter or digit"
        if PICK in level:
            yield from _pick_problems(level[PICK], f"{key}.{PICK}")
        if RANK in level:
            yield from _rank_problems(level[RANK], f"{key}.{RANK}")


def _baseline_problems(study: StudyOptions) -> Iterator[str]:
    if study.baseline and not study.students:
        yield "baseline: got one without students; must be empty; leave it out"
    elif study.baseline and all(levels != study.baseline for levels, _ in study.settings()):
        factors = ", ".join(study.factors)
        yield f"baseline: got {shown(study.baseline)}; must name a level of each factor ({factors})"


def _contrast_problems(study: StudyOptions) -> Iterator[str]:
    if study.contrasts and not study.students:
        yield "contrasts: got some without students; must be empty; leave it out"
        return
    known = [levels for levels, _ in study.settings()]
    factors = ", ".join(study.factors)
    for number, contrast in enumerate(study.contrasts):
        for key, levels in (("of", contrast.of), ("minus", contrast.minus)):
            if {**study.baseline, **levels} not in known:
                yield (
                    f"contrasts.{number}.{key}: got {shown(levels)}; must name a level of each "
                    f"factor that has none in the baseline ({factors})"
                )


def _measure_problems(key: str, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        base, at, domain = name.partition("@")
        if find_measure(base) is None:
            hint = nearest(base, MEASURES)
            if "task_" in base:
                hint = f", such as task_NAME_METRIC; metrics: {', '.join(TASK_METRICS)}"
            yield f"{key}: got `{name}`; must be a measure{hint}"
        elif at and (base not in BY_DOMAIN or not domain):
            yield f"{key}: got `{name}`; only {', '.join(BY_DOMAIN)} exist by domain"


def _pick_problems(pick: Any, key: str) -> Iterator[str]:
    name = pick.get("weighting") if isinstance(pick, Mapping) else None
    if str(name) not in WEIGHTINGS:
        hint = nearest(str(name), WEIGHTINGS)
        yield f"{key}.weighting: got {shown(name)}; must be a weighting{hint}"
        return
    fields = (item.name for item in dataclasses.fields(WEIGHTINGS[name]))  # type: ignore[arg-type]
    allowed = ["weighting", "pool", "calibration", *fields]
    for option_name in pick:
        if option_name not in allowed:
            yield f"{key}: got `{option_name}`; unknown key{nearest(option_name, allowed)}"


def _rank_problems(rank: Any, key: str) -> Iterator[str]:
    values = dict(rank) if isinstance(rank, Mapping) else {}
    order, number = values.get("order"), values.get("number")
    is_order = order in ("best", "worst") or type(order) is int
    if values.keys() != {"order", "number"} or not is_order or type(number) is not int:
        yield f"{key}: got {shown(rank)}; must be {{order: best, worst or a seed, number: K}}"


def slug(text: str) -> str:
    """Return a folder name: letters, digits, dots and plus signs, with one dash for all else."""
    # Lower case, since some file systems ignore case.
    return re.sub(r"[^A-Za-z0-9.+]+", "-", text).strip("-").lower() or "-"
