"""Records of the JSON files in run and study folders: written and read as these classes only.

A value that does not apply or is not finite is None, `null` in the file. NLL, entropy and loss are
in nats per target token, calibration errors and agreements are shares in [0, 1].

    train/log.jsonl   LogStep per line     stages.json        {stage: Stage}
    preflight.json    PreflightReport            environment.json   Environment
    results.json      [ResultRow]          train/summary.json TrainSummary
    MANIFEST.json     FolderManifest       (of each checkpoint and student)
    generation.json   TaskResults                tasks/NAME.json    TaskResults
    samples.json      TaskResults                export.json        ExportInfo
    harness.json      HarnessResults             draft.json         DraftResults
    measure.json      Measurements
    rows.json         [StudyRow]           study.json         StudyRun
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    TypeAdapter,
    ValidationError,
)

from collegium.errors import CollegiumError

T = TypeVar("T")
MAX_BYTES = 1 << 26
"""Largest JSON file that is read: parsing one takes several times its size in memory."""
MAX_LOG_BYTES = 1 << 30


def _finite(value: Any) -> Any:
    # Strict JSON has no NaN. A diverged run logs one: a gap in a curve, not an error.
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
Numbers = Mapping[str, Number]
GridEnd = Literal["lowest", "highest"]


class Record(BaseModel):
    """An object in a file. Types are strict, and unknown keys are ignored."""

    # Strict: "4.5" where a number belongs is a broken file. A newer version may add keys.
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that were set, as plain dicts, lists and numbers."""
        return self.model_dump(mode="json", exclude_unset=True)


class ConflictRates(Record):
    """Effect of the conflict policy on some rows."""

    disagreement: Number = None
    """Mean disagreement c of the teachers, in [0, 1]."""
    applied: Number = None
    """Share of the rows whose weights the policy changed, or mean weight moved to the label."""


class ConflictEffect(ConflictRates):
    """Effect of the conflict policy on all rows and by domain. Nothing is set without one."""

    domains: Mapping[str, ConflictRates] = {}


class TrainerStep(Record):
    """The trainer's part of a log line."""

    step: int
    epoch: Number = None
    grad_norm: Number = None
    learning_rate: Number = None


class LossMeans(Record):
    """Means per target token since the previous log line, over all processes."""

    loss: Number = None
    """Weighted sum of the terms."""
    tokens_per_s: Number = None
    """Target tokens per second of training and saving, in this process's lifetime."""
    num_tokens: int | None = None
    """Target tokens since the start of the run."""
    terms: Numbers = {}
    """Each term without its factor: `kd`, `ce`, `truth`, `router`, and those of single teachers,
    such as `feature/TEACHER`. A second term of a kind is `kd_2`. Rows without a term count as 0."""
    term_weights: Numbers = {}
    """Factor of each term in the last micro-batch, including T^2 and dynamic scales. 0 for a term
    that its schedule disables."""
    grad_shares: Numbers = {}
    """Gradient norm of each term over the sum of all norms, over the measured steps.

    `kd` and `ce` are measured at the student's final hidden states (N, D), `feature/NAME` at its
    tapped ones. Gradients at different depths have different scales: compare `kd` with `ce`,
    feature terms with each other, and any share over time."""
    teacher_weights: Numbers = {}
    """Mean fusion weight of each teacher."""
    domain_weights: Mapping[str, Numbers] = {}
    """The same of each domain with target tokens."""
    conflict: ConflictEffect = ConflictEffect()


class ValidationScore(Record):
    """The student on a part of the validation split, in means per target token."""

    nll: Number = None
    bits_per_byte: Number = None
    loss: Number = None
    """That of the objective. None where its targets are cached, for the training text only."""
    num_tokens: int | None = None
    seconds: Number = None


class LogStep(LossMeans, TrainerStep):
    """One logged step of `log.jsonl`. Its evaluation is a line of its own, with the same step."""

    validation: ValidationScore | None = None


class TrainSummary(Record):
    """Length of a finished training, and the checkpoint that it chose."""

    steps: int | None = None
    train_tokens: int | None = None
    max_steps: int | None = None
    """Steps of the recipe, more than `steps` where training stopped early."""
    best_step: int | None = None
    """Step of the checkpoint that the student is. None is the last one."""

    @property
    def stopped_early(self) -> bool:
        """Whether training ended before its last step."""
        return self.steps is not None and self.max_steps is not None and self.steps < self.max_steps


