"""The models of a finished run by name, loaded from its folder without its data.

student           the trained student
NAME, fused       a teacher, and the fused target of all teachers
controls/NAME     a control; NAME by itself, if no teacher has it
exports/NAME      an export, in the tool that it was made for
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from collegium.console import quiet_libraries
from collegium.errors import CollegiumError, ExportError, first_line
from collegium.evaluate.generation import (
    FusedSource,
    Prompt,
    ReadNext,
    SingleSource,
    TokenSource,
    unsampled_reason,
)
from collegium.export.build import open_export
from collegium.export.foreign import Model, load
from collegium.models.loading import load_tokenizer, vocab_size_of
from collegium.run.choice import recorded_fusion
from collegium.run.context import RunContext
from collegium.run.folder import recipe_of
from collegium.run.students import require_student
from collegium.storage.files import sha256_of
from collegium.storage.records import ExportInfo
from collegium.teachers.local import LocalTeacher
from collegium.teachers.options import LocalOptions, TeacherOptions
from collegium.train.checkpoint import MANIFEST

STUDENT, FUSED_NAME = "student", "fused"
EXPORT = "exports/"


class ExportSource:
    """An export under its own tool, for one prompt at a time."""

    stops: frozenset[int] = frozenset()

    def __init__(self, name: str, model: Model, vocab_size: int) -> None:
        self.name = name
        self._model = model
        self._vocab_size = vocab_size

    def reader(self, prompts: Sequence[Prompt]) -> ReadNext:
        assert len(prompts) == 1  # an export reads no padding
        state: Any = None

        def read(ids_Bt: Tensor, is_token_Bt: Tensor) -> Tensor:
            nonlocal state
            logits_BtV, state = self._model.logits(ids_Bt.cpu().numpy(), state)
            last_BV = torch.from_numpy(logits_BtV[:, -1, : self._vocab_size])
            return last_BV.to(ids_Bt.device)

        return read


class RunModels:
    """Names, checks and loaders of the models of one run. Nothing is kept in memory."""

    def __init__(self, run_folder: Path) -> None:
        """Read the recipe and the names. Raises CollegiumError for a run without a student."""
        quiet_libraries()
        self.recipe = recipe_of(run_folder)
        self.folder = self.recipe.output_dir
        require_student(self.folder)
        self.student = self.folder / "student"
        self._context = RunContext(self.recipe)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer in the folder of the student."""
        return load_tokenizer(str(self.student), where=str(self.student))

    @cached_property
    def vocab_size(self) -> int:
        """V: the largest token id + 1."""
        return vocab_size_of(self.tokenizer)

    @cached_property
    def names(self) -> dict[str, str]:
        """Short name -> full name of every model, in the order of a comparison."""
        full = list(self._full_names())
        short = [name.rpartition("/")[2] for name in full]
        pairs = zip(short, full, strict=True)
        return {s if short.count(s) == 1 or s == f else f: f for s, f in pairs}

    def _full_names(self) -> Iterator[str]:
        yield STUDENT
        teachers = list(self.recipe.teachers)
        yield from (f"teachers/{name}" for name in teachers)
        if teachers:
            yield FUSED_NAME
        for path in sorted(self.folder.glob(f"controls/*/student/{MANIFEST}")):
            yield f"controls/{path.parts[-3]}"
        for path in sorted(self.folder.glob(f"exports/*/{MANIFEST}")):
            yield f"exports/{path.parent.name}"

    def resolve(self, name: str) -> str:
        """Return the full name of a model. Raises CollegiumError with all names."""
        full = self.names.get(name, name)
        if full not in self.names.values():
            raise CollegiumError(
                f"--model: unknown model `{name}`; must be one of {', '.join(self.names)}"
            )
        return full

    def check(self, full: str) -> None:
        """Check that a model can generate text, without loading weights.

        Raises:
            CollegiumError: its files are missing or damaged, or its fusion samples no text.
        """
        if full.startswith(EXPORT):
            self._export_info(full)
            return
        is_fused = full == FUSED_NAME
        if is_fused and (reason := unsampled_reason(recorded_fusion(self.recipe))):
            raise CollegiumError(f"{full}: generates no text, since {reason}")
        for where, options in self._members(full).items():
            options.check(where)

    def max_length(self, full: str) -> int | None:
        """Return the largest number of positions of a model, None without a limit."""
        # An export has the positions of the student.
        members = self._members(STUDENT if full.startswith(EXPORT) else full)
        limits = [options.max_length(where) for where, options in members.items()]
        return min((limit for limit in limits if limit is not None), default=None)

    def load(self, full: str) -> TokenSource:
        """Load a model, or raise CollegiumError if it cannot be used."""
        if full.startswith(EXPORT):
            return self._load_export(full)
        members = self._members(full)
        models = [
            options.load(where.rpartition(".")[2], vocab_size=self.vocab_size, where=where)
            for where, options in members.items()
        ]
        if full == FUSED_NAME:
            return FusedSource(recorded_fusion(self.recipe), models)
        return SingleSource(models[0])

    def load_student(self) -> LocalTeacher:
        """Load the trained student, for scoring."""
        options = self._local_options(self.student)
        where = str(self.student)
        return LocalTeacher.load(STUDENT, options, vocab_size=self.vocab_size, where=where)

    def _load_export(self, full: str) -> ExportSource:
        source = {**self._export_info(full).source, "folder": str(self.folder / full)}
        try:
            model = load(source, torch.get_num_threads())
        # A missing package, or files that its version cannot read.
        except Exception as error:
            raise ExportError(
                f"{self.folder / full}: cannot be loaded ({first_line(error)}); must be read by "
                "the tool that it was made for; run `pip install 'collegium[export]'`"
            ) from error
        return ExportSource(full, model, self.vocab_size)

    def _export_info(self, full: str) -> ExportInfo:
        """Return the record of an undamaged export of this student, or raise ExportError."""
        info = open_export(self.folder / full)
        if info.student != sha256_of(self.student / MANIFEST):
            raise ExportError(
                f"{self.folder / full}: was made from another student; must be made from this one; "
                "export it again"
            )
        return info

    def _members(self, full: str) -> dict[str, TeacherOptions]:
        """Return the models behind a name by their place: several only for the fused target."""
        kind, _, name = full.rpartition("/")
        if full == FUSED_NAME:
            return {f"teachers.{key}": one for key, one in self.recipe.teachers.items()}
        if kind == "teachers":
            return {f"teachers.{name}": self.recipe.teachers[name]}
        path = self.student if full == STUDENT else self.folder / full / "student"
        return {str(path): self._local_options(path)}

    def _local_options(self, path: Path) -> LocalOptions:
        student = self._context.student
        return LocalOptions(model=str(path), device=student.device, attention=student.attention)
