"""The models of a finished run by name, loaded from its folder without its data.

student           the trained student
NAME, fused       a teacher, and the fused target of all teachers
controls/NAME     a control; NAME by itself, if no teacher has it
exports/NAME      an export that PyTorch can load
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from collegium.console import quiet_libraries
from collegium.errors import CollegiumError
from collegium.evaluate.generation import FusedSource, SingleSource, TextSource, unsampled_reason
from collegium.models.loading import load_tokenizer, vocab_size_of
from collegium.models.weights import CONFIG
from collegium.run.choice import recorded_fusion
from collegium.run.context import RunContext
from collegium.run.folder import recipe_of
from collegium.run.students import require_student
from collegium.teachers.local import LocalTeacher
from collegium.teachers.options import LocalOptions, TeacherOptions
from collegium.train.checkpoint import MANIFEST

STUDENT, FUSED_NAME = "student", "fused"


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
        is_fused = full == FUSED_NAME
        if is_fused and (reason := unsampled_reason(recorded_fusion(self.recipe))):
            raise CollegiumError(f"{full}: generates no text, since {reason}")
        for where, options in self._members(full).items():
            options.check(where)

    def max_length(self, full: str) -> int | None:
        """Return the largest number of positions of a model, None without a limit."""
        limits = [options.max_length(where) for where, options in self._members(full).items()]
        return min((limit for limit in limits if limit is not None), default=None)

    def load(self, full: str) -> TextSource:
        """Load a model, or raise CollegiumError if it cannot be used."""
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

    def _members(self, full: str) -> dict[str, TeacherOptions]:
        """Return the models behind a name by their place: several only for the fused target."""
        kind, _, name = full.rpartition("/")
        if full == FUSED_NAME:
            return {f"teachers.{key}": one for key, one in self.recipe.teachers.items()}
        if kind == "teachers":
            return {f"teachers.{name}": self.recipe.teachers[name]}
        folder = {STUDENT: self.student, f"controls/{name}": self.folder / full / "student"}
        path = folder.get(full, self.folder / full)
        if not (path / CONFIG).is_file():
            raise CollegiumError(
                f"{path}: has no {CONFIG}; must be a Hugging Face folder to generate text here; "
                "use the tool that it was exported for"
            )
        return {str(path): self._local_options(path)}

    def _local_options(self, path: Path) -> LocalOptions:
        student = self._context.student
        return LocalOptions(model=str(path), device=student.device, attention=student.attention)