class DomainScore(Record):
    """Quality and calibration of a model on some tokens."""

    nll: Number = None
    perplexity: Number = None
    bits_per_byte: Number = None
    entropy: Number = None
    overconfidence: Number = None
    """NLL - entropy: 0 if calibrated, positive if overconfident."""
    ece: Number = None
    """Expected calibration error over 15 bins of equal mass, the sum of the next two."""
    ece_over: Number = None
    """Part of the bins whose confidence exceeds their accuracy."""
    ece_under: Number = None
    num_tokens: int | None = None


class CalibrationScore(DomainScore):
    """Calibration of a model on held-out text and on each of its domains."""

    domains: Mapping[str, DomainScore] = {}


class Reliability(Record):
    """Mean confidence and accuracy of each confidence bin."""

    confidence: Sequence[Number] = []
    accuracy: Sequence[Number] = []
    count: Sequence[Number] = []


class EntropyBins(Record):
    """Accuracy and NLL of the tokens in each bin of predicted entropy."""

    entropy: Sequence[Number] = []
    accuracy: Sequence[Number] = []
    nll: Sequence[Number] = []
    count: Sequence[Number] = []


class ModelInfo(TrainSummary):
    """Facts about a scored model besides its scores."""

    name: str
    kind: Literal["untouched", "teacher", "fused", "student", "control"]
    num_parameters: int | None = None
    train_seconds: Number = None
    note: str | None = None


class Acceptance(Record):
    """Share of drafted tokens that a target keeps: the mean of sum_v min(P_v, Q_v)."""

    value: Number = None
    interval: Sequence[Number] | None = None
    """95 % interval, by a bootstrap over documents."""


class ModelScores(Record):
    """Scores of a model on the validation split."""

    nll: Number = None
    perplexity: Number = None
    bits_per_byte: Number = None
    entropy: Number = None
    overconfidence: Number = None
    ece: Number = None
    top1: Number = None
    kl_to_fused: Number = None
    agreement_fused: Number = None
    """Share of tokens with the same top-1 token as the fused target."""
    agreement: Numbers = {}
    """The same with each teacher."""
    acceptance: Mapping[str, Acceptance] = {}
    """Expected acceptance as a draft model at temperature 1, by the teacher that is the target."""
    num_tokens: int | None = None
    num_bytes: int | None = None
    domains: Mapping[str, DomainScore] = {}
    reliability: Reliability | None = None
    entropy_bins: EntropyBins | None = None


class ResultRow(ModelScores, ModelInfo):
    """One row of the evaluation."""

    @property
    def title(self) -> str:
        """The name without its kind, for places that already show the kind."""
        return self.name.removeprefix(f"{self.kind}: ")


class MetricScore(Record):
    """A metric of generated texts, its standard error and the number of texts."""

    value: Number = None
    """A share in [0, 1], or BLEU from 0 to 100."""
    stderr: Number = None
    """Standard error over the texts. None for fewer than two."""
    num_samples: int = 0


class TaskRow(Record):
    """Scores of one model on the prompts of a task."""

    name: str
    kind: Literal["teacher", "fused", "student", "control"]
    scores: Mapping[str, MetricScore] = {}
    domains: Mapping[str, Mapping[str, MetricScore]] = {}
    """Domain -> metric -> score, for held-out continuations of several domains."""
    texts: Sequence[str] = []
    """Its continuation of each of the `prompts`."""
    note: str | None = None
    """The reason why there are no scores."""

    @property
    def title(self) -> str:
        """The name without its kind."""
        return self.name.removeprefix(f"{self.kind}: ")


class SamplePrompt(Record):
    """The start of a held-out document, and how it goes on."""

    document: str
    domain: str | None = None
    text: str
    reference: str


class TaskResults(Record):
    """Scores of all models on held-out continuations, or on one task."""

    num_prompts: int
    prompts: Sequence[SamplePrompt] = []
    """The first few prompts of greedy continuations, of which the texts are kept."""
    settings: Mapping[str, int | float | str] = {}
    signatures: Mapping[str, str] = {}
    """Versions and settings of the metrics of other packages."""
    rows: Sequence[TaskRow] = []


class HarnessResults(Record):
    """Scores of the student by lm-evaluation-harness."""

    version: str
    """Of lm-eval."""
    student: str
    """SHA-256 of the student's MANIFEST.json."""
    limit: int | None = None
    """Examples per task, None for all."""
    tasks: Mapping[str, Mapping[str, MetricScore]] = {}
    """Task -> metric and filter -> score."""
    task_versions: Mapping[str, str] = {}


