"""Hidden states of a live teacher, recorded to disk so that its body can be released.

Evaluation and preflight read the same windows of several models. Recording one model after the
other keeps a single body in memory. Replayed answers equal the live ones bit for bit in the same
batches. Windows may come back in other batches, as in the second sweep of preflight.

Shapes: B windows of T tokens in a batch, N rows, D width.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from collegium.cache.processes import SINGLE_PROCESS, Ranks
from collegium.distributions import LIVE, Answer, HiddenRows, Teacher
from collegium.errors import CollegiumError, DataError, ModelError, first_line
from collegium.storage.files import write_json
from collegium.storage.records import open_record
from collegium.teachers.local import LocalTeacher, readable_from
from collegium.types import Batch, Head, Rows


@dataclass(frozen=True)
class Place:
    """Rows of one window in a file."""

    file: Path
    start: int
    stop: int


@dataclass(eq=False)
class RecordedTeacher:
    """The hidden states of a teacher that `record` wrote to a folder, and its head."""

    capabilities = LIVE
    name: str
    head: Head
    places: Mapping[bytes, Place]
    """Digest of a window -> its rows."""

    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> Answer:
        """Replay the answer to recorded windows. Raises ModelError for any other."""
        counts = _rows_per_window(batch, rows)
        windows = zip(_window_digests(batch), counts, strict=True)
        places = [self.places.get(digest) for digest, count in windows if count]
        recorded = [place.stop - place.start if place else 0 for place in places]
        if taps or recorded != [count for count in counts if count]:
            what = "hidden states of inner layers were" if taps else "a window of this batch was"
            raise ModelError(f"teacher {self.name}: {what} not recorded; score it live")
        device = str(self.head.weight.device)
        parts = []
        for file, group in itertools.groupby(filter(None, places), lambda place: place.file):
            with safe_open(file, framework="pt", device=device) as opened:
                states = opened.get_slice("hidden")
                parts += [states[place.start : place.stop] for place in group]
        hidden = HiddenRows(torch.cat(parts), self.head)
        return Answer(self.name, readable_from(batch.input_ids.device, hidden))


def record(
    teacher: Teacher,
    batches: Iterable[tuple[Batch, Rows]],
    folder: Path,
    ranks: Ranks = SINGLE_PROCESS,
) -> Teacher:
    """Score batches once and write the final hidden states, (N, D) each, to `folder`.

    The result keeps the head of the model in memory, and nothing else of it. A teacher without a
    model in this process is returned as it is. Of several processes with the same batches, each
    scores its share; `join_shares` adds those of the others to a result.

    Raises CollegiumError for a full disk, DataError without a batch, and TrainingError for
    non-finite hidden states.
    """
    if not isinstance(teacher, LocalTeacher):
        return teacher
    folder.mkdir(parents=True, exist_ok=True)
    head, places = None, dict[bytes, Place]()
    for number, (batch, rows) in enumerate(batches):
        if not ranks.owns(number):
            continue
        hidden = teacher.hidden_rows(batch, rows)
        num_bytes, file = hidden.hidden.nbytes, folder / f"{number}.safetensors"
        try:
            save_file({"hidden": hidden.hidden.contiguous()}, file)
        except (OSError, SafetensorError) as error:
            raise CollegiumError(
                f"{folder}: {teacher.name}: cannot be written ({first_line(error)}); the next "
                f"batch takes {num_bytes:,} bytes, {shutil.disk_usage(folder).free:,} are free; "
                "free some space, or lower max_tokens"
            ) from error
        start = 0
        for digest, count in zip(
            _window_digests(batch), _rows_per_window(batch, rows), strict=True
        ):
            places[digest] = Place(file, start, start + count)
            start += count
        head = hidden.head
    if not ranks.is_single:
        shares = {key.hex(): [p.file.name, p.start, p.stop] for key, p in places.items()}
        write_json(_share(folder, ranks.rank), shares)
    if head is None and ranks.rank > 0:  # fewer batches than processes
        return teacher
    if head is None:
        raise DataError(
            f"teacher {teacher.name}: got no target token to score; must have at least one; use a "
            "larger split"
        )
    return RecordedTeacher(teacher.name, head, places)


def join_shares(teacher: Teacher, folder: Path, ranks: Ranks) -> Teacher:
    """Return a recorded teacher with the rows that all processes have written to `folder`."""
    if ranks.is_single or not isinstance(teacher, RecordedTeacher):
        return teacher
    places = dict[bytes, Place]()
    for rank in range(ranks.world_size):
        for key, (name, *span) in open_record(_share(folder, rank), dict[str, list[Any]]).items():
            places[bytes.fromhex(key)] = Place(folder / name, *span)
    return replace(teacher, places=places)


def _share(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def _rows_per_window(batch: Batch, rows: Rows) -> list[int]:
    num_windows, length = batch.input_ids.shape
    return (rows.index // length).bincount(minlength=num_windows).tolist()


def _window_digests(batch: Batch) -> list[bytes]:
    """Return a digest of the tokens, labels and documents of each window, without its padding."""
    columns = (batch.input_ids, batch.position_ids, batch.labels, batch.sample_ids)
    table_BCT = torch.stack(columns, dim=1).cpu()
    length_B = (batch.sample_ids >= 0).sum(1).tolist()  # padding is on the right
    return [
        hashlib.blake2b(
            table_CT[:, :length].contiguous().numpy().tobytes(), digest_size=16
        ).digest()
        for table_CT, length in zip(table_BCT, length_B, strict=True)
    ]
