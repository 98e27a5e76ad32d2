"""Typed records of the files in a run folder. A missing file is `None` or empty, never a guess."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from collegium.errors import CollegiumError

Number = float | None
"""A measured value, or None if it does not apply or was not finite."""

T = TypeVar("T")


def _empty_if_null(value: object) -> object:
    return {} if value is None else value


Numbers = Annotated[dict[str, Number], BeforeValidator(_empty_if_null)]


class Record(BaseModel):
    """An object in a run's files. Types are strict, unknown keys are ignored."""

    # Strict: "4.5" where a number belongs is a broken file. A newer version may add keys.
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
    """Metrics of one model on one domain, with NLL in nats per token."""

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
    """One row of the evaluation table, with NLL and entropy in nats per token."""

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
        """The name without its kind, for places that already show the kind."""
        return self.name.removeprefix(f"{self.kind}: ")


class TeacherMeasure(Record):
    """Preflight metrics of one teacher, with NLL and entropy in nats per token."""

    nll: Number = None
    perplexity: Number = None
    entropy: Number = None
    ece: Number = None
    overconfidence: Number = None
    temperature: Number = None
    top1: Number = None
    domains: Numbers = {}


class Disagreement(Record):
    """Pairwise Jensen-Shannon divergence (nats) and top-1 disagreement (share) of teachers."""

    teachers: list[str] = []
    jsd: list[list[Number]] = []
    top1: list[list[Number]] = []


class FusionMeasure(Record):
    """A candidate fusion and the NLL of its fused target, in nats per token."""

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
    """Calibration of one model. NLL and entropy in nats per token, ECE and its halves as shares."""

    nll: Number = None
    entropy: Number = None
    overconfidence: Number = None
    ece: Number = None
    ece_over: Number = None
    ece_under: Number = None


class CalibrationMeasure(DomainCalibration):
    """Calibration on all held-out text and on each of its domains."""

    domains: dict[str, DomainCalibration] = {}


class TeacherCalibration(Record):
    """Calibration of one teacher, raw and at its fitted temperature."""

    raw: CalibrationMeasure = CalibrationMeasure()
    temperature: Number = None
    calibrated: CalibrationMeasure = CalibrationMeasure()


class HeldOut(Record):
    """Preflight metrics on text that no fit and no selection has used."""

    num_tokens: Number = None
    teachers: dict[str, TeacherCalibration] = {}
    fused: CalibrationMeasure = CalibrationMeasure()


class BestSingle(Record):
    """The single teacher with the lowest NLL."""

    teacher: str | None = None
    nll: Number = None


class Preflight(Record):
    """Contents of `preflight.json`."""

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
    """Status and wall time of one pipeline stage."""

    status: str | None = None
    started: str | None = None
    seconds: Number = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The files of a run that a report reads."""

    name: str
    """Name of the run folder."""
    recipe: str | None = None
    environment: Mapping[str, Any] | None = None
    stages: Mapping[str, Stage] | None = None
    preflight: Preflight | None = None
    results: tuple[ResultRow, ...] | None = None
    log: tuple[LogStep, ...] | None = None
    controls: Mapping[str, tuple[LogStep, ...]] = field(default_factory=dict)
    """Training log of each control that has one, by folder name."""

    def teachers(self) -> tuple[str, ...]:
        """Return the names of all teachers in order of first appearance."""
        # Any of the files may be missing, so names are collected from all of them.
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
        """Return the evaluation rows of these kinds, kind by kind."""
        return tuple(row for kind in kinds for row in self.results or () if row.kind == kind)

    def domains(self) -> tuple[str, ...]:
        """Return the names of all evaluated domains in order of first appearance."""
        return tuple(dict.fromkeys(name for row in self.results or () for name in row.domains))


def read_run(run_folder: Path) -> RunFiles:
    """Read the files that a run folder has.

    Raises:
        CollegiumError: the folder is missing, or a file does not match its format.
    """
    if not run_folder.is_dir():
        raise CollegiumError(
            f"{run_folder}: not found; must be a run folder; create one with `collegium run RECIPE`"
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
    # Training order, as in the stage log and in results.json: colors go by position.
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
        # A diverged run logs NaN. That is a gap in a curve, not a reason to refuse the report.
        value = json.loads(text, parse_constant=lambda _: None)
        return TypeAdapter(form).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the whole file"
        raise CollegiumError(
            f"{where}: {key}: got {_short(first['input'])}; must match the file formats of a run "
            f"({first['msg']}); rerun the stage that writes it"
        ) from error
    # json raises RecursionError on deeply nested input.
    except (ValueError, RecursionError) as error:
        raise CollegiumError(
            f"{where}: got broken JSON ({error}); must be one JSON value; "
            "rerun the stage that writes it"
        ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_log(path: Path) -> tuple[LogStep, ...] | None:
    text = _read_text(path)
    if text is None:
        return None
    lines = text.split("\n")
    # A run in progress may be in the middle of its last line, which has no newline yet.
    steps = (
        _decode(line, LogStep, where=f"{path}:{number}")
        for number, line in enumerate(lines[:-1], start=1)
        if line.strip()
    )
    return _latest_per_step(steps)


def _latest_per_step(steps: Iterable[LogStep]) -> tuple[LogStep, ...]:
    # A resumed run logs some steps twice; the weights come from the later line.
    latest = {line.step: line for line in steps}
    return tuple(latest[step] for step in sorted(latest))
