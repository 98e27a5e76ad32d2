"""Measurements of a run's models as they would be served: `measure.json`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from collegium.config.recipe import Recipe
from collegium.console import progress
from collegium.errors import ExportError, ModelError
from collegium.export.build import finished_exports, open_export
from collegium.export.formats import FORMATS
from collegium.export.measure import Served, Workload, measure_models
from collegium.models.folder import resolve_folder
from collegium.run.exports import threads_here
from collegium.run.folder import RunFolder, environment
from collegium.run.students import require_student
from collegium.storage.files import fingerprint, sha256_of, write_json
from collegium.storage.records import MeasuredModel, Measurements, ResultRow, read_record
from collegium.storage.stages import digests_of
from collegium.teachers.options import LocalOptions
from collegium.train.checkpoint import MANIFEST

STAGE = "measure"
FILE = "measure.json"


def measure_run(
    recipe: Recipe,
    *,
    rounds: int = 3,
    threads: int | None = None,
    prompt_tokens: int = 64,
    new_tokens: int = 32,
) -> Measurements:
    """Measure the student, its exports and its teachers on this machine, and write measure.json.

    Teachers whose folder is gone, or that are no local models, are listed with the reason. Data
    and caches are not read.

    Args:
        recipe: the recipe of the run.
        rounds: measurements of each model, one after the other in turn.
        threads: threads of each process. None for as many as torch would use here.
        prompt_tokens: length of the prompts.
        new_tokens: tokens generated after each prompt.

    Raises:
        CollegiumError: there is no trained student, or an export is damaged.
    """
    folder = RunFolder(recipe.output_dir)
    require_student(folder.path)
    manifest = folder.path / "student" / MANIFEST
    student, threads = sha256_of(manifest), threads or threads_here()
    served = [*_own(folder.path, student)]
    skipped = [*_teachers(recipe, folder.path, served)]
    vocab_size, longest = _limits(folder.path / "student")
    if longest is not None and prompt_tokens + new_tokens > longest:
        raise ExportError(
            f"measure: got {prompt_tokens} + {new_tokens} tokens; must be at most {longest}, the "
            "positions of the student; lower --prompt-tokens or --new-tokens"
        )
    workload = Workload(
        vocab_size=vocab_size, prompt_tokens=prompt_tokens, new_tokens=new_tokens, threads=threads
    )
    path = folder.path / FILE
    key = fingerprint([student, [model.name for model in served], rounds, threads])
    with folder.lock(), folder.stage(STAGE, key, lambda: digests_of(folder.path, [path])):
        with progress(STAGE) as advance:
            models = measure_models(served, workload, rounds=rounds, advance=advance)
        measurements = Measurements(
            student=student,
            processor=environment().processor or "unknown",
            threads=threads,
            rounds=rounds,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            models=[*models, *skipped],
        )
        write_json(path, measurements.to_json())
    return measurements


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


def _limits(student: Path) -> tuple[int, int | None]:
    """Return the number of ids of the student, and its largest number of positions."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(student).get_text_config()
    return config.vocab_size, getattr(config, "max_position_embeddings", None)
