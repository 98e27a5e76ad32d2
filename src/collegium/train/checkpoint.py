"""Checkpoints that are whole or invisible: written aside, fsynced, sealed by a manifest, then renamed."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from pathlib import Path

from collegium.errors import TrainingError
from collegium.files import fsync, sha256_of

FORMAT = 1
"""Version of the checkpoint's layout; a newer one is refused, never guessed at."""
MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"checkpoint-(\d+)$")
_ASIDE = ".tmp-old-"
_log = logging.getLogger(__name__)


class NewerFormat(TrainingError):
    """A checkpoint that a newer version wrote; it is left alone."""


def temporary_folder(parent: Path, label: int | str) -> Path:
    """A new folder, invisible to `newest_verified`, to write into what `commit` shall show."""
    folder = parent / f".tmp-{label}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder


def commit(temporary: Path, final: Path) -> None:
    """Seal `temporary` with a manifest and make it visible as `final`, in an order that survives a crash at any point.

    fsync(each file), manifest, fsync(manifest), fsync(folders), rename, fsync(parent).

    Raises:
        TrainingError: `final` exists; a committed folder is never overwritten.
    """
    if final.exists():
        raise TrainingError(f"{final}: exists; a committed folder is never overwritten")
    _seal(temporary)
    os.rename(temporary, final)
    fsync(final.parent)


def _seal(temporary: Path) -> None:
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    entries = [_entry(path, temporary) for path in files]
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1))
    fsync(manifest)
    for folder in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
        fsync(folder)


def replace(temporary: Path, final: Path) -> None:
    """Put `temporary` in the place of an older `final`, which stays there until the new one is sealed.

    Between the two lie two renames and nothing else. If the second fails, the older folder is back; if the process is killed
    between them, `recover` brings it back.
    """
    if not final.exists():
        commit(temporary, final)
        return
    _seal(temporary)
    old = final.with_name(f"{_ASIDE}{final.name}-{uuid.uuid4().hex[:8]}")
    os.rename(final, old)
    try:
        os.rename(temporary, final)
    except OSError:
        os.rename(old, final)
        raise
    fsync(final.parent)
    shutil.rmtree(old)


def recover(final: Path) -> None:
    """Undo a replacement of `final` that was killed half-way, and delete what saves of it left behind."""
    for path in sorted(final.parent.glob(".tmp-*")):
        name, _, end = path.name.rpartition("-")
        if re.fullmatch("[0-9a-f]{8}", end) is None or not path.is_dir():
            continue
        if name == f"{_ASIDE}{final.name}" and not final.exists():
            os.rename(path, final)
            fsync(final.parent)
        elif name in (f"{_ASIDE}{final.name}", f".tmp-{final.name}"):
            shutil.rmtree(path, ignore_errors=True)


def verify(folder: Path) -> None:
    """Compare every file of `folder` with its manifest.

    Raises:
        TrainingError: the manifest is missing, unreadable or of a newer format, or a file differs from it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, entries = int(manifest["format"]), list(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TrainingError(f"{folder.name}: has no readable {MANIFEST} ({reason})") from error
    if version > FORMAT:
        raise NewerFormat(
            f"{folder.name}: got checkpoint format {version}; must be at most {FORMAT}; upgrade collegium"
        )
    for entry in entries:
        path = folder / entry["name"]
        if not path.is_file():
            raise TrainingError(f"{folder.name}: {entry['name']} is missing")
        num_bytes = path.stat().st_size
        if num_bytes != entry["bytes"]:
            raise TrainingError(
                f"{folder.name}: {entry['name']} has {num_bytes} bytes; must have {entry['bytes']}"
            )
        if sha256_of(path) != entry["sha256"]:
            raise TrainingError(f"{folder.name}: {entry['name']} fails its sha256")


def checkpoints(run_folder: Path) -> list[Path]:
    """The visible checkpoints of a run, newest first, verified or not."""
    if not run_folder.is_dir():
        return []
    found = [path for path in run_folder.iterdir() if _NAME.match(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The optimizer step of `checkpoint-N`.

    Raises:
        TrainingError: the folder has another name.
    """
    match = _NAME.match(folder.name)
    if match is None:
        raise TrainingError(f"checkpoint: got `{folder.name}`; must be named checkpoint-N")
    return int(match.group(1))


def newest_verified(run_folder: Path) -> Path | None:
    """The newest checkpoint that verifies; a damaged one is renamed `corrupt-N-...` and reported.

    Raises:
        TrainingError: the newest checkpoint is of a newer format.
    """
    return survey(run_folder)[0]


def survey(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and why each newer one does not."""
    failures: list[str] = []
    for folder in checkpoints(run_folder):
        try:
            verify(folder)
        except NewerFormat:
            raise
        except TrainingError as error:
            aside = folder.with_name(f"corrupt-{step_of(folder)}-{uuid.uuid4().hex[:8]}")
            os.rename(folder, aside)
            _log.warning("%s; set aside as %s", error, aside.name)
            failures.append(str(error))
            continue
        return folder, failures
    return None, failures


def require_valid_checkpoint(run_folder: Path) -> None:
    """Refuse a run whose checkpoints are all damaged, before anything is loaded; nothing is renamed.

    Raises:
        TrainingError: there are checkpoints and none verifies, or the newest sound one is of a newer format.
    """
    failures: list[str] = []
    for folder in checkpoints(run_folder):
        try:
            verify(folder)
        except NewerFormat:
            raise
        except TrainingError as error:
            failures.append(str(error))
        else:
            return
    if failures:
        raise TrainingError(
            f"{run_folder}: no usable checkpoint: {'; '.join(failures)}; put a sound one back, or delete "
            f"{run_folder} to train from the start"
        )


def remove_temporary(run_folder: Path) -> None:
    """Delete what an interrupted save or pruning left behind, and undo a replacement that was killed half-way."""
    for path in run_folder.glob(f"{_ASIDE}*"):
        recover(path.with_name(path.name.removeprefix(_ASIDE).rpartition("-")[0]))
    for path in run_folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside_after(run_folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps, which a resumed run is about to write anew."""
    for folder in checkpoints(run_folder):
        if step_of(folder) > step:
            aside = folder.with_name(f"replaced-{step_of(folder)}-{uuid.uuid4().hex[:8]}")
            os.rename(folder, aside)
            _log.warning("%s is later than the resumed step; kept as %s", folder.name, aside.name)


def prune(run_folder: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (at least 2), each by a rename first, so that none is ever half there."""
    for folder in checkpoints(run_folder)[max(keep, 2) :]:
        doomed = folder.with_name(f".tmp-pruned-{uuid.uuid4().hex[:8]}")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def _entry(path: Path, root: Path) -> dict[str, str | int]:
    fsync(path)
    return {
        "name": path.relative_to(root).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
    }
