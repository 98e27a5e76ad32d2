"""The recipe: one YAML file that is the sum of the option classes of all packages.

Reading, decoding and checking raise RecipeError with every problem, one per line, such as
`recipe.yaml:12: train.lr: ...`.
"""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from ruamel.yaml.error import YAMLError

from collegium.cache.options import CacheOptions
from collegium.config.yaml import YamlDocument, decode, read_text, read_yaml, yaml_writer
from collegium.data.sources import PARTS, DataOptions, source_values
from collegium.distributions import Capabilities
from collegium.errors import RecipeError, nearest
from collegium.evaluate.options import MAX_SAMPLES, GenerationOptions, TaskName
from collegium.export.options import ExportOptions
from collegium.fusion.fuse import Fusion
from collegium.fusion.requirements import FIXED_PER_ROW, fusion_requirements, unmet
from collegium.fusion.weighting import SCALAR_BYTES
from collegium.models.kinds import AnyStudent
from collegium.options import option, plain
from collegium.storage.files import fingerprint, write_bytes
from collegium.teachers.kinds import AnyTeacher
from collegium.train.options import ObjectiveOptions, TrainOptions

ControlName = Literal["ce_only", "ce_only_equal_compute", "best_single", "uniform", "entropy"]
TeacherName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


@option
class PreflightOptions:
    """Measurements before training."""

    max_tokens: Annotated[int, Field(ge=1)] = 20_000
    """Tokens of the calibration split that each teacher reads."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Windows per forward pass, fewer where their activations exceed `memory`."""
    memory: Annotated[float, Field(gt=0)] = 2.0
    """GB for activations, logits and measurements, besides the weights of one teacher and the heads
    of all."""
    candidates: Literal["standard", "extended"] = "extended"
    """`extended` tries every rule in every pool. `standard` takes a third of the time: it omits
    what is fitted on calibration text, the consensus rule and the power mean."""


@option
class EvaluateOptions:
    """The table of results."""

    controls: list[ControlName] = field(default_factory=lambda: ["ce_only"])
    """Students trained from the same start, for comparison."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Windows per forward pass."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of the validation split to score. Defaults to all."""
    samples: Annotated[int, Field(ge=0, le=MAX_SAMPLES)] = 3
    """Prompts of the validation split that every model continues greedily, for the report. 0 for
    none."""
    generation: GenerationOptions | None = None
    """Continuations of held-out documents. None for none."""
    tasks: dict[TaskName, Path] = field(default_factory=dict)
    """JSONL file of each task, by a name of your choice."""


@option
class Recipe:
    """All options of a run. Relative paths are relative to the current directory."""

    student: AnyStudent
    """The model to train."""
    data: DataOptions
    """The text to train on."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "run"
    """Name of the run. In a file it defaults to the name of the file."""
    output_dir: Path = Path()
    """Run folder. Defaults to `runs/NAME`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of all random numbers."""
    teachers: dict[TeacherName, AnyTeacher] = field(default_factory=dict)
    """The frozen models by name. None for training on labels only."""
    fusion: Literal["auto"] | Fusion = "auto"
    """The rule that fuses the teachers. `auto` lets preflight choose."""
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    """The loss to minimize."""
    train: TrainOptions = field(default_factory=TrainOptions)
    """Length, batch size and optimizer."""
    preflight: PreflightOptions = field(default_factory=PreflightOptions)
    """Measurements before training."""
    cache: CacheOptions = field(default_factory=CacheOptions)
    """Teacher outputs computed once, before training."""
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
    """Measurements after training."""
    export: ExportOptions = field(default_factory=ExportOptions)
    """The student in the formats of other tools."""

    def __post_init__(self) -> None:
        if self.output_dir == Path():
            object.__setattr__(self, "output_dir", Path("runs") / self.name)


_OPTIONAL = {f.name for f in fields(Recipe) if f.default_factory is not MISSING}


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, changed by overrides such as `train.max_steps=10`."""
    file = Path(path)
    return decode_recipe(read_text(file), file.name, overrides)


