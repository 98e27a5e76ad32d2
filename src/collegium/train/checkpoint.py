"""Atomic checkpoints: temporary folder, fsync, manifest with checksums, rename."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from collegium.errors import CollegiumError, TrainingError
from collegium.storage.files import fsync, system_errors
from collegium.storage.records import FolderManifest, ManifestEntry, open_record
from collegium.storage.stages import damage, file_digest

FORMAT = 1
"""Version of the checkpoint layout. Newer ones are rejected."""
MANIFEST = "MANIFEST.json"
STATE = "state.json"
"""Step, identity and scalars of a checkpoint."""
WEIGHT_FILES = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?$")
"""Names of the weight files of a model folder."""
_NAME = re.compile(r"checkpoint-(\d+)$")
_OLD = ".tmp-old-"
_log = logging.getLogger(__name__)


class NewerFormat(TrainingError):
    """A checkpoint written by a newer version, never renamed or deleted."""


def temporary_folder(parent: Path, label: int | str) -> Path:
    """Create a folder, invisible to `survey`, that `commit` publishes."""
    folder = parent / f".tmp-{label}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder


def write(final: Path, fill: Callable[[Path], None], *, label: int | str | None = None) -> None:
    """Fill a temporary folder and publish it as `final`, which it replaces if it has no label.

    Raises:
        TrainingError: the disk refused it. Nothing is left aside, and `final` is as before.
    """
    try:
        temporary = temporary_folder(final.parent, final.name if label is None else label)
        try:
            with system_errors():
                fill(temporary)
                (replace if label is None else commit)(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise TrainingError(
            f"{final}: cannot be saved ({error}); earlier checkpoints are complete; free "
            "space, then resume"
        ) from error


def commit(temporary: Path, final: Path) -> None:
    """Seal `temporary` with a manifest and publish it as `final`, safe against any crash.

    Order: fsync(files), manifest, fsync(manifest), fsync(folders), rename, fsync(parent).

    Raises:
        TrainingError: `final` exists. A committed folder is never overwritten.
    """
    # The base trainer writes in place: in a test, 8 of 14 kills aimed at its saves left the newest
    # checkpoint unusable, and its resume picks the highest number without falling back.
    if final.exists():
        raise TrainingError(f"{final}: exists; a committed folder is never overwritten")
    replace(temporary, final)


def replace(temporary: Path, final: Path) -> None:
    """Replace `final`, if it exists, by `temporary`, which is sealed first.

    The swap is two renames. If the second one fails, the older folder is restored; if the process
    is killed in between, `recover` restores it.
    """
    entries = []
    for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
        fsync(path)
        name = path.relative_to(temporary).as_posix()
        entries.append(ManifestEntry(name=name, **file_digest(path).model_dump()))
    manifest = temporary / MANIFEST
    record = FolderManifest(format=FORMAT, files=entries)
    manifest.write_text(json.dumps(record.to_json(), indent=1))
    fsync(manifest)
    # After a power loss a file exists only if its directory entry was flushed as well.
    for folder in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
        fsync(folder)
    # No portable rename replaces a folder that is not empty, so the older one moves away first.
    old = final.with_name(f"{_OLD}{final.name}-{uuid.uuid4().hex[:8]}")
    if final.exists():
        os.rename(final, old)
    try:
        os.rename(temporary, final)
    except OSError:
        if old.exists():
            os.rename(old, final)
        raise
    fsync(final.parent)
    if old.exists():
        shutil.rmtree(old)


def move_files(temporary: Path, folder: Path) -> None:
    """Move the files of a model folder into a folder in use, each atomically.

    Weight files of an older model are deleted, or loading would mix the two.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = {p.relative_to(temporary): p for p in temporary.rglob("*") if p.is_file()}
    for path in [path for path in folder.iterdir() if WEIGHT_FILES.match(path.name)]:
        if Path(path.name) not in new:
            path.unlink()
    for name, path in new.items():
        fsync(path)
        (folder / name).parent.mkdir(exist_ok=True)
        path.replace(folder / name)
    fsync(folder)
    shutil.rmtree(temporary)


def recover(final: Path) -> None:
    """Undo an interrupted `replace` of `final`, and delete its leftover temporary folders."""
    for path in sorted(final.parent.glob(".tmp-*")):
        name, _, end = path.name.rpartition("-")
        # `final` may be in a user's folder: touch only names that `temporary_folder` makes.
        if re.fullmatch("[0-9a-f]{8}", end) is None or not path.is_dir():
            continue
        if name == f"{_OLD}{final.name}" and not final.exists():
            os.rename(path, final)
            fsync(final.parent)
        elif name in (f"{_OLD}{final.name}", f".tmp-{final.name}"):
            shutil.rmtree(path, ignore_errors=True)