class Verification(Record):
    """Distance of an export to the student on held-out text, measured in the tool that loads it."""

    num_tokens: int
    max_logit_difference: Number
    mean_logit_difference: Number
    logit_spread: float
    """Standard deviation of all logits of the student."""
    kl: Number
    """Mean KL(student || export) in nats per token."""
    top1_agreement: float
    perplexity: Number
    """Of the export, as `bits_per_byte`."""
    student_perplexity: Number
    bits_per_byte: Number
    """None for text without bytes, or if it is not finite."""
    student_bits_per_byte: Number
    num_prompts: int
    differing_texts: float
    """Share of the prompts whose greedy continuations differ."""
    tie_gap: float
    """Largest gap of the student's logits between both choices where a text differs first."""
    differing_tokenizations: float | None
    """Share of the texts that the tokenizer in the export splits into other tokens. None where its
    splitting rule is one of llama.cpp that transformers does not have."""
    same_chat_template: bool
    same_eos: bool

    @property
    def bits_per_byte_change(self) -> float | None:
        """The rise of the bits per byte by the export."""
        before, after = self.student_bits_per_byte, self.bits_per_byte
        return None if before is None or after is None else after - before


class Recovery(Record):
    """Training of the student with the rounded weights of an export."""

    steps: int
    learning_rate: float
    bits_per_byte: float
    """The bound on their rise that the export without it exceeds."""
    before: Verification
    after: Verification
    is_kept: bool
    """Whether the export has the trained weights: if they cost fewer bits per byte."""


class ExportInfo(Record):
    """export.json of an export: its source, the tools that wrote it, and its verification."""

    name: str
    """Name of the format."""
    student: str
    """SHA-256 of the student's MANIFEST.json."""
    source: Mapping[str, str]
    """Loader, and the file that it opens where it is not the folder."""
    versions: Mapping[str, str]
    bytes: int
    """Size of all files but this one and MANIFEST.json, which lists their SHA-256."""
    has_more_scales: bool = False
    """Whether the usual scales were beyond a bound, see `Format.finer`."""
    verification: Verification
    """Of these files against the student, which a recovery does not change."""
    recovery: Recovery | None = None


class Speed(Record):
    """Throughput at one batch size, of all sequences together."""

    prefill_tokens_per_s: Number = None
    decode_tokens_per_s: Number = None


class MeasuredModel(Record):
    """Size, memory and speed of a model: medians over the rounds."""

    name: str
    kind: Literal["student", "export", "teacher"]
    bytes: int | None = None
    """Of the files with the weights."""
    peak_bytes: int | None = None
    """Largest resident memory of its process above that of the imported libraries."""
    first_token_s: Number = None
    """At batch size 1."""
    speeds: Mapping[str, Speed] = {}
    """By batch size."""
    bits_per_byte: Number = None
    """Those of results.json. An export adds its change on the text of its verification."""
    note: str | None = None
    """The reason why there are no measurements."""


class Measurements(Record):
    """measure.json: models as they would be served on this machine."""

    student: str
    """SHA-256 of the student's MANIFEST.json."""
    processor: str
    threads: int
    rounds: int
    prompt_tokens: int
    new_tokens: int
    models: Sequence[MeasuredModel] = []


class DraftRow(Record):
    """The student as a draft model for one teacher, in greedy assisted generation."""

    teacher: str
    num_identical: int | None = None
    """Texts equal to those of the teacher by itself."""
    drafted: int | None = None
    accepted: int | None = None
    accepted_share: Number = None
    accepted_interval: Sequence[Number] | None = None
    """95 % interval, by a bootstrap over prompts."""
    tokens_per_pass: Number = None
    """New tokens per forward pass of the teacher."""
    teacher_tokens_per_s: Number = None
    """Of the teacher by itself."""
    tokens_per_s: Number = None
    speedup: Number = None
    speedup_interval: Sequence[Number] | None = None
    note: str | None = None
    """The reason why nothing was measured."""


class DraftResults(Record):
    """The student as a draft model for the teachers, on held-out prompts."""

    version: str
    """Of transformers."""
    student: str
    """SHA-256 of the student's MANIFEST.json."""
    threads: int
    """Threads of torch on the CPU."""
    num_prompts: int
    max_new_tokens: int
    num_drafted: int
    """Tokens that are drafted per pass of a teacher."""
    rows: Sequence[DraftRow] = []


