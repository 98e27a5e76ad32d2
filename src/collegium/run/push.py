"""Upload of a finished student with its card and exports to a repository of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collegium.errors import CollegiumError, TrainingError, first_line
from collegium.models.folder import HUB_ID
from collegium.report.formats import whole
from collegium.report.tables import Column, Line, Table
from collegium.run.card import CARD, card_text, is_generated
from collegium.run.folder import RunFolder
from collegium.run.students import require_student
from collegium.storage.credentials import holds_secret
from collegium.storage.files import sha256_of
from collegium.storage.records import Stage, open_record
from collegium.storage.stages import STAGES, damage, read_stages
from collegium.train.checkpoint import MANIFEST, read_manifest, verify

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TRAIN = "train"


@dataclass(frozen=True)
class Upload:
    """A file of the repository."""

    name: str
    source: Path | bytes

    @property
    def num_bytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def plan_push(run_folder: Path, repo: str, exports: Sequence[str] = ()) -> list[Upload]:
    """Verify the student and the exports, and return the files to upload. Nothing is written.

    Only files that a manifest lists are uploaded, and the card. One edited by hand is kept.

    Raises:
        CollegiumError: the name of the repository is none, or the student or an export is missing,
            unfinished, damaged or of another training.
    """
    if not HUB_ID.match(repo):
        raise CollegiumError(f"push: got {repo}; must be a repository `owner/name`")
    require_student(run_folder)
    folder = RunFolder(run_folder)
    folder.check_free()
    student = run_folder / "student"
    _check_student(run_folder)
    uploads = [Upload(name, student / name) for name in (*_listed(student), MANIFEST)]
    for name in dict.fromkeys(exports):
        export = _checked_export(run_folder, name)
        files = (*_listed(export), MANIFEST)
        uploads += [Upload(f"exports/{name}/{file}", export / file) for file in files]
    path = student / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not text or is_generated(text):
        text = card_text(run_folder, repo=repo, exports=exports)
    return [Upload(CARD, text.encode()), *(one for one in uploads if one.name != CARD)]


def _listed(folder: Path) -> list[str]:
    return [entry.name for entry in read_manifest(folder).files]


def _check_student(run_folder: Path) -> None:
    stages, damaged = read_stages(run_folder)
    stage = stages.get(TRAIN, Stage())
    if TRAIN in damaged:
        problem: str | None = f"its entry in {STAGES} fails its sha256"
    elif stage.status != "done":
        problem = f"its training is {stage.status or 'not recorded'}, not done"
    else:
        files = {n: one for n, one in (stage.files or {}).items() if n.startswith("student/")}
        listed = {f"student/{name}" for name in (*_listed(run_folder / "student"), MANIFEST)}
        is_other = files.keys() != listed
        problem = "its files are not those of its training" if is_other else None
        problem = problem or damage(run_folder, files)
    if problem is not None:
        raise CollegiumError(
            f"{run_folder / 'student'}: {problem}; must be finished and undamaged; run "
            "`collegium train RECIPE`"
        )


def _checked_export(run_folder: Path, name: str) -> Path:
    existing = {path.parent.name: path.parent for path in run_folder.glob(f"exports/*/{MANIFEST}")}
    if name not in existing:
        raise CollegiumError(
            f"--export: got `{name}`; must be a finished export of this run: "
            f"{', '.join(sorted(existing)) or 'it has none'}"
        )
    folder = existing[name]
    try:
        verify(folder)
    except TrainingError as error:
        raise CollegiumError(f"{folder}: damaged ({error}); export it again") from error
    record = open_record(folder / "export.json", dict[str, Any])
    if record.get("student") != sha256_of(run_folder / "student" / MANIFEST):
        raise CollegiumError(
            f"{folder}: was made from another student; must be made from this one; export it again"
        )
    return folder


def push(repo: str, uploads: Sequence[Upload], *, is_public: bool = False) -> str:
    """Create the repository if necessary, upload all files in one commit, and return its address.

    Raises:
        CollegiumError: the hub refuses it, or the repository is public without `is_public`.
    """
    from huggingface_hub import CommitOperationAdd

    api = hub_api()
    operations = [CommitOperationAdd(one.name, one.source) for one in uploads]
    try:
        address = api.create_repo(repo, private=not is_public, exist_ok=True)
        # An existing repository keeps its visibility.
        is_private = api.model_info(repo).private
        if is_private or is_public:
            api.create_commit(repo, operations, commit_message="Upload a student of Collegium")
    # Network, login, quota, permissions: errors of many types.
    except Exception as error:
        reason = first_line(error)
        reason = type(error).__name__ if holds_secret(reason) else reason
        raise CollegiumError(
            f"push: {repo}: {reason}; must be a repository that you may write to; log in with "
            "`hf auth login`"
        ) from error
    if not is_private and not is_public:
        raise CollegiumError(
            f"push: {repo} exists and is public; must be private without --public; nothing was "
            "uploaded"
        )
    return str(address)


def hub_api() -> HfApi:
    """Return the client of the hub, which finds the user's login by itself."""
    from huggingface_hub import HfApi

    return HfApi()


def upload_table(uploads: Sequence[Upload], repo: str) -> Table[Upload]:
    """Return the files and their sizes."""
    total = sum(one.num_bytes for one in uploads)
    columns: list[Column[Upload]] = [Column("Bytes", "num_bytes", whole)]
    lines = [Line(one.name, one) for one in uploads]
    title = f"{repo}: {len(uploads)} files, {total:,} bytes"
    return Table(title, "File", columns, lines)
