"""What is looked at before anything expensive: files, models, vocabularies, data, disk. Nothing is written.

Order: what costs least comes first. No model is made here but on the `meta` device; the files of weights are read last.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from collegium.cache.codec import TopK
from collegium.data.sources import check_sources
from collegium.errors import DataError, RecipeError, nearest
from collegium.fusion.fitted import Route
from collegium.fusion.fuse import Fusion
from collegium.kernels.backends import require_backend
from collegium.losses.features import feature_map
from collegium.models import (
    ModelOptions,
    check_model_folder,
    check_weights,
    load_tokenizer,
    scan_folder,
    tap_names,
    weights_digest,
)
from collegium.models.config import head_rows, load_config, position_limit
from collegium.models.folder import ignored_settings, weights_size
from collegium.models.loading import empty_model
from collegium.recipe import Recipe, check_recipe
from collegium.student import check_student, student_config
from collegium.train.checkpoint import require_valid_checkpoint
from collegium.vocabulary.verdict import compare, require_compatible
from collegium.workspace import Workspace


@dataclass
class CheckReport:
    """What a check found out: plain lines, and what a user should think about."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_run(workspace: Workspace, *, trains: bool = True) -> CheckReport:
    """Check a whole run; several processes may only do what does not train.

    Raises:
        CollegiumError: it could not work; the message says what to do.
    """
    report = CheckReport()
    recipe = workspace.recipe
    check_recipe(recipe)
    _check_machine(recipe, trains=trains)
    workspace.folder.check(workspace.values)
    for part, sources in recipe.data.sources.items():
        check_sources(sources, where=f"data.{part}")
    _check_models(recipe)
    _check_vocabularies(workspace, report)
    _check_positions(recipe)
    _check_features(recipe)
    _check_cache(workspace)
    _check_checkpoints(workspace.folder.path)
    _check_distinct(recipe, report)
    _check_datasets(workspace, report)
    _check_routing(workspace, report)
    _check_values(recipe, report)
    _note_disk(recipe.output_dir, report)
    return report


def _check_machine(recipe: Recipe, *, trains: bool) -> None:
    processes = os.environ.get("WORLD_SIZE", "1")
    if trains and processes not in ("", "1"):
        raise RecipeError(
            f"WORLD_SIZE: got {processes}; must be 1; start a single process, without torchrun"
        )
    if recipe.train.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise RecipeError(
            "train.bf16: got true, and this CUDA device has no bfloat16; must be false here; remove it"
        )
    require_backend(recipe.objective.backend)


def _models(recipe: Recipe) -> dict[str, ModelOptions]:
    """Every model that the run reads, by its place in the recipe; a fresh student is none."""
    models = {f"teachers.{name}": options for name, options in recipe.teachers.items()}
    found: dict[str, ModelOptions] = dict(models)
    if recipe.student.model is not None:
        student = recipe.student
        found["student"] = ModelOptions(model=recipe.student.model, revision=student.revision)
    return found


def _check_models(recipe: Recipe) -> None:
    for name, options in recipe.teachers.items():
        check_model_folder(options, where=f"teachers.{name}")
    check_student(recipe.student, where="student")
    for name, options in recipe.teachers.items():
        check_weights(options, where=f"teachers.{name}")


def _check_vocabularies(workspace: Workspace, report: CheckReport) -> None:
    report.lines.append(f"vocabulary: {workspace.vocab_size:,} tokens")
    for name, options in workspace.recipe.teachers.items():
        where = f"teachers.{name}"
        verdict = compare(
            workspace.tokenizer,
            load_tokenizer(options.tokenizer_path, revision=options.revision, where=where),
            student_head_size=workspace.vocab_size,
            teacher_head_size=head_rows(options, where=where),
            where=where,
        )
        require_compatible(verdict)
        report.lines.append(f"{where}: vocabulary {verdict.kind}; {verdict.message}")


def _check_positions(recipe: Recipe) -> None:
    """A position that a model never saw is noise at best, and beyond its table at worst."""
    limits = {
        f"teachers.{name}": position_limit(load_config(options, where=f"teachers.{name}"))
        for name, options in recipe.teachers.items()
    }
    limits["student"] = position_limit(student_config(recipe.student, where="student"))
    for where, limit in limits.items():
        if limit is not None and recipe.data.max_length > limit:
            raise RecipeError(
                f"data.max_length: got {recipe.data.max_length}; must be at most {limit}, the "
                f"max_position_embeddings of {where}; lower it"
            )