class TeacherMeasure(Record):
    """Scores of one teacher on the calibration split."""

    nll: Number = None
    perplexity: Number = None
    entropy: Number = None
    ece: Number = None
    ece_over: Number = None
    ece_under: Number = None
    overconfidence: Number = None
    temperature: Number = None
    """Fitted to this teacher only. None if its source has no other temperature than 1."""
    grid_end: GridEnd | None = None
    """Set where it is an end of the temperatures tried, beyond which the NLL falls."""
    top1: Number = None
    domains: Numbers = {}
    """NLL by domain."""
    cut_mass: Number = None
    """Mean probability of the tokens that the student's vocabulary leaves out. None for all."""


class Disagreement(Record):
    """Pairwise Jensen-Shannon divergence and share of differing top-1 tokens."""

    teachers: Sequence[str] = []
    jsd: Sequence[Sequence[Number]] = []
    top1: Sequence[Sequence[Number]] = []


class CandidateFusion(Record):
    """A fusion that preflight compared. Each token is scored under the fit of the other half."""

    name: str = ""
    nll: Number = None
    """NLL of the fused target on the tokens that rank all candidates."""
    num_tokens: int | None = None
    nll_all_tokens: Number = None
    """NLL on the whole split, where it was measured."""
    fusion: Mapping[str, Any] = {}
    """The `fusion:` section of a recipe, fitted on the whole split."""
    calibration: str | None = None
    """raw, temperatures, pooled, or temperatures+pooled."""
    grid_ends: Mapping[str, GridEnd] = {}
    """Fitted temperatures that are an end of those tried, by teacher or `pooled_temperature`."""
    is_chosen: bool = False
    interval: Sequence[Number] | None = None
    """95 % interval of the NLL, by a bootstrap over documents."""
    interval_to_chosen: Sequence[Number] | None = None
    """The same of its difference to the NLL of the chosen fusion."""
    rank_correlation: Number = None
    """Of weight and -NLL of the teachers, over tokens."""
    best_teacher_share: Number = None
    """Share of tokens whose best teacher has the highest weight."""
    regret: Numbers | None = None
    """NLL above that of the best `constant` weights, and of the best teacher `per_token`."""
    domains: Numbers = {}
    """NLL by domain."""


class ChosenFusion(Record):
    """The chosen fusion, its mean weights, and the rise of its NLL without each teacher."""

    name: str = ""
    nll: Number = None
    fusion: Mapping[str, Any] = {}
    grid_ends: Mapping[str, GridEnd] = {}
    """As in `CandidateFusion`."""
    weights: Numbers = {}
    leave_one_out: Numbers = {}


class BestTeacher(Record):
    """The single teacher with the lowest NLL."""

    teacher: str = ""
    nll: Number = None


class TeacherCalibration(Record):
    """Calibration of one teacher, raw and at its fitted temperature."""

    raw: CalibrationScore = CalibrationScore()
    temperature: Number = None
    calibrated: CalibrationScore = CalibrationScore()


class HeldOut(Record):
    """Calibration on the validation split, on which nothing is fitted or chosen."""

    num_tokens: int | None = None
    teachers: Mapping[str, TeacherCalibration] = {}
    fused: CalibrationScore = CalibrationScore()


class PreflightReport(Record):
    """Teachers and fusions measured before training."""

    num_tokens: int | None = None
    seconds: Number = None
    teachers: Mapping[str, TeacherMeasure] = {}
    disagreement: Disagreement | None = None
    fusions: Sequence[CandidateFusion] = []
    """Sorted by NLL."""
    chosen: ChosenFusion = ChosenFusion()
    best_single: BestTeacher = BestTeacher()
    verdict: Sequence[str] = []
    """Three sentences."""
    held_out: HeldOut | None = None
    """Not measured where the teachers are read from a cache."""


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    is_relative = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    if not is_relative or str(path) != name or "\\" in name or not name.isprintable():
        raise ValueError("must be a name inside the folder, not a path out of it")
    return name


FileName = Annotated[str, AfterValidator(_inside)]
"""A file below the folder of the record that lists it, such as `student/config.json`."""


class FileDigest(Record):
    """Size and SHA-256 of a file."""

    bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class ManifestEntry(FileDigest):
    """A file in a checkpoint or a student."""

    name: FileName


class FolderManifest(Record):
    """MANIFEST.json of a checkpoint or a student: all other files there."""

    format: int
    files: Sequence[ManifestEntry]

    def digests(self) -> dict[str, FileDigest]:
        """Return the entries by name."""
        return {
            entry.name: FileDigest(**entry.model_dump(exclude={"name"})) for entry in self.files
        }


