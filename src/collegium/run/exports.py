"""Exports of the student of a run: artifacts of its recipe, or made later from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from collegium.config.recipe import Recipe
from collegium.errors import ExportError, nearest
from collegium.export.build import EXPORTS, build_export, finished_exports, open_export
from collegium.export.format import INSTALL, is_installed
from collegium.export.formats import FORMATS
from collegium.export.options import ExportOptions, FormatName
from collegium.export.texts import save_texts
from collegium.options import plain
from collegium.run.artifact import Artifact
from collegium.run.context import SCRATCH, RunContext
from collegium.run.recovery import StudentRecoverer
from collegium.run.students import require_student
from collegium.storage.files import sha256_of
from collegium.storage.records import ExportInfo
from collegium.train.checkpoint import MANIFEST


@dataclass(frozen=True, eq=False)
class Export(Artifact[ExportInfo]):
    """The trained student in one format. Made again if the student changes."""

    stage = "export"
    form: FormatName

    @property
    def name(self) -> str:
        return f"export {self.form}"

    @property
    def path(self) -> Path:
        return self.context.folder.path / EXPORTS / self.form

    @property
    def student(self) -> Path:
        """Folder of the student, trained before."""
        return self.context.folder.path / "student"

    def identity(self) -> Any:
        manifest = self.student / MANIFEST
        # Before the training there is none, and the export is missing whatever its key.
        student = sha256_of(manifest) if manifest.is_file() else None
        options = self.context.recipe.export
        text = self.context.datasets["validation"].fingerprint
        inputs = [student, self.form, options.max_tokens, text]
        has_grid = FORMATS[self.form].grid is not None
        return [*inputs, plain(options.recover)] if options.recover and has_grid else inputs

    def build(self) -> None:
        validation, options = self.context.datasets["validation"], self.context.recipe.export
        # A recovery may build a cache again, with the scratch folder of that.
        with self.context.scratch(f"{SCRATCH}-export") as scratch:
            texts = scratch / "texts.npz"
            save_texts(validation, options.max_tokens, texts)
            recoverer = options.recover and StudentRecoverer(self.context, options.recover, scratch)
            build_export(
                self.form,
                self.student,
                self.path,
                texts=texts,
                threads=threads_here(),
                recoverer=recoverer,
            )

    def open(self) -> ExportInfo:
        return open_export(self.path)


def exports(context: RunContext) -> list[Export]:
    """Return the exports that the recipe asks for."""
    return [Export(context, name) for name in context.recipe.export.to]


def check_exports(context: RunContext) -> None:
    """Raise ExportError if a format cannot hold the student, or a package is missing."""
    options = context.recipe.export
    for name in options.to:
        where = f"export.to: {name}"
        FORMATS[name].check(context.student.load_config("student"), context.tokenizer, where)
    if options.recover is None:
        return
    quantized = [name for name, form in FORMATS.items() if form.grid is not None]
    if not {*options.to} & {*quantized}:
        raise ExportError(
            f"export.recover: got no quantized format to train for; must be with one of "
            f"{', '.join(quantized)}; add it to `export.to`, or remove `export.recover`"
        )
    if not is_installed("torchao"):
        raise ExportError(
            f"export.recover: needs the package torchao; must be installed; run `{INSTALL}`"
        )


def export_run(
    recipe: Recipe, formats: Sequence[str] = (), *, recover: int | None = None
) -> dict[str, ExportInfo]:
    """Export the trained student of a run in these formats, by default those of its recipe.

    Finished exports of the same student are kept. Neither teachers nor caches are read, unless a
    quantized format is trained.

    Args:
        recipe: the recipe of the run.
        formats: keys of `FORMATS`.
        recover: steps of `export.recover`, with the other options of the recipe.

    Raises:
        ExportError: an unknown format, or one that cannot hold the student.
        CollegiumError: there is no trained student, or its held-out text is missing.
        Interrupted: the training of a quantized format was stopped.
    """
    for name in formats:
        if name not in FORMATS:
            raise ExportError(f"--to: got `{name}`; must be a format{nearest(name, FORMATS)}")
    options = plain(recipe.export)
    if formats:
        options["to"] = list(dict.fromkeys(formats))
    if recover is not None:
        options["recover"] = {**(options["recover"] or {}), "steps": recover}
    recipe = replace(recipe, export=ExportOptions(**options))
    if not recipe.export.to:
        raise ExportError(f"--to: got none; must name formats; known: {', '.join(FORMATS)}")
    context = RunContext(recipe)
    require_student(context.folder.path)
    check_exports(context)
    with context.folder.lock():
        return {artifact.form: artifact.ensure() for artifact in exports(context)}


def verify_exports(run_folder: Path) -> dict[str, ExportInfo]:
    """Read every file of the exports of a run. Raises ExportError for damage, or without any."""
    folders = finished_exports(run_folder)
    if not folders:
        raise ExportError(f"{run_folder}: has no exports; must have some; run `collegium export`")
    return {name: open_export(folder) for name, folder in folders.items()}


def threads_here() -> int:
    """Return the number of threads of torch in this process, which its environment may set."""
    import torch

    return torch.get_num_threads()
