"""What is looked at before anything expensive: files, models, vocabularies, data, disk. Nothing is written.

Order: what costs least comes first, and no weight is loaded here.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from collegium.data.sources import check_sources
from collegium.errors import DataError, RecipeError
from collegium.models import check_model_folder, check_weights, load_tokenizer, weights_digest
from collegium.models.config import head_rows
from collegium.recipe import Recipe, check_recipe
from collegium.student import check_student
from collegium.vocabulary.verdict import compare, require_same
from collegium.workspace import Workspace

BYTES_PER_PARAMETER = 16
"""A checkpoint in float32: weights twice (student folder, and safe to say the optimizer's two moments)."""


@dataclass
class CheckReport:
    """What a check found out: plain lines, and what a user should think about."""

    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_run(workspace: Workspace) -> CheckReport:
    """Check a whole run.

    Raises:
        CollegiumError: it could not work; the message says what to do.
    """
    report = CheckReport()
    recipe = workspace.recipe
    check_recipe(recipe)
    _check_data_files(recipe)
    check_student(recipe.student, where="student")
    for name, options in recipe.teachers.items():
        check_model_folder(options, where=f"teachers.{name}")
        check_weights(options, where=f"teachers.{name}")
    _check_distinct(recipe, report)
    _check_vocabularies(workspace, report)
    _check_datasets(workspace, report)
    _check_disk(recipe.output_dir, report)
    return report


def _check_data_files(recipe: Recipe) -> None:
    for part in ("train", "calibration", "validation"):
        sources = getattr(recipe.data, part)
        if sources:
            check_sources(sources, where=f"data.{part}")


def _check_distinct(recipe: Recipe, report: CheckReport) -> None:
    """The same weights under two names are one teacher with a double vote."""
    seen: dict[str, str] = {}
    for name, options in recipe.teachers.items():
        digest = weights_digest(options.model) + str(options.revision)
        if digest in seen:
            raise RecipeError(
                f"teachers: `{seen[digest]}` and `{name}` are the same weights (sha256 {digest[:12]}...); "
                "must differ; remove one"
            )
        seen[digest] = name
    if recipe.student.model is not None:
        digest = weights_digest(recipe.student.model) + str(recipe.student.revision)
        if digest in seen:
            report.warnings.append(
                f"student: equals teacher `{seen[digest]}`; its distillation loss starts at 0"
            )


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
        require_same(verdict)
        report.lines.append(f"{where}: vocabulary {verdict.kind}; {verdict.message}")


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


def _check_disk(output_dir: Path, report: CheckReport) -> None:
    place = next(
        folder for folder in (output_dir, *output_dir.resolve().parents) if folder.is_dir()
    )
    free = shutil.disk_usage(place).free
    report.lines.append(f"disk: {free / 1e9:.1f} GB free at {output_dir}")