def _check_features(recipe: Recipe) -> None:
    """The hidden states that feature terms compare must exist."""
    options = recipe.objective.features
    if options is None or recipe.student.trust_remote_code:
        return
    config = student_config(recipe.student, where="student")
    taps = tap_names(empty_model(config, "student"))
    for name, teacher in recipe.teachers.items():
        if options.teacher_weight(name) > 0 and not teacher.trust_remote_code:
            where = f"teachers.{name}"
            config = load_config(teacher, where=where)
            feature_map(options, taps, tap_names(empty_model(config, where)))


def _check_cache(workspace: Workspace) -> None:
    cache = workspace.recipe.cache
    if cache.enabled and cache.path is not None and cache.path.is_file():
        raise RecipeError(f"cache.path: got {cache.path}, which is a file; must be a folder")
    size = workspace.vocab_size
    if cache.enabled and isinstance(cache.targets, TopK) and cache.targets.k > size:
        raise RecipeError(
            f"cache.targets.k: got {cache.targets.k}; must be at most {size}, the size of the vocabulary"
        )


def _check_checkpoints(folder: Path) -> None:
    """An unfinished training must have something sound to go on from."""
    for place in (folder / "train", *sorted(folder.glob("controls/*/train"))):
        if not (place / "summary.json").is_file():
            require_valid_checkpoint(place)


def _check_datasets(workspace: Workspace, report: CheckReport) -> None:
    options = workspace.recipe.train
    for part, dataset in workspace.datasets.items():
        report.lines.append(
            f"data.{part}: {len(dataset.sample_names):,} documents, {len(dataset):,} windows, "
            f"{dataset.num_target_tokens:,} target tokens"
        )
    windows = len(workspace.datasets["train"])
    needed = options.per_device_train_batch_size * options.gradient_accumulation_steps
    if windows < needed:
        raise DataError(
            f"data.train: {windows} windows, one optimizer step needs {needed}; give more text, or lower "
            "train.per_device_train_batch_size or train.gradient_accumulation_steps"
        )
    epochs = workspace.num_steps * needed / windows
    report.lines.append(
        f"train: {workspace.num_steps:,} steps of {needed} windows, {epochs:.1f} epochs"
    )


def _check_routing(workspace: Workspace, report: CheckReport) -> None:
    """Domains that a weighting lists must occur in the data, and what names a teacher per row must be read."""
    recipe = workspace.recipe
    weighting = recipe.fusion.weighting if isinstance(recipe.fusion, Fusion) else None
    known = sorted({name for part in workspace.datasets.values() for name in part.domains})
    listed = {} if weighting is None else weighting.domain_names()
    for path, names in listed.items():
        for name in names:
            if name not in known:
                raise RecipeError(
                    f"fusion.weighting.{'.'.join(path)}: got `{name}`; must be a domain of the data{nearest(name, known)}"
                )
    columns = [
        f"data.{part}[{number}].teacher_column"
        for part, sources in recipe.data.sources.items()
        for number, source in enumerate(sources)
        if source.teacher_column is not None
    ]
    if isinstance(weighting, Route):
        if not weighting.domains and not columns:
            report.warnings.append(
                "fusion.weighting: route without `domains` and without a `teacher_column` sends every row to "
                f"`{weighting.default}`"
            )
    elif weighting is not None:
        report.warnings += [
            f"{place}: has no effect; only the weighting `route` reads it" for place in columns
        ]


def _check_distinct(recipe: Recipe, report: CheckReport) -> None:
    """The same weights under two names are one teacher with a double vote."""
    models = _models(recipe)
    sizes = {where: weights_size(options.model) for where, options in models.items()}
    count = Counter(sizes.values())
    seen: dict[str, str] = {}
    for where, options in models.items():
        if count[sizes[where]] == 1:
            continue  # files of another size hold other weights; nothing need be read
        digest = weights_digest(options.model)
        key = digest if sizes[where] else f"{digest}@{options.revision}"
        other = seen.setdefault(key, where)
        if other != where and where == "student":
            report.warnings.append(
                f"student: equals {other}; its distillation loss to that teacher starts at 0"
            )
        elif other != where:
            raise RecipeError(
                f"{other} and {where} are the same weights (sha256 {digest[:12]}...); must differ; "
                "remove one"
            )


def _check_values(recipe: Recipe, report: CheckReport) -> None:
    for where, options in _models(recipe).items():
        report.warnings += ignored_settings(options, where=where)
        report.warnings += scan_folder(options, where=where)


def _note_disk(output_dir: Path, report: CheckReport) -> None:
    place = next(p for p in (output_dir, *output_dir.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    report.lines.append(f"disk: {free / 1e9:.1f} GB free at {output_dir}")
