"""The files of a run folder as typed records; a file that is not there is `None` or empty, never a guess."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from collegium.errors import CollegiumError

Number = float | None
"""A measured value, or None where it does not apply or was not finite."""

T = TypeVar("T")


def _empty_if_null(value: object) -> object:
    return {} if value is None else value


Numbers = Annotated[dict[str, Number], BeforeValidator(_empty_if_null)]


class Record(BaseModel):
    """An object of a run's files: types are strict, unknown keys are left alone (a newer version may add some)."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class LogStep(Record):
    """One line of `train/log.jsonl`."""

    step: int
    epoch: Number = None
    loss: Number = None
    learning_rate: Number = None
    grad_norm: Number = None
    tokens_per_s: Number = None
    num_tokens: Number = None
    terms: Numbers = {}
    term_weights: Numbers = {}
    grad_shares: Numbers = {}
    teacher_weights: Numbers = {}
    domain_weights: Annotated[dict[str, Numbers], BeforeValidator(_empty_if_null)] = {}


class DomainScore(Record):
    """Metrics of one model on one domain; NLL in nats per token."""

    nll: Number = None
    perplexity: Number = None
    bits_per_byte: Number = None
    num_tokens: Number = None


class Reliability(Record):
    """Mean confidence and accuracy of each confidence bin."""

    confidence: list[Number] = []
    accuracy: list[Number] = []
    count: list[Number] = []


class EntropyBins(Record):
    """Accuracy and NLL of the tokens in each bin of predicted entropy (nats)."""

    entropy: list[Number] = []
    accuracy: list[Number] = []
    nll: list[Number] = []
    count: list[Number] = []


class ResultRow(Record):
    """One row of the evaluation table."""

    name: str
    kind: Literal["untouched", "teacher", "fused", "student", "control"]
    note: str | None = None
    num_parameters: Number = None
    nll: Number = None
    perplexity: Number = None
    bits_per_byte: Number = None
    entropy: Number = None
    overconfidence: Number = None
    ece: Number = None
    top1: Number = None
    kl_to_fused: Number = None
    agreement_fused: Number = None
    agreement: Numbers = {}
    num_tokens: Number = None
    num_bytes: Number = None
    steps: Number = None
    train_tokens: Number = None
    train_seconds: Number = None
    domains: Annotated[dict[str, DomainScore], BeforeValidator(_empty_if_null)] = {}
    reliability: Reliability | None = None
    entropy_bins: EntropyBins | None = None

    @property
    def title(self) -> str:
        """The name where the kind is plain from its place."""
        return self.name.removeprefix(f"{self.kind}: ")


class TeacherMeasure(Record):
    """What the preflight found out about one teacher."""

    nll: Number = None
    perplexity: Number = None
    entropy: Number = None
    ece: Number = None
    overconfidence: Number = None
    temperature: Number = None
    top1: Number = None
    domains: Numbers = {}


class Disagreement(Record):
    """Pairwise distances of the teachers: Jensen-Shannon divergence (nats) and share of different top-1 tokens."""

    teachers: list[str] = []
    jsd: list[list[Number]] = []
    top1: list[list[Number]] = []


class FusionMeasure(Record):
    """One candidate fusion and the NLL of its fused target."""

    name: str = ""
    nll: Number = None
    calibration: str | None = None
    domains: Numbers = {}
    is_chosen: bool = False
    interval: list[Number] | None = None
    interval_to_chosen: list[Number] | None = None
    best_teacher_share: Number = None
    rank_correlation: Number = None
    regret: Numbers = {}
    weights: Numbers = {}
    leave_one_out: Numbers = {}


class DomainCalibration(Record):
    """How far the confidence of a model is from the truth; NLL and entropy in nats per token, ECE and its halves as shares."""

    nll: Number = None
    entropy: Number = None
    overconfidence: Number = None
    ece: Number = None
    ece_over: Number = None
    ece_under: Number = None


class CalibrationMeasure(DomainCalibration):
    """The same on all held-out text, and on each domain of it."""

    domains: dict[str, DomainCalibration] = {}


class TeacherCalibration(Record):
    """One teacher as it is, and at its own temperature."""

    raw: CalibrationMeasure = CalibrationMeasure()
    temperature: Number = None
    calibrated: CalibrationMeasure = CalibrationMeasure()


class HeldOut(Record):
    """What the preflight measured on text that it fitted and chose nothing on."""

    num_tokens: Number = None
    teachers: dict[str, TeacherCalibration] = {}
    fused: CalibrationMeasure = CalibrationMeasure()


class BestSingle(Record):
    """The teacher with the lowest NLL on its own."""

    teacher: str | None = None
    nll: Number = None


class Preflight(Record):
    """`preflight.json`."""

    num_tokens: Number = None
    seconds: Number = None
    teachers: dict[str, TeacherMeasure] = {}
    disagreement: Disagreement | None = None
    fusions: list[FusionMeasure] = []
    chosen: FusionMeasure | None = None
    best_single: BestSingle | None = None
    held_out: HeldOut | None = None
    verdict: list[str] = []


