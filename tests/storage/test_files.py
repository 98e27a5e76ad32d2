"""Files and locks: strict JSON, atomic writes, and no write through a link."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from collegium.errors import CollegiumError
from collegium.storage.files import (
    differing_fields,
    fingerprint,
    lock_folder,
    write_bytes,
    write_json,
)
from refusals import refused


def test_json_is_strict_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "x.json", {"text": "é"})
    assert json.loads((tmp_path / "a" / "x.json").read_text("utf-8")) == {"text": "é"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a" / "x.json", float("nan"))
    assert json.loads((tmp_path / "a" / "x.json").read_text("utf-8")) == {"text": "é"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.json"]


def test_fingerprint_ignores_only_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_differing_fields_are_named_with_both_values() -> None:
    old = {"seed": 0, "train": {"learning_rate": 0.1, "max_steps": 5}, "controls": []}
    new = {"seed": 1, "train": {"learning_rate": 0.1}, "controls": []}
    assert differing_fields(old, new) == ["seed: 0 -> 1", "train.max_steps: 5 -> None"]


def test_a_write_does_not_follow_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for name in (".x.tmp", "x"):
        (tmp_path / name).symlink_to(victim)
    write_bytes(tmp_path / "x", b"new")
    assert victim.read_bytes() == b"precious"
    assert (tmp_path / "x").read_bytes() == b"new"
    assert not (tmp_path / "x").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["victim", "x"]


def test_a_lock_does_not_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "made")
    with refused(CollegiumError, "TMP/.lock: "), lock_folder(tmp_path, "wait"):
        pass
    assert not (tmp_path / "made").exists()


def test_locks_are_exclusive_or_shared(tmp_path: Path) -> None:
    with lock_folder(tmp_path, "wait"):
        with refused(CollegiumError, "TMP: "), lock_folder(tmp_path, "wait", shared=True):
            pass
        with lock_folder(tmp_path, "wait", name=".other"):
            pass
    with (
        lock_folder(tmp_path, "wait", shared=True),
        lock_folder(tmp_path, "wait", shared=True),
        refused(CollegiumError, "TMP: "),
        lock_folder(tmp_path, "wait"),
    ):
        pass


def test_content_then_name_are_on_the_disk_when_a_write_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[tuple[int, list[str]]] = []

    def record(descriptor: int) -> None:
        flushed.append((os.fstat(descriptor).st_ino, sorted(os.listdir(tmp_path))))

    monkeypatch.setattr(os, "fsync", record)
    write_bytes(tmp_path / "x", b"content")
    inodes = [(tmp_path / "x").stat().st_ino, tmp_path.stat().st_ino]
    # The content before it gets its name, then the folder that holds the name.
    assert flushed == [(inodes[0], [".x.tmp"]), (inodes[1], ["x"])]


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(tmp_path / "x", b"content")
    assert os.listdir(tmp_path) == []
