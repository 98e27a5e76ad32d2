"""Atomic checkpoint folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from collegium.errors import TrainingError
from collegium.train import checkpoint
from refusals import refused


def make(folder: Path, step: int, text: str = "x") -> Path:
    temporary = checkpoint.temporary_folder(folder, step)
    (temporary / "student").mkdir()
    (temporary / "student" / "weights").write_text(text * 100)
    (temporary / "state.json").write_text("{}")
    final = folder / f"checkpoint-{step}"
    checkpoint.commit(temporary, final)
    return final


def test_a_committed_folder_verifies_and_lists_every_file(tmp_path: Path) -> None:
    final = make(tmp_path, 3)
    checkpoint.verify(final)
    manifest = json.loads((final / "MANIFEST.json").read_text())
    assert [entry["name"] for entry in manifest["files"]] == ["state.json", "student/weights"]
    assert checkpoint.survey(tmp_path)[0] == final
    assert checkpoint.survey(tmp_path / "none") == (None, [])


def test_newest_is_by_number_not_by_name_or_time(tmp_path: Path) -> None:
    made = [make(tmp_path, step) for step in (200, 9, 30)]
    assert checkpoint.survey(tmp_path)[0] == made[0]
    assert checkpoint.checkpoints(tmp_path) == [made[0], made[2], made[1]]


def test_every_kind_of_damage_is_detected(tmp_path: Path) -> None:
    def flip(final: Path) -> None:
        path = final / "student" / "weights"
        data = bytearray(path.read_bytes())
        data[50] ^= 1
        path.write_bytes(bytes(data))

    damages = [
        flip,
        lambda final: (final / "student" / "weights").write_text("x"),
        lambda final: (final / "state.json").unlink(),
        lambda final: (final / "MANIFEST.json").unlink(),
        lambda final: (final / "MANIFEST.json").write_text('{"format"'),
    ]
    for number, damage in enumerate(damages):
        final = make(tmp_path, number)
        damage(final)
        with refused(TrainingError, f"checkpoint-{number}"):
            checkpoint.verify(final)


def test_a_damaged_newest_checkpoint_is_set_aside_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = make(tmp_path, 1), make(tmp_path, 2)
    (second / "state.json").write_text("[]")
    assert checkpoint.survey(tmp_path)[0] == first
    assert not second.exists()
    assert [path.name[:10] for path in tmp_path.glob("corrupt-*")] == ["corrupt-2-"]
    assert "checkpoint-2: state.json has a wrong sha256" in caplog.text
    (first / "state.json").unlink()
    newest, failures = checkpoint.survey(tmp_path)
    assert newest is None
    assert failures == ["checkpoint-1: state.json is missing"]


def test_a_newer_format_is_neither_used_nor_set_aside(tmp_path: Path) -> None:
    final = make(tmp_path, 1)
    manifest = json.loads((final / "MANIFEST.json").read_text())
    (final / "MANIFEST.json").write_text(json.dumps(manifest | {"format": 99}))
    with refused(checkpoint.NewerFormat, "checkpoint-1"):
        checkpoint.survey(tmp_path)
    assert final.exists()


def test_the_order_on_disk_survives_a_crash_at_any_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        events.append("rename")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    make(tmp_path, 4)
    names = [event.split(" ")[1] if " " in event else event for event in events]
    assert names[:4] == ["state.json", "weights", "MANIFEST.json", "student"]
    assert names[4].startswith(".tmp-4-")
    assert names[5:] == ["rename", tmp_path.name]


def test_a_failing_fsync_leaves_nothing_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in range(1, 6):
        calls: list[int] = []

        def fsync(descriptor: int, count: int = count, calls: list[int] = calls) -> None:
            calls.append(descriptor)
            if len(calls) == count:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space"):
            make(tmp_path, count)
    assert checkpoint.checkpoints(tmp_path) == []
    assert len(list(tmp_path.glob(".tmp-*"))) == 5
    checkpoint.remove_temporary(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_committed_folder_is_never_overwritten(tmp_path: Path) -> None:
    final = make(tmp_path, 1, "a")
    with refused(TrainingError, "TMP/checkpoint-1"):
        make(tmp_path, 1, "b")
    assert (final / "student" / "weights").read_text() == "a" * 100


def test_replace_swaps_the_whole_folder(tmp_path: Path) -> None:
    final = make(tmp_path, 1, "a")
    temporary = checkpoint.temporary_folder(tmp_path, "new")
    (temporary / "file").write_text("b")
    checkpoint.replace(temporary, final)
    checkpoint.verify(final)
    assert sorted(path.name for path in final.iterdir()) == ["MANIFEST.json", "file"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def newer(folder: Path) -> Path:
    temporary = checkpoint.temporary_folder(folder, "student")
    (temporary / "file").write_text("new")
    return temporary


def older(folder: Path) -> Path:
    final = folder / "student"
    temporary = checkpoint.temporary_folder(folder, "student")
    (temporary / "file").write_text("old")
    checkpoint.replace(temporary, final)
    return final


@pytest.mark.parametrize(("name", "count"), [("fsync", 1), ("fsync", 2), ("rename", 2)])
def test_a_failed_replacement_keeps_the_older_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    final = older(tmp_path)
    temporary = newer(tmp_path)
    real, calls = getattr(os, name), []

    def fails(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == count:
            raise OSError(28, "No space left on device")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails)
        with pytest.raises(OSError, match="No space"):
            checkpoint.replace(temporary, final)
    checkpoint.verify(final)
    assert (final / "file").read_text() == "old"


def test_the_older_folder_exists_until_the_new_one_is_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, real, seen = older(tmp_path), os.fsync, []
    temporary = newer(tmp_path)

    def fsync(descriptor: int) -> None:
        seen.append((final / "file").read_text())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpoint.replace(temporary, final)
    # File, manifest and folder of the new one, then the parent after the renames.
    assert seen == ["old", "old", "old", "new"]


class Killed(BaseException):
    """Stands in for the death of the process."""


def test_a_replacement_killed_between_its_renames_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cleaner in (checkpoint.recover, lambda final: checkpoint.remove_temporary(final.parent)):
        folder = tmp_path / str(cleaner)
        final = older(folder)
        temporary = newer(folder)
        real = os.rename

        def rename(source: Path, target: Path, real: Any = real, final: Path = final) -> None:
            if target == final:
                raise Killed
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", rename)
            with pytest.raises(Killed):
                checkpoint.replace(temporary, final)
        assert not final.exists()
        cleaner(final)
        checkpoint.verify(final)
        assert (final / "file").read_text() == "old"
        assert [path.name for path in folder.iterdir()] == ["student"]


def test_recovery_leaves_other_files_alone(tmp_path: Path) -> None:
    final = older(tmp_path)
    (tmp_path / ".tmp-old-other-01234567").mkdir()
    (tmp_path / ".tmp-notes").write_text("mine")
    (tmp_path / ".tmp-student-notebook").mkdir()
    newer(tmp_path)
    checkpoint.recover(final)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".tmp-notes",
        ".tmp-old-other-01234567",
        ".tmp-student-notebook",
        "student",
    ]


def test_pruning_keeps_at_least_two(tmp_path: Path) -> None:
    for step in range(1, 6):
        make(tmp_path, step)
    checkpoint.prune(tmp_path, keep=3)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [5, 4, 3]
    checkpoint.prune(tmp_path, keep=1)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [5, 4]
    assert len(list(tmp_path.iterdir())) == 2


def test_pruning_keeps_the_best_and_can_keep_all(tmp_path: Path) -> None:
    for step in range(1, 7):
        make(tmp_path, step)
    for keep, best, left in [
        (None, None, [6, 5, 4, 3, 2, 1]),
        (4, 2, [6, 5, 4, 2]),
        (3, 5, [6, 5, 4]),
        (2, 4, [6, 4]),
    ]:
        checkpoint.prune(tmp_path, keep=keep, best=best)
        assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == left


def test_later_checkpoints_are_kept_under_another_name(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    checkpoint.set_aside_after(tmp_path, 1)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [1]
    assert len(list(tmp_path.glob("replaced-*"))) == 2


def test_a_folder_of_another_name_has_no_step(tmp_path: Path) -> None:
    with refused(TrainingError, "checkpoint"):
        checkpoint.step_of(tmp_path / "best")


def test_a_run_with_only_damaged_checkpoints_is_refused_and_unchanged(tmp_path: Path) -> None:
    checkpoint.require_valid_checkpoint(tmp_path)
    for step in (8, 12):
        make(tmp_path, step)
    (tmp_path / "checkpoint-12" / "MANIFEST.json").unlink()
    checkpoint.require_valid_checkpoint(tmp_path)
    (tmp_path / "checkpoint-8" / "student" / "weights").write_text("y" * 100)
    with refused(TrainingError, "TMP: "):
        checkpoint.require_valid_checkpoint(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-8"]
    make(tmp_path, 16)
    manifest = tmp_path / "checkpoint-16" / "MANIFEST.json"
    manifest.write_text(json.dumps({"format": 99, "files": []}))
    with refused(checkpoint.NewerFormat, "checkpoint-16"):
        checkpoint.require_valid_checkpoint(tmp_path)


def test_moved_files_replace_all_weight_files_of_an_older_model(tmp_path: Path) -> None:
    """Loading would mix the shards of two models; other files stay."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, names in {
        old: ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt"],
        new: ["model.safetensors", "config.json"],
    }.items():
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name)
    checkpoint.move_files(new, old)
    assert {path.name: path.read_text() for path in old.iterdir()} == {
        "model.safetensors": "new",
        "config.json": "new",
        "notes.txt": "old",
    }
