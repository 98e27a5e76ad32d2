"""Exports as folders: written aside, verified in the tool that loads them, then published."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from collegium.console import say
from collegium.errors import CollegiumError, ExportError
from collegium.export.fake_quantization import WeightGrid
from collegium.export.format import Format
from collegium.export.formats import FORMATS
from collegium.export.options import RecoverOptions
from collegium.export.process import run_foreign
from collegium.export.texts import NEW_TOKENS
from collegium.storage.files import sha256_of, write_json
from collegium.storage.records import ExportInfo, Recovery, Verification, open_record
from collegium.train.checkpoint import MANIFEST, recover, replace, temporary_folder, verify

INFO = "export.json"
EXPORTS = "exports"
"""Folder of the exports in a run folder."""
REJECTED = "rejected"
"""Folder beside the exports for those beyond a bound."""


class Recoverer(Protocol):
    """Trains the student for a grid of weights."""

    @property
    def options(self) -> RecoverOptions:
        """Steps, and the bound beyond which they are run."""
        ...

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        ...

    def train(self, grid: WeightGrid, name: str) -> Path:
        """Return the folder of a float student whose weights lose less by rounding to a grid."""
        ...


def build_export(
    name: str,
    student: Path,
    target: Path,
    *,
    texts: Path,
    threads: int,
    recoverer: Recoverer | None = None,
) -> None:
    """Write a student in the format `name` into `target`, which it replaces once it is verified.

    Args:
        name: key of `FORMATS`.
        student: folder of the student, with its manifest.
        target: folder of the export.
        texts: held-out text, by `save_texts`.
        threads: threads of the process that verifies.
        recoverer: trains a quantized student beyond its bound. None for no training.

    Raises:
        ExportError: the format cannot hold the student, or its tool gives other results beyond a
            bound. Such an export is kept in the folder `rejected`, with its `export.json`.
        TrainingError: the student is damaged.
        Interrupted: training was stopped. Nothing is kept.
    """
    form = FORMATS[name]
    verify(student)
    recover(target)
    attempts = _Attempts(form, student, target, texts, threads)
    try:
        folder, measured = attempts.write(student)
        if (finer := _finer(attempts, measured)) is not None:
            folder, measured = finer
        recovery = None
        if recoverer is not None:
            recovery = _recover(attempts, recoverer, measured)
        if recovery is not None and recovery.is_kept:
            folder, measured = attempts.folders[-1], recovery.after
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        info = ExportInfo(
            name=name,
            student=sha256_of(student / MANIFEST),
            source={k: v for k, v in form.source(folder).items() if k != "folder"},
            versions=form.versions(),
            bytes=size,
            has_more_scales=attempts.form is not form,
            verification=measured,
            recovery=recovery,
        )
        is_trained = recovery is not None and recovery.is_kept
        problems = list(form.bounds.problems(measured, is_trained=is_trained))
        write_json(folder / INFO, info.to_json())
        if problems:
            aside = target.with_name(REJECTED) / target.name
            aside.parent.mkdir(exist_ok=True)
            replace(folder, aside)
            raise ExportError(
                f"export {name}: {'; '.join(problems)}; must be within the bounds of the format; "
                f"kept in {aside}; {_remedy(form, recovery)}"
            )
        replace(folder, target)
    finally:
        for folder in attempts.folders:
            shutil.rmtree(folder, ignore_errors=True)
    for line in summary_lines(info):
        say(f"export {name}: {line}")


@dataclass
class _Attempts:
    """Temporary folders of an export beside its target."""

    form: Format
    student: Path
    target: Path
    texts: Path
    threads: int
    folders: list[Path] = field(default_factory=list)

    def write(self, source: Path) -> tuple[Path, Verification]:
        """Write a float student in the format, and compare it with the student of the run."""
        folder = temporary_folder(self.target.parent, self.target.name)
        self.folders.append(folder)
        self.form.write(source, folder)
        where = f"export {self.target.name}"
        measured = compare(
            self.form, self.student, folder, texts=self.texts, threads=self.threads, where=where
        )
        return folder, measured


def _finer(attempts: _Attempts, coarse: Verification) -> tuple[Path, Verification] | None:
    """Write the student with more scales if the export is beyond a bound, and keep the nearer."""
    form = attempts.form
    if form.finer is None or not list(form.bounds.problems(coarse, is_trained=False)):
        return None
    say(f"export {attempts.target.name}: {_distance(coarse)}; written again with more scales")
    attempts.form = form.finer
    folder, measured = attempts.write(attempts.student)
    if measured.kl is not None and (coarse.kl is None or measured.kl < coarse.kl):
        return folder, measured
    attempts.form = form
    return None


def _recover(attempts: _Attempts, recoverer: Recoverer, before: Verification) -> Recovery | None:
    """Train the student if the export costs more than a bound, and write it again."""
    form, options, cost = attempts.form, recoverer.options, before.bits_per_byte_change
    bound = form.bounds.bits_per_byte if options.bits_per_byte is None else options.bits_per_byte
    if form.grid is None or cost is None or cost <= bound:
        return None
    say(
        f"export {attempts.target.name}: bits per byte {cost:+.4f} (bound {bound:g}), so the "
        f"student is trained for {options.steps} steps with rounded weights"
    )
    _, after = attempts.write(recoverer.train(form.grid, attempts.target.name))
    trained = after.bits_per_byte_change
    return Recovery(
        steps=options.steps,
        learning_rate=recoverer.learning_rate,
        bits_per_byte=bound,
        before=before,
        after=after,
        is_kept=trained is not None and trained < cost,
    )


def _remedy(form: Format, recovery: Recovery | None) -> str:
    if form.grid is None:
        return "choose another format"
    more = "set" if recovery is None else "raise"
    return f"{more} `export.recover.steps`, or choose another format"


def compare(
    form: Format, student: Path, export: Path, *, texts: Path, threads: int, where: str
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
    answer = run_foreign(request, where=where, threads=threads)
    if "problem" in answer:
        raise ExportError(f"{where}: {answer['problem']}")
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


def summary_lines(info: ExportInfo) -> list[str]:
    """Describe the size of an export and its distance to the student, and its recovery, if any."""
    scales = ", with more scales" if info.has_more_scales else ""
    lines = [f"{info.bytes:,} bytes{scales}, {_distance(info.verification)}"]
    recovery = info.recovery
    if recovery is not None:
        lines.append(
            f"before {recovery.steps} steps of recovery: {_distance(recovery.before)}"
            if recovery.is_kept
            else f"{recovery.steps} steps of recovery are no gain: {_distance(recovery.after)}"
        )
    return lines


def _distance(measured: Verification) -> str:
    change = measured.bits_per_byte_change
    largest, kl = (
        "–" if value is None else f"{value:.2g}"
        for value in (measured.max_logit_difference, measured.kl)
    )
    parts = [
        f"largest logit difference {largest}",
        f"KL {kl}",
        f"bits per byte {'–' if change is None else f'{change:+.4f}'}",
        f"top-1 agreement {measured.top1_agreement:.1%}",
        f"{measured.differing_texts:.0%} of {measured.num_prompts} greedy texts differ",
    ]
    return ", ".join(parts)
