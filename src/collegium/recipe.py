"""The recipe: one YAML file that is the sum of the option classes of all rooms."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from collegium.cache.codec import TARGETS
from collegium.cache.options import CacheOptions
from collegium.data.pack import DataOptions
from collegium.decode import FAILED, decode, hints, members, shown
from collegium.errors import RecipeError, nearest
from collegium.fusion.conflict import CONFLICTS
from collegium.fusion.fitted import WEIGHTINGS
from collegium.fusion.fuse import Fusion
from collegium.fusion.requirements import FIXED_PER_ROW, fusion_requirements, unmet
from collegium.losses.divergences import DIVERGENCES
from collegium.models.student import StudentOptions
from collegium.overrides import apply_override
from collegium.teachers.local import TeacherOptions
from collegium.train.objective import ObjectiveOptions
from collegium.train.options import TrainOptions
from collegium.types import STRICT
from collegium.yaml12 import Document, KeyPath, read_yaml, refuse_secrets, scalar

ControlName = Literal["ce_only", "ce_only_equal_compute", "best_single", "uniform", "entropy"]
FORMS = {
    (Fusion, "weighting"): WEIGHTINGS,
    (Fusion, "conflict"): CONFLICTS,
    (ObjectiveOptions, "divergence"): DIVERGENCES,
    (CacheOptions, "targets"): TARGETS,
}
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PreflightOptions:
    """How much is measured before training."""

    max_tokens: Annotated[int, Field(ge=1)] = 20_000
    """Tokens of the calibration split that each teacher reads."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Windows per forward pass."""
    candidates: Literal["standard", "extended"] = "extended"
    """`extended` tries every rule in every pool; `standard` leaves out what is fitted on calibration text (EM weights, also per domain, and the
    learned gate), the consensus rule and the power mean, and takes a third of the time. A route by domain is measured, and never
    chosen over a fusion."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateOptions:
    """What the table of results compares."""

    controls: list[ControlName] = field(default_factory=lambda: ["ce_only"])
    """Further students, trained from the same start, that show what the teachers are worth."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Windows per forward pass."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of the validation split that are scored; all of them by default."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """Everything that a run needs to know.

    Relative paths are relative to the current directory, not to the recipe's folder.
    """

    student: StudentOptions
    """The model that learns."""
    data: DataOptions
    """What it learns from."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "run"
    """Name of the run; the name of the recipe file when it is left out there."""
    output_dir: Path = Path()
    """Run folder; `runs/NAME` by default."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of all that is random."""
    teachers: dict[str, TeacherOptions] = field(default_factory=dict)
    """The frozen models by name; none for plain cross-entropy training."""
    fusion: Literal["auto"] | Fusion = "auto"
    """How the teachers become one target; `auto` takes what preflight measured to be best."""
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    """What is minimized."""
    train: TrainOptions = field(default_factory=TrainOptions)
    """How it is minimized."""
    preflight: PreflightOptions = field(default_factory=PreflightOptions)
    """What is measured before training."""
    cache: CacheOptions = field(default_factory=CacheOptions)
    """Whether the teachers answer once, ahead of training."""
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    """What is measured after it."""

    def __post_init__(self) -> None:
        if self.output_dir == Path():
            object.__setattr__(self, "output_dir", Path("runs") / self.name)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and change it by `train.max_steps=10` and the like.

    Raises:
        RecipeError: with every problem found, one per line, as `recipe.yaml:12: key.path: what; what to do`.
    """
    file = Path(path)
    document = read_yaml(_read_text(file), file.name)
    if not document.is_readable:
        _stop_at(document)
    if document.data is None:
        raise RecipeError(
            f"{file.name}: the recipe is empty; `collegium init` writes a commented one"
        )
    if not isinstance(document.data, dict):
        raise RecipeError(f"{file.name}: got {shown(document.data)}; must be a mapping of keys")
    document.data.setdefault("name", re.sub(r"[^A-Za-z0-9_.-]", "-", file.stem))
    for override in overrides:
        apply_override(document, override)
    _check_names(document)
    recipe = decode(Recipe, document.data, (), document=document, forms=FORMS)
    if recipe is not FAILED:
        _check_together(recipe, document)
    _stop_at(document)
    return recipe


def check_recipe(recipe: Recipe) -> None:
    """The checks across sections, for a recipe built in Python.

    Raises:
        RecipeError: parts that do not fit together, one per line.
    """
    document = Document("recipe")
    _check_together(recipe, document)
    _stop_at(document)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that loads back to an equal recipe."""
    return _to_yaml(plain(recipe))


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 (hex) of everything that shapes the result: all but the run's name and folder."""
    data = plain(recipe)
    kept = {key: value for key, value in data.items() if key not in ("name", "output_dir")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def decode_fusion(snippet: Any, where: str = "fusion") -> Fusion:
    """Build a fusion from the snippet of a recipe, as `preflight.json` holds it.

    Raises:
        RecipeError: the snippet does not decode.
    """
    document = Document(where)
    fusion = decode(Fusion, snippet, (), document=document, forms=FORMS)
    _stop_at(document)
    return fusion


def write_fusion(path: str | os.PathLike[str], snippet: Mapping[str, Any]) -> None:
    """Set `fusion` in a recipe file, keeping its comments; whole or not at all.

    Raises:
        RecipeError: the file is not YAML any more, or cannot be written.
    """
    file = Path(path)
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 4096
    try:
        data = yaml.load(_read_text(file))
        data["fusion"] = _quoted(dict(snippet))
        stream = io.StringIO()
        yaml.dump(data, stream)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(stream.getvalue(), encoding="utf-8")
        os.replace(partial, file)
    except (YAMLError, TypeError, OSError) as error:
        raise RecipeError(f"{file.name}: cannot write `fusion`: {error}") from error


def plain(value: Any) -> Any:
    """Options to plain data; an option with several forms gets its `name`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result: dict[str, Any] = {}
        for item in dataclasses.fields(value):
            if not item.init:
                continue
            result[item.name] = plain(_number(value, item.name))
            table = FORMS.get((type(value), item.name))
            if table is not None:
                name = next(
                    n for n, form in table.items() if form is type(getattr(value, item.name))
                )
                result[item.name] = {"name": name, **result[item.name]}
        return result
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return plain(value.value)
    return str(value) if isinstance(value, Path) else value


def _number(option: Any, name: str) -> Any:
    """A field's value; a whole number that stands for a float (a default of 0) is made one."""
    value = getattr(option, name)
    kinds = members(hints(type(option))[name])
    return float(value) if type(value) is int and float in kinds and int not in kinds else value


def _to_yaml(data: Any) -> str:
    yaml = YAML(typ="rt")
    yaml.width = 4096
    stream = io.StringIO()
    yaml.dump(_quoted(data), stream)
    return stream.getvalue()


def _quoted(value: Any) -> Any:
    """Quote the texts that would be read back as something else."""
    if isinstance(value, Mapping):
        return {_quoted(key): _quoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    if isinstance(value, str):
        try:
            is_text = scalar(value) == value and value.isprintable() and value == value.strip()
        except ValueError:
            is_text = False
        return value if is_text else DoubleQuotedScalarString(value)
    return value


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        folder = file.parent
        found = sorted(p.name for p in folder.glob("*.y*ml")) if folder.is_dir() else []
        names = ", ".join(found[:10]) or "none"
        raise RecipeError(f"{file}: not found; recipes in {folder}/: {names}") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{file}: is a folder; give the YAML file of a recipe") from error
    except UnicodeDecodeError as error:
        text = f"byte 0x{error.object[error.start]:02X} at offset {error.start} is not UTF-8"
        raise RecipeError(f"{file.name}: {text}; save the file as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from error


def _stop_at(document: Document) -> None:
    problems = sorted(document.problems, key=lambda problem: problem.line)
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(str(problem) for problem in problems)))


def _check_names(document: Document) -> None:
    """What must be refused before anything is decoded: secrets, and names that break paths."""
    refuse_secrets(document)
    teachers = document.data.get("teachers")
    for name in teachers if isinstance(teachers, dict) else ():
        if not _NAME.fullmatch(name):
            text = "a teacher's name must consist of letters, digits, `_` and `-`"
            document.add(("teachers", name), text)


def _check_together(recipe: Recipe, document: Document) -> None:
    """The checks that no single section can make."""
    if not recipe.teachers and recipe.objective.kd_ratio > 0:
        text = "give at least one teacher under `teachers:`, or set objective.kd_ratio: 0 for plain cross-entropy"
        document.add(("teachers",), text)
    if isinstance(recipe.fusion, Fusion):
        _check_fusion(recipe.fusion, recipe.teachers, document)
    features = recipe.objective.features
    for name in features.teacher_weights if features else ():
        if name not in recipe.teachers:
            text = f"got `{name}`; unknown teacher{nearest(name, recipe.teachers)}"
            document.add(("objective", "features", "teacher_weights"), text)
    if recipe.cache.enabled:
        _check_cache(recipe, document)
    _check_folders(recipe, document)


def _check_fusion(fusion: Fusion, teachers: Mapping[str, Any], document: Document) -> None:
    names: dict[KeyPath, list[str]] = {("temperatures",): list(fusion.temperatures)}
    weighting = fusion.weighting
    for path, table in weighting.teacher_tables().items():
        names[("weighting", *path)] = list(table)
        for missing in sorted(set(teachers) - set(table)):
            text = f"no weight for teacher `{missing}`; give one, 0 to leave it out"
            if not weighting.zero_excludes:
                text = f"nothing for teacher `{missing}`; fit it again with all teachers"
            document.add(("fusion", "weighting", *path), text)
    for path, name in weighting.teacher_fields().items():
        names[("weighting", *path)] = [name]
    for path, given in names.items():
        for name in given:
            if name not in teachers:
                text = f"got `{name}`; unknown teacher{nearest(name, teachers)}"
                document.add(("fusion", *path), text)


def _check_cache(recipe: Recipe, document: Document) -> None:
    if not recipe.teachers or recipe.objective.kd_ratio == 0:
        text = "needs teachers and objective.kd_ratio > 0; set it to false"
        document.add(("cache", "enabled"), text)
    if recipe.cache.features is not None and recipe.objective.features is None:
        text = "got some, and no term reads them; must go with objective.features; omit it, or add that"
        document.add(("cache", "features"), text)
    problems = unmet(recipe.objective.requirements(), recipe.cache.capabilities)
    if isinstance(recipe.fusion, Fusion):
        # A fused cache is built from live teachers, and may use any fusion that is fixed per row.
        is_fused = recipe.cache.kind == "fused"
        source = FIXED_PER_ROW if is_fused else recipe.cache.capabilities
        problems += unmet(fusion_requirements(recipe.fusion), source)
    for problem in problems:
        key, _, text = problem.partition(": ")
        document.add(tuple(key.split(".")), text)


def _check_folders(recipe: Recipe, document: Document) -> None:
    """The run folder, and what a run writes in it, must not be a folder that the run reads."""
    output = _resolved(recipe.output_dir)
    if "\0" in str(output):
        document.add(("output_dir",), "holds a NUL character; must be a path; remove it")
    written = [output / name for name in ("student", "train", "controls")]
    student = recipe.student
    inputs = {"student": student.model, "student's tokenizer": student.tokenizer}
    for name, options in recipe.teachers.items():
        inputs[f"teacher `{name}`"] = options.model
        inputs[f"tokenizer of teacher `{name}`"] = options.tokenizer
    for whose, given in inputs.items():
        if given is None:
            continue
        folder = _resolved(given)
        if folder == output or any(folder.is_relative_to(place) for place in written):
            where = "is also" if folder == output else "would overwrite"
            text = (
                f"got {recipe.output_dir}, which {where} the folder of the {whose}; choose another"
            )
            document.add(("output_dir",), text)
    for source in itertools.chain(*recipe.data.sources.values()):
        if source.path is not None and output.is_relative_to(_resolved(source.path)):
            text = (
                f"got {recipe.output_dir}, which lies in the data folder {source.path}, so that the "
                "run's own files would be read as text; choose another"
            )
            document.add(("output_dir",), text)


def _resolved(path: str | Path) -> Path:
    whole = os.path.expanduser(path)
    try:
        return Path(os.path.realpath(whole))
    except ValueError:  # no path of this system
        return Path(whole)