def decode_recipe(text: str, file_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Build a recipe from the text of a file, whose name it has unless it names itself."""
    document = read_yaml(text, file_name, overrides)
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", Path(file_name).stem)
    # A section without keys has its defaults.
    items = document.data.items()
    given = {key: value for key, value in items if value is not None or key not in _OPTIONAL}
    document.data = {"name": name, **given}
    return decode(Recipe, document, _problems)


def check_recipe(recipe: Recipe) -> None:
    """Check a recipe built in Python across its sections."""
    YamlDocument("recipe").check(_problems(recipe))


def dump_recipe(recipe: Recipe) -> str:
    """Return YAML with every default, which loads back to an equal recipe."""
    stream = io.StringIO()
    yaml_writer().dump(plain(recipe), stream)
    return stream.getvalue()


def recipe_hash(recipe: Recipe) -> str:
    """Return the SHA-256 (hex) of all options that change a model or its scores."""
    without_effect = ("name", "output_dir", "export")
    values = {k: v for k, v in plain(recipe).items() if k not in without_effect}
    return fingerprint({**values, "data": data_values(values["data"])})


def data_values(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the data without the place of the corpus, which changes no window."""
    values = {name: value for name, value in data.items() if name != "corpus"}
    return values | {part: [source_values(one) for one in data.get(part, ())] for part in PARTS}


def decode_fusion(snippet: Any, where: str = "fusion") -> Fusion:
    """Build a fusion from the section of a recipe, as `preflight.json` holds it."""
    return decode(Fusion, YamlDocument(where, snippet))


def write_fusion(path: str | os.PathLike[str], snippet: Mapping[str, Any]) -> None:
    """Set `fusion` in a recipe file atomically, keeping its comments, or raise RecipeError."""
    file = Path(path)
    yaml, stream = yaml_writer(), io.StringIO()
    try:
        data = yaml.load(read_text(file))
        data["fusion"] = dict(snippet)
        yaml.dump(data, stream)
        write_bytes(file, stream.getvalue().encode())
    except (YAMLError, TypeError, OSError) as error:
        raise RecipeError(f"{file.name}: cannot write `fusion`: {error}") from error


def _problems(recipe: Recipe) -> Iterator[str]:
    """Yield `key: problem` for each problem that no section can see by itself."""
    objective = recipe.objective
    if not recipe.teachers and objective.has_divergence:
        remedy = "for training on labels set objective.kd_ratio: 0"
        yield f"teachers: got none; must be at least one under `teachers:`; {remedy}"
    yield from recipe.student.problems(recipe.teachers)
    if isinstance(recipe.fusion, Fusion):
        yield from recipe.fusion.problems(recipe.teachers)
        yield from objective.problems(recipe.fusion)
    for key, term in objective.state_terms():
        for option_name, names in term.named_teachers().items():
            for name in (name for name in names if name not in recipe.teachers):
                hint = nearest(name, recipe.teachers)
                yield f"{key}.{option_name}: got `{name}`; must be a teacher{hint}"
    if recipe.cache.enabled:
        yield from _cache_problems(recipe)
    yield from _memory_problems(recipe)
    yield from _folder_problems(recipe)


def _memory_problems(recipe: Recipe) -> Iterator[str]:
    options, number = recipe.preflight, len(recipe.teachers)
    needed = SCALAR_BYTES * options.max_tokens * number / 1e9
    if needed > options.memory:
        yield (
            f"preflight.memory: got {options.memory:g} GB; must be at least {needed:.2g} for the "
            f"measurements of {options.max_tokens:,} tokens with {number} teachers; raise it, or "
            "lower preflight.max_tokens"
        )


def _cache_problems(recipe: Recipe) -> Iterator[str]:
    cache = recipe.cache
    if not recipe.teachers or not recipe.objective.has_divergence:
        needs = "teachers and a divergence (objective.kd_ratio > 0)"
        yield f"cache.enabled: needs {needs}; set it to false"
    if cache.features is not None and not recipe.objective.state_terms():
        yield "cache.features: got some without objective.features; must go with them; omit it"
    for name in cache.ray.teachers if cache.ray else ():
        if name not in recipe.teachers:
            hint = nearest(name, recipe.teachers)
            yield f"cache.ray.teachers: got `{name}`; must be a teacher{hint}"
    yield from unmet(recipe.objective.requirements(), cache.capabilities)
    if isinstance(recipe.fusion, Fusion):
        yield from unmet(fusion_requirements(recipe.fusion), cache_source(cache))


def cache_source(cache: CacheOptions) -> Capabilities:
    """Return the operations that a fusion may use with this cache."""
    # A fused cache is built from live teachers, and may use any fusion that is fixed per row.
    return FIXED_PER_ROW if cache.kind == "fused" else cache.capabilities


def _folder_problems(recipe: Recipe) -> Iterator[str]:
    """The run must not write where it reads, nor read what it writes."""
    got, output = f"output_dir: got {recipe.output_dir}", _resolved(recipe.output_dir)
    if "\0" in str(output):
        yield "output_dir: got a NUL character; must be a path; remove it"
    owners = {"student": recipe.student} | {f"teacher `{n}`": t for n, t in recipe.teachers.items()}
    written = [output / name for name in ("student", "train", "controls")]
    for owner, options in owners.items():
        for key, path in options.paths().items():
            folder = _resolved(path)
            if folder == output or any(map(folder.is_relative_to, written)):
                files = owner if key == "model" else f"{key} of the {owner}"
                yield f"{got}, where the run would overwrite the {files}; choose another"
    for source in itertools.chain(*recipe.data.sources.values()):
        if source.path is not None and output.is_relative_to(_resolved(source.path)):
            problem = f"in the data folder {source.path}, which would read the run's own files"
            yield f"{got}, {problem}; choose another"


def _resolved(path: str | Path) -> Path:
    expanded = os.path.expanduser(path)
    try:
        return Path(os.path.realpath(expanded))
    except ValueError:  # no path of this system
        return Path(expanded)
