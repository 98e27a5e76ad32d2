"""The file of a study: one base recipe, the factors that are varied, and what is read off every run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from collegium.decode import FAILED, decode, hints, shown
from collegium.errors import RecipeError, nearest
from collegium.fusion.rules import WEIGHTINGS
from collegium.types import STRICT
from collegium.yaml12 import read_yaml

PICK = "pick"
"""Key of a level that takes its fusion from what preflight fitted: `{weighting: gate, pool: linear, calibration: raw}`, and any option
of the weighting that tells its forms apart."""
ZooName = Literal["specialists", "generalists", "contradicting"]
MEASURES = {
    "fused_nll": "NLL of the fused target",
    "student_nll": "NLL of the student",
    "student_perplexity": "perplexity of the student",
    "student_ece": "ECE of the student",
    "student_overconfidence": "NLL − H of the student",
    "student_kl": "KL(fused target, student)",
    "calibration_nll": "NLL of the fused target on the calibration split",
    "rank_correlation": "rank correlation of weight and −NLL",
    "best_teacher_share": "P(highest weight = best teacher)",
    "regret": "regret against the best constant weights",
    "bytes_per_token": "bytes per target",
    "tokens_per_s": "target tokens per second",
    "train_seconds": "seconds of training",
}
"""What can be read off a run; `NAME@DOMAIN` is the same on one domain, for the first three."""
BY_DOMAIN = ("fused_nll", "student_nll", "student_perplexity")
Level = dict[str, Any]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FigureOptions:
    """One plot of a study."""

    kind: Literal["scatter", "lines", "dots"]
    """scatter: one point per setting, x and y measures, with their rank correlation. lines: y over the levels of the factor x, one line
    per level of `by`. dots: y of every setting, one dot per seed."""
    y: str
    """A measure."""
    x: str = ""
    """scatter: a measure. lines: a factor."""
    by: str = ""
    """lines: a factor; one line without it."""
    title: str = ""
    caption: str = ""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StudyOptions:
    """A study: every combination of the factors' levels, with every seed."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    question: str
    """What it is to answer, in one sentence."""
    base: Path
    """A recipe beside this file; `{seed}` in it stands for the seed of a run."""
    factors: dict[str, dict[str, Level]]
    """Factor -> level -> changes of the base recipe by dotted key, as on the command line; `pick` takes the fusion of that
    weighting, pool and calibration as preflight fitted it."""
    output_dir: Path = Path()
    """Folder of the study; `runs/study/NAME` by default."""
    seeds: Annotated[list[int], Field(min_length=1)] = field(default_factory=lambda: [0])
    """Each runs all settings; `{seed}` in the base picks teachers of its own for it."""
    zoo: list[ZooName] = field(default_factory=list)
    """Teachers that are trained first where they are missing, in runs/zoo."""
    students: bool = True
    """Whether students are trained; without them, the rows are the fusions of the preflight of each setting."""
    measures: Annotated[list[str], Field(min_length=1)] = field(
        default_factory=lambda: ["fused_nll", "student_nll", "student_perplexity"]
    )
    """Columns of the table."""
    figures: list[FigureOptions] = field(default_factory=list)
    """What the report shows."""

    @model_validator(mode="after")
    def _names_are_known(self) -> StudyOptions:
        if not self.factors or not all(self.factors.values()):
            raise ValueError("factors: got none; must be at least one with one level; add it")
        wanted = [*self.measures, *(figure.y for figure in self.figures)]
        wanted += [figure.x for figure in self.figures if figure.kind == "scatter"]
        for name in wanted:
            _check_measure(name)
        factors = [*self.factors, *(() if self.students else ("fusion",))]
        for figure in self.figures:
            given = [figure.x, figure.by] if figure.kind == "lines" else [figure.by]
            for factor in filter(None, given):
                if factor not in factors:
                    raise ValueError(
                        f"figures: got `{factor}`; must be a factor{nearest(factor, factors)}"
                    )
            if figure.kind == "lines" and not figure.x:
                raise ValueError("figures: got `lines` without x; must name a factor; add `x`")
        return self

    def settings(self) -> Iterator[tuple[dict[str, str], Level]]:
        """Every combination: factor -> name of its level, and the changes of all of them; later factors win."""
        for names in itertools.product(*self.factors.values()):
            levels = dict(zip(self.factors, names, strict=True))
            changes: Level = {}
            for factor, name in levels.items():
                changes.update(self.factors[factor][name])
            yield levels, changes


def _check_measure(name: str) -> None:
    base, at, domain = name.partition("@")
    if base not in MEASURES:
        raise ValueError(f"got `{name}`; must be a measure{nearest(base, MEASURES)}")
    if at and (base not in BY_DOMAIN or not domain):
        raise ValueError(f"got `{name}`; only {', '.join(BY_DOMAIN)} are known by domain")


def load_study(path: Path) -> StudyOptions:
    """Read the file of a study.

    Raises:
        RecipeError: with every problem found, one per line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{path}: cannot be read ({error}); give the YAML file of a study"
        ) from error
    document = read_yaml(text, path.name)
    if document.is_readable and not isinstance(document.data, dict):
        raise RecipeError(f"{path.name}: got {shown(document.data)}; must be a mapping of keys")
    study = FAILED
    if document.is_readable:
        _check_levels(document.data.get("factors"), path.name)
        study = decode(StudyOptions, document.data, (), document=document, forms={})
    if study is FAILED or document.problems:
        problems = sorted(document.problems, key=lambda problem: problem.line)
        raise RecipeError("\n".join(dict.fromkeys(map(str, problems))))
    return study


def _check_levels(factors: Any, where: str) -> None:
    """What the types cannot say: `pick` names a weighting, and factors that are to be told apart differ in their folder."""
    for factor, levels in factors.items() if isinstance(factors, dict) else ():
        slugs: dict[str, str] = {}
        for name, level in levels.items() if isinstance(levels, dict) else ():
            place = f"{where}: factors.{factor}.{name}"
            other = slugs.setdefault(slug(str(name)), str(name))
            if other != name:
                raise RecipeError(
                    f"{place}: has the same folder as `{other}`; must differ in a letter or digit"
                )
            if isinstance(level, Mapping) and PICK in level:
                _check_pick(level[PICK], f"{place}.{PICK}")


def _check_pick(pick: Any, place: str) -> None:
    name = pick.get("weighting") if isinstance(pick, Mapping) else None
    if name not in WEIGHTINGS:
        raise RecipeError(
            f"{place}.weighting: got {shown(name)}; must be a weighting{nearest(str(name), WEIGHTINGS)}"
        )
    known = ["weighting", "pool", "calibration", *hints(WEIGHTINGS[name])]
    for key in pick:
        if key not in known:
            raise RecipeError(f"{place}: got `{key}`; unknown key{nearest(str(key), known)}")


def slug(text: str) -> str:
    """A name as a folder: letters, digits, dots, signs; everything else one dash."""
    return re.sub(r"[^A-Za-z0-9.+]+", "-", text).strip("-").lower() or "-"
