"""Hidden states of a live teacher, recorded to disk so that its body can be released.

Evaluation and preflight read the same batches of several models. Recording one model after the
other keeps a single body in memory. The replayed answers equal the live ones bit for bit.

Shapes: N rows of a batch, D width.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from collegium.distributions import LIVE, Answer, HiddenRows, Teacher
from collegium.errors import CollegiumError, DataError, ModelError
from collegium.teachers.local import LocalTeacher, readable_from
from collegium.teachers.prefetch import batch_digest
from collegium.types import Batch, Head, Rows


@dataclass(eq=False)
class RecordedTeacher:
    """The hidden states of a teacher that `record` wrote to a folder, and its head."""

    capabilities = LIVE
    name: str
    folder: Path
    head: Head

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> Answer:
        """Replay the answer to a recorded batch. Raises ModelError if it was not recorded."""
        path = _file(self.folder, batch)
        if taps or not path.is_file():
            what = "hidden states of inner layers" if taps else "this batch"
            raise ModelError(f"teacher {self.name}: {what} were not recorded; score it live")
        hidden_ND = load_file(path, device=str(self.head.weight.device))["hidden"]
        home = batch.input_ids.device
        return Answer(self.name, readable_from(home, HiddenRows(hidden_ND, self.head)))


def record(teacher: Teacher, batches: Iterable[tuple[Batch, Rows]], folder: Path) -> Teacher:
    """Score batches once and write the final hidden states, (N, D) each, to `folder`.

    The result keeps the head of the model in memory, and nothing else of it. A teacher without a
    model in this process is returned as it is. Raises CollegiumError for a full disk, DataError
    without a batch, and TrainingError for non-finite hidden states.
    """
    if not isinstance(teacher, LocalTeacher):
        return teacher
    folder.mkdir(parents=True, exist_ok=True)
    head = None
    for batch, rows in batches:
        hidden = teacher.hidden_rows(batch, rows)
        num_bytes, free = hidden.hidden.nbytes, shutil.disk_usage(folder).free
        if free < num_bytes:
            raise CollegiumError(
                f"{folder}: {free / 1e6:,.0f} MB free, and the next batch of {teacher.name} takes "
                f"{num_bytes / 1e6:,.0f} MB; free some space, or lower max_tokens"
            )
        save_file({"hidden": hidden.hidden.contiguous()}, _file(folder, batch))
        head = hidden.head
    if head is None:
        raise DataError(
            f"teacher {teacher.name}: got no target token to score; must have at least one; use a "
            "larger split"
        )
    return RecordedTeacher(teacher.name, folder, head)


def _file(folder: Path, batch: Batch) -> Path:
    return folder / f"{batch_digest(batch).hex()}.safetensors"