def verify(folder: Path) -> None:
    """Compare every file of `folder` with its manifest.

    Raises:
        TrainingError: the manifest is missing or unreadable, or a file differs from it.
        NewerFormat: the manifest has a newer format.
    """
    try:
        manifest = read_manifest(folder)
    except CollegiumError as error:
        raise TrainingError(f"{folder.name}: {MANIFEST} is missing or damaged") from error
    if manifest.format > FORMAT:
        raise NewerFormat(
            f"{folder.name}: got checkpoint format {manifest.format}; must be at most {FORMAT}; "
            "upgrade collegium"
        )
    problem = damage(folder, manifest.digests())
    match, state = _NAME.match(folder.name), folder / STATE
    if problem is None and match and state.is_file():
        step = open_record(state, dict[str, Any]).get("step", int(match[1]))
        problem = None if step == int(match[1]) else f"is of step {step!r:.20}, under another name"
    if problem is not None:
        raise TrainingError(f"{folder.name}: {problem}")


def read_manifest(folder: Path) -> FolderManifest:
    """Read the manifest of a checkpoint or a student, or raise CollegiumError."""
    return open_record(folder / MANIFEST, FolderManifest)


def checkpoints(run_folder: Path) -> list[Path]:
    """Return the visible checkpoints of a run, newest first, without verifying them."""
    folders = [path for path in run_folder.glob("*") if _NAME.match(path.name) and path.is_dir()]
    return sorted(folders, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """Return the optimizer step N of `checkpoint-N`.

    Raises:
        TrainingError: the folder has another name.
    """
    match = _NAME.match(folder.name)
    if match is None:
        raise TrainingError(f"checkpoint: got `{folder.name}`; must be named checkpoint-N")
    return int(match.group(1))


def survey(run_folder: Path, *, set_aside: bool = True) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and the errors of the damaged newer ones.

    Damaged ones are renamed `corrupt-N-*`, unless `set_aside` is False.

    Raises:
        NewerFormat: the newest intact checkpoint has a newer format.
    """
    failures: list[str] = []
    for folder in checkpoints(run_folder):
        try:
            verify(folder)
        except NewerFormat:
            # Not damaged: falling back to an older one would discard its steps.
            raise
        except TrainingError as error:
            failures.append(str(error))
            if set_aside:
                _log.warning("%s; set aside as %s", error, _renamed(folder, "corrupt").name)
        else:
            return folder, failures
    return None, failures


def set_aside_damaged(run_folder: Path) -> None:
    """Verify every checkpoint of a finished run, and rename and report the damaged ones."""
    for folder in checkpoints(run_folder):
        with suppress(NewerFormat):
            try:
                verify(folder)
            except TrainingError as error:
                aside = _renamed(folder, "corrupt").name
                _log.warning("%s: %s; set aside as %s", run_folder, error, aside)


def require_valid_checkpoint(run_folder: Path) -> None:
    """Check, without renaming anything, that a run has no checkpoints or a valid one.

    Raises:
        TrainingError: there are checkpoints and none verifies.
        NewerFormat: the newest intact checkpoint has a newer format.
    """
    newest, failures = survey(run_folder, set_aside=False)
    if newest is None and failures:
        raise TrainingError(
            f"{run_folder}: no usable checkpoint: {'; '.join(failures)}; restore a valid one, or "
            f"delete {run_folder} to train from scratch"
        )


def remove_temporary(run_folder: Path) -> None:
    """Delete leftovers of interrupted saves and pruning, and undo interrupted replacements."""
    for path in run_folder.glob(f"{_OLD}*"):
        recover(path.with_name(path.name.removeprefix(_OLD).rpartition("-")[0]))
    for path in run_folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside_after(run_folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps, which a resumed run will write again."""
    for folder in checkpoints(run_folder):
        if step_of(folder) > step:
            aside = _renamed(folder, "replaced").name
            _log.warning("%s is later than the step to resume from; kept as %s", folder.name, aside)


def prune(run_folder: Path, *, keep: int | None, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints (at least 2) and that of step `best`.

    None keeps all. The best one counts among the `keep`.
    """
    if keep is None:
        return
    # The newest one may turn out to be damaged, so never fewer than two.
    by_rank = sorted(checkpoints(run_folder), key=lambda folder: step_of(folder) != best)
    for folder in by_rank[max(keep, 2) :]:
        # Renamed first: a kill during `rmtree` must not leave a partial checkpoint visible.
        doomed = folder.with_name(f".tmp-pruned-{uuid.uuid4().hex[:8]}")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def _renamed(folder: Path, label: str) -> Path:
    return folder.rename(folder.with_name(f"{label}-{step_of(folder)}-{uuid.uuid4().hex[:8]}"))
