"""Measurements of a run's models as they would be served: `measure.json`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.config.recipe import Recipe
from collegium.console import progress
from collegium.errors import ExportError, ModelError
from collegium.export.build import finished_exports, open_export
from collegium.export.formats import FORMATS
from collegium.export.measure import Served, Workload, measure_models
from collegium.models.folder import resolve_folder
from collegium.run.artifact import Artifact
from collegium.run.context import RunContext
from collegium.run.exports import threads_here
from collegium.run.folder import environment
from collegium.run.students import require_student
from collegium.storage.files import sha256_of, write_json
from collegium.storage.records import (
    MeasuredModel,
    Measurements,
    ResultRow,
    open_record,
    read_record,
)
from collegium.teachers.options import LocalOptions
from collegium.train.checkpoint import MANIFEST

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, eq=False)
class Speeds(Artifact[Measurements]):
    """Size, memory and speed of the student, its finished exports and its teachers, here.

    Teachers whose folder is gone, or that are no local models, are listed with the reason. Data
    and caches are not read.
    """

    stage = "measure"
    file = "measure.json"
    rounds: int = 3
    """Measurements of each model, one after the other in turn."""
    threads: int | None = None
    """Threads of each process. None for as many as torch would use here."""
    prompt_tokens: int = 64
    new_tokens: int = 32

    def identity(self) -> Any:
        # Not the rounds or threads: a run keeps what `collegium measure` measured with others.
        folder, recipe = self.context.folder.path, self.context.recipe
        exports = {name: _digest(path) for name, path in finished_exports(folder).items()}
        return [_digest(folder / "student"), exports, list(recipe.teachers)]

    def build(self) -> None:
        folder = self.context.folder.path
        student, threads = sha256_of(folder / "student" / MANIFEST), self.threads or threads_here()
        served = [*_own(folder, student)]
        skipped = [*_teachers(self.context.recipe, folder, served)]
        workload = Workload(
            vocab_size=_config(folder).get_text_config().vocab_size,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            threads=threads,
        )
        with progress(self.stage) as advance:
            models = measure_models(served, workload, rounds=self.rounds, advance=advance)
        measurements = Measurements(
            student=student,
            processor=environment().processor or "unknown",
            threads=threads,
            rounds=self.rounds,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            models=[*models, *skipped],
        )
        write_json(self.path, measurements.to_json())

    def open(self) -> Measurements:
        return open_record(self.path, Measurements)

    def check(self, config: PretrainedConfig) -> None:
        """Raise ExportError if the student has too few positions for the texts."""
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and self.prompt_tokens + self.new_tokens > longest:
            raise ExportError(
                f"measure: got {self.prompt_tokens} + {self.new_tokens} tokens; must be at most "
                f"{longest}, the positions of the student; run `collegium measure` with a lower "
                "--prompt-tokens or --new-tokens"
            )


def speeds(context: RunContext) -> list[Speeds]:
    """Return the measurements if the recipe asks for them."""
    return [Speeds(context)] if context.recipe.export.measure else []


def check_speeds(context: RunContext) -> None:
    """Raise ExportError if the recipe asks for measurements that its student has no room for."""
    for one in speeds(context):
        one.check(context.student.load_config("student"))


def measure_run(
    recipe: Recipe,
    *,
    rounds: int = 3,
    threads: int | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
) -> Measurements:
    """Measure the models of a run on this machine, and write measure.json.

    The options are the fields of `Speeds`.

    Raises:
        CollegiumError: there is no trained student, or an export is damaged.
    """
    artifact = Speeds(
        RunContext(recipe),
        rounds=rounds,
        threads=threads,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )
    folder = artifact.context.folder
    require_student(folder.path)
    artifact.check(_config(folder.path))
    with folder.lock(), artifact.log():
        artifact.build()
    return artifact.open()


def _config(run_folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(run_folder / "student")


def _digest(folder: Path) -> str | None:
    manifest = folder / MANIFEST
    return sha256_of(manifest) if manifest.is_file() else None


def _scores(run_folder: Path) -> dict[tuple[str, str], float | None]:
    """Return the bits per byte of results.json by kind and name."""
    rows = read_record(run_folder / "results.json", tuple[ResultRow, ...]) or ()
    return {(row.kind, row.name): row.bits_per_byte for row in rows}


def _own(run_folder: Path, student: str) -> Iterator[Served]:
    """Yield the student, and its exports as they are on disk."""
    scores = _scores(run_folder)
    own = next((bits for (kind, _), bits in scores.items() if kind == "student"), None)
    source = {"loader": "transformers", "folder": str(run_folder / "student"), "dtype": "auto"}
    yield Served("student", "student", source, own)
    for name, folder in finished_exports(run_folder).items():
        info = open_export(folder)
        if info.student != student:
            continue  # of an earlier student
        change = info.verification.bits_per_byte_change
        bits = None if own is None or change is None else own + change
        yield Served(name, "export", FORMATS[name].source(folder), bits)


def _teachers(recipe: Recipe, run_folder: Path, served: list[Served]) -> Iterator[MeasuredModel]:
    """Append the teachers that can be served to `served`, and yield the others with a reason."""
    scores = _scores(run_folder)
    for name, options in recipe.teachers.items():
        bits, note, path = scores.get(("teacher", name)), None, None
        if not isinstance(options, LocalOptions):
            note = "is no model of this machine"
        elif options.adapter is not None or options.quantize or options.trust_remote_code:
            note = "has an adapter, code of its own, or is quantized on load"
        else:
            try:
                path = resolve_folder(options.model, where=f"teachers.{name}")
                note = None if path is not None else "is a model of the hub"
            except ModelError:
                note = "its folder is gone"
        if note is None and isinstance(options, LocalOptions):
            source = {"loader": "transformers", "folder": str(path), "dtype": options.dtype}
            served.append(Served(name, "teacher", source, bits))
        else:
            yield MeasuredModel(name=name, kind="teacher", bits_per_byte=bits, note=note)
