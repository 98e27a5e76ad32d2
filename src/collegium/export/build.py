"""Exports as folders: written aside, verified in the tool that loads them, then published."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from collegium.console import say
from collegium.errors import CollegiumError, ExportError
from collegium.export.format import Format
from collegium.export.formats import FORMATS
from collegium.export.process import run_foreign
from collegium.export.texts import NEW_TOKENS
from collegium.storage.files import sha256_of, write_json
from collegium.storage.records import ExportInfo, Verification, open_record
from collegium.train.checkpoint import MANIFEST, recover, replace, temporary_folder, verify

INFO = "export.json"
EXPORTS = "exports"
"""Folder of the exports in a run folder."""
REJECTED = "rejected"
"""Folder beside the exports for those beyond a bound."""


def build_export(name: str, student: Path, target: Path, *, texts: Path, threads: int) -> None:
    """Write a student in the format `name` into `target`, which it replaces once it is verified.

    Args:
        name: key of `FORMATS`.
        student: folder of the student, with its manifest.
        target: folder of the export.
        texts: held-out text, by `save_texts`.
        threads: threads of the process that verifies.

    Raises:
        ExportError: the format cannot hold the student, or its tool gives other results beyond a
            bound. Such an export is kept in the folder `rejected`, with its `export.json`.
        TrainingError: the student is damaged.
    """
    form = FORMATS[name]
    verify(student)
    recover(target)
    temporary = temporary_folder(target.parent, target.name)
    try:
        form.write(student, temporary)
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        measured = compare(form, student, temporary, texts=texts, threads=threads)
        info = ExportInfo(
            name=name,
            student=sha256_of(student / MANIFEST),
            source={k: v for k, v in form.source(temporary).items() if k != "folder"},
            versions=form.versions(),
            bytes=size,
            verification=measured,
        )
        problems = list(form.bounds.problems(measured))
        write_json(temporary / INFO, info.to_json())
        if problems:
            aside = target.with_name(REJECTED) / target.name
            aside.parent.mkdir(exist_ok=True)
            replace(temporary, aside)
            raise ExportError(
                f"export {name}: {'; '.join(problems)}; must be within the bounds of the format; "
                f"kept in {aside}; choose another format"
            )
        replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    say(f"export {name}: {summary(info)}")


def compare(
    form: Format, student: Path, export: Path, *, texts: Path, threads: int
) -> Verification:
    """Compare an export with the student in a process without this package.

    Raises:
        ExportError: it cannot be loaded there, or has other dimensions.
    """
    request: dict[str, Any] = {
        "task": "compare",
        "student": {"loader": "transformers", "folder": str(student)},
        "export": form.source(export),
        "texts": str(texts),
        "new_tokens": NEW_TOKENS,
    }
    answer = run_foreign(request, where=f"export {export.name}", threads=threads)
    if "problem" in answer:
        raise ExportError(f"export {export.name}: {answer['problem']}")
    return Verification.model_validate(answer, strict=False)


def open_export(folder: Path) -> ExportInfo:
    """Return the record of a finished export whose files are as they were written.

    Raises:
        ExportError: a file is missing, truncated or changed.
    """
    try:
        verify(folder)
        return open_record(folder / INFO, ExportInfo)
    except CollegiumError as error:
        problem = str(error).removeprefix(f"{folder.name}: ")
        raise ExportError(
            f"{folder}: {problem}; must be as `collegium export` wrote it; run that again"
        ) from error


def finished_exports(run_folder: Path) -> dict[str, Path]:
    """Return the folders of the finished exports of a run by format, without verifying them."""
    folders = {name: run_folder / EXPORTS / name for name in FORMATS}
    return {name: folder for name, folder in folders.items() if (folder / MANIFEST).is_file()}


def summary(info: ExportInfo) -> str:
    """Describe the size of an export and its distance to the student."""
    measured = info.verification
    change = measured.bits_per_byte_change
    parts = [
        f"{info.bytes:,} bytes",
        f"largest logit difference {measured.max_logit_difference:.2g}",
        f"KL {measured.kl:.2g}",
        f"bits per byte {'–' if change is None else f'{change:+.4f}'}",
        f"top-1 agreement {measured.top1_agreement:.1%}",
        f"{measured.differing_texts:.0%} of {measured.num_prompts} greedy texts differ",
    ]
    return ", ".join(parts)