class Stage(Record):
    """State and wall time of a pipeline stage."""

    status: str | None = None
    """running, done, failed or interrupted."""
    key: str | None = None
    """Fingerprint of its inputs."""
    started: str | None = None
    seconds: Number = None
    """Summed over interruptions."""
    note: str | None = None
    """Message of the error that ended it."""
    files: Mapping[FileName, FileDigest] | None = None
    """The files of a finished stage, relative to the run folder."""
    sha256: str | None = None
    """Digest of the stage's name and all other fields."""


class Environment(Record):
    """Package versions and machine."""

    python: str | None = None
    platform: str | None = None
    processor: str | None = None
    cpus: int | None = None
    packages: Mapping[str, str] = {}


class StudyRow(Record):
    """Measures of one run of a study, or of one fusion that its preflight compared."""

    levels: Mapping[str, str]
    """Factor -> level."""
    seed: int
    folder: str
    values: Numbers


class StudyRun(Record):
    """Finished rows of one run, and the hash of the recipe that they belong to."""

    key: str
    rows: Sequence[StudyRow]


def fusion_title(fusion: Mapping[str, Any]) -> str:
    """Return the name of a fusion in recipe form, without its fitted tables of numbers.

    Examples: `prefix_likelihood(eta=0.3, decay=0.9), linear`; `domain_weights, log_linear`.
    """
    exponent = fusion.get("exponent")
    pool = str(fusion.get("pool", "linear")) + ("" if exponent is None else f"(r={exponent:.3g})")
    parts = [_call(fusion.get("weighting", {})), pool]
    if fusion.get("temperatures"):
        parts.append("temperatures")
    if (temperature := fusion.get("pooled_temperature", 1.0)) != 1.0:
        parts.append(f"pooled_temperature={temperature:.3g}")
    if "conflict" in fusion:
        parts.append(_call(fusion["conflict"]))
    return ", ".join(parts)


def _call(option: Mapping[str, Any]) -> str:
    """Format `name(key=value, ...)`, or only the name if some values are tables."""
    values = {key: value for key, value in option.items() if key != "name" and value is not None}
    name = str(option.get("name"))
    if not values or any(isinstance(value, dict) for value in values.values()):
        return name
    texts = (f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
    return f"{name}({', '.join(texts)})"


def read_record(path: Path, form: type[T]) -> T | None:
    """Read a JSON file, None without one. Raises CollegiumError if it does not match `form`."""
    data = _read_bytes(path, MAX_BYTES)
    return None if data is None else decode_record(data, form, where=str(path))


def open_record(path: Path, form: type[T]) -> T:
    """Read a JSON file that must exist. Raises CollegiumError as `read_record`."""
    record = read_record(path, form)
    if record is None:
        raise CollegiumError(f"{path}: not found; must be there; repeat its stage")
    return record


def read_log(path: Path) -> tuple[LogStep, ...] | None:
    """Read a `log.jsonl` in step order, None without one. Raises CollegiumError if it is broken."""
    data = _read_bytes(path, MAX_LOG_BYTES)
    if data is None:
        return None
    # A run in progress or a killed one leaves half a line at the end, without a newline.
    numbered = enumerate(data.split(b"\n")[:-1], start=1)
    lines = (
        decode_record(line, LogStep, where=f"{path}:{n}") for n, line in numbered if line.strip()
    )
    # A resumed run may log some steps twice; the weights come from the later line. An evaluation
    # adds its fields to those of its step.
    latest: dict[int, LogStep] = {}
    for line in lines:
        fields = {name: getattr(line, name) for name in line.model_fields_set}
        latest[line.step] = latest.get(line.step, line).model_copy(update=fields)
    return tuple(latest[step] for step in sorted(latest))


def _read_bytes(path: Path, limit: int) -> bytes | None:
    try:
        if (size := path.stat().st_size) > limit:
            raise CollegiumError(f"{path}: got {size:,} bytes; must be at most {limit:,}")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CollegiumError(f"{path}: cannot be read ({error}); must be a file") from error


def decode_record(data: bytes, form: type[T], *, where: str) -> T:
    """Decode JSON. Raises CollegiumError with the path of a value that does not match `form`."""
    try:
        return TypeAdapter(form).validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ": ".join(filter(None, [where, ".".join(map(str, first["loc"]))]))
        value = first["input"]
        text = repr(value.decode(errors="replace") if isinstance(value, bytes) else value)
        raise CollegiumError(
            f"{path}: got {text if len(text) <= 60 else f'{text[:57]}...'}; "
            f"must match the file formats of a run ({first['msg']}); delete it and repeat its stage"
        ) from error