class Stage(Record):
    """One stage of the pipeline and how long it took."""

    status: str | None = None
    started: str | None = None
    seconds: Number = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Everything a report can know about a run."""

    name: str
    """Name of the run folder."""
    recipe: str | None = None
    environment: Mapping[str, Any] | None = None
    stages: Mapping[str, Stage] | None = None
    preflight: Preflight | None = None
    results: tuple[ResultRow, ...] | None = None
    log: tuple[LogStep, ...] | None = None
    controls: Mapping[str, tuple[LogStep, ...]] = field(default_factory=dict)
    """The training log of each control that has one, by name."""

    def teachers(self) -> tuple[str, ...]:
        """Names of all teachers, in the order in which they are first met."""
        names: dict[str, None] = {}
        names.update(dict.fromkeys(row.name for row in self.rows("teacher")))
        if self.preflight is not None:
            names.update(dict.fromkeys(self.preflight.teachers))
            if self.preflight.disagreement is not None:
                names.update(dict.fromkeys(self.preflight.disagreement.teachers))
        for line in self.log or ():
            names.update(dict.fromkeys(line.teacher_weights))
        return tuple(names)

    def rows(self, *kinds: str) -> tuple[ResultRow, ...]:
        """Rows of the evaluation of these kinds, kind by kind."""
        return tuple(row for kind in kinds for row in self.results or () if row.kind == kind)

    def domains(self) -> tuple[str, ...]:
        """Names of all evaluated domains, in the order in which they are first met."""
        return tuple(dict.fromkeys(name for row in self.results or () for name in row.domains))


def read_run(run_folder: Path) -> RunFiles:
    """Read what is there of a run folder.

    Raises:
        CollegiumError: the folder is missing, or a file of it is not what its format says.
    """
    if not run_folder.is_dir():
        raise CollegiumError(
            f"{run_folder}: no such run folder; must be the folder of a run; do `collegium run RECIPE`"
        )
    stages = _read_json(run_folder / "stages.json", dict[str, Stage])
    controls: dict[str, tuple[LogStep, ...]] = {}
    for name in _control_names(run_folder, stages or {}):
        log = _read_log(run_folder / "controls" / name / "train" / "log.jsonl")
        if log is not None:
            controls[name] = log
    results = _read_json(run_folder / "results.json", list[ResultRow])
    return RunFiles(
        name=run_folder.resolve().name,
        recipe=_read_text(run_folder / "recipe.yaml"),
        environment=_read_json(run_folder / "environment.json", dict[str, Any]),
        stages=stages,
        preflight=_read_json(run_folder / "preflight.json", Preflight),
        results=None if results is None else tuple(results),
        log=_read_log(run_folder / "train" / "log.jsonl"),
        controls=controls,
    )


def _control_names(run_folder: Path, stages: Mapping[str, Stage]) -> list[str]:
    """In the order in which they were trained, which is the order of their rows in the evaluation."""
    order = list(stages)
    names = sorted(folder.name for folder in run_folder.glob("controls/*/"))
    stage_of = {name: f"control {name}" for name in names}
    return sorted(
        names,
        key=lambda name: order.index(stage_of[name]) if stage_of[name] in order else len(order),
    )


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CollegiumError(f"{path}: cannot be read ({error}); must be a UTF-8 file") from error


def _read_json(path: Path, form: type[T]) -> T | None:
    text = _read_text(path)
    return None if text is None else _decode(text, form, where=str(path))


def _decode(text: str, form: type[T], *, where: str) -> T:
    try:
        # A diverged run writes NaN: that is a gap in a curve, no reason to refuse the report.
        value = json.loads(text, parse_constant=lambda _: None)
        return TypeAdapter(form).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the whole file"
        raise CollegiumError(
            f"{where}: {key}: got {_short(first['input'])}; must be as in the file formats of a run "
            f"({first['msg']}); do the stage that writes it again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CollegiumError(
            f"{where}: got broken JSON ({error}); must be one JSON value; do the stage that writes it again"
        ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_log(path: Path) -> tuple[LogStep, ...] | None:
    text = _read_text(path)
    if text is None:
        return None
    lines = text.split("\n")
    # Only what follows the last line end is left out: a run that is being written may stop mid-line.
    steps = (
        _decode(line, LogStep, where=f"{path}:{number}")
        for number, line in enumerate(lines[:-1], start=1)
        if line.strip()
    )
    return _one_per_step(steps)


def _one_per_step(steps: Iterable[LogStep]) -> tuple[LogStep, ...]:
    """A resumed run logs some steps twice; the later line is the one the weights come from."""
    latest = {line.step: line for line in steps}
    return tuple(latest[step] for step in sorted(latest))
