"""Sources behind a URL: the documents of local files, copied once, named by the URL."""

from __future__ import annotations

import json
import os
from pathlib import Path

import fsspec
import pytest
from pydantic import ValidationError

from collegium.data import remote
from collegium.data.readers import SourceOptions
from collegium.data.sources import SourceSummary, read_documents, source_files
from collegium.errors import DataError
from refusals import refused


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a process that has listed nothing."""
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "home"))
    remote.copy_of.cache_clear()
    return tmp_path / "home"


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    folder = tmp_path / "bucket"
    for name, texts in (("law/a.jsonl", ["one", "two"]), ("law/deep/b.jsonl", ["three"])):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "law" / "README.md").write_text("about")
    return folder


def read(**source: str) -> list[tuple[str, str, str]]:
    documents = read_documents(SourceOptions(**source), where="data.train[0]")
    return [(str(one.text), one.id, one.domain) for one in documents]


@pytest.mark.parametrize("inside", ["law", "law/a.jsonl", "law/*.jsonl", "law/**/*.jsonl"])
def test_the_documents_are_those_of_local_files(bucket: Path, inside: str) -> None:
    """In the same order, with the same domains, and names that begin with the URL."""
    url = f"file://{bucket}/{inside}"
    local, copied = read(path=f"{bucket}/{inside}"), read(url=url)
    assert [one[0] for one in copied] == [one[0] for one in local]
    assert [one[2] for one in copied] == [one[2] for one in local]
    assert [one[1] for one in copied] == [f"file://{one[1]}" for one in local]
    summary = SourceSummary("data.train[0]")
    list(read_documents(SourceOptions(url=url), where="data.train[0]", summary=summary))
    assert summary.origin == url


def test_files_of_memory_and_of_a_root_are_copied(user_folder: Path) -> None:
    """A file system without folders on disk."""
    files = fsspec.filesystem("memory")
    files.pipe("/remote-law/x.jsonl", b'{"text": "one"}\n')
    try:
        assert read(url="memory://remote-law") == [
            ("one", "memory://remote-law/x.jsonl:1", "remote-law")
        ]
    finally:
        files.rm("/remote-law", recursive=True)
    assert [p.name for p in user_folder.rglob("*.jsonl")] == ["x.jsonl"]


def test_only_what_changed_is_copied_again(
    bucket: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = SourceOptions(url=f"file://{bucket}/law")
    before = {p.name: p.stat().st_ino for p in source_files(source, "data") or ()}
    (bucket / "law" / "a.jsonl").write_text('{"text": "other"}\n')
    os.utime(bucket / "law" / "a.jsonl", (1, 1))
    (bucket / "law" / "c.jsonl").write_text('{"text": "four"}\n')
    assert len(source_files(source, "data") or ()) == 2, "listed once per process"
    remote.copy_of.cache_clear()
    after = {p.name: p.stat().st_ino for p in source_files(source, "data") or ()}
    assert after.keys() == {"a.jsonl", "b.jsonl", "c.jsonl"}
    assert after["b.jsonl"] == before["b.jsonl"]
    assert after["a.jsonl"] != before["a.jsonl"]
    copied = next(one for one in source_files(source, "data") or () if one.name == "c.jsonl")
    copied.write_text("")  # cut short
    remote.copy_of.cache_clear()
    assert {one.name: one.stat().st_size for one in source_files(source, "data") or ()}[
        "c.jsonl"
    ] == len('{"text": "four"}\n')
    (bucket / "law" / "deep" / "b.jsonl").unlink()
    remote.copy_of.cache_clear()
    assert [one[0] for one in read(url=f"file://{bucket}/law")] == ["other", "four"]


def test_an_interrupted_copy_goes_on(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{bucket}/law"
    replace, done = os.replace, list[str]()

    def failing(source: str, target: str) -> None:
        if str(target).endswith(".json"):
            return replace(source, target)
        if len(done) == 1:
            raise OSError(28, "No space left on device")
        done.append(str(target))
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(remote.os, "replace", failing)
        with refused(DataError, "data.train[0]: file://TMP"):
            read(url=url)
    remote.copy_of.cache_clear()
    first = Path(done[0]).stat().st_ino
    assert len(read(url=url)) == 3
    assert Path(done[0]).stat().st_ino == first


@pytest.mark.parametrize(
    "url", ["file:///no/such/folder", "file:///no/such/*.jsonl", "nosuch://x/y"]
)
def test_a_url_without_files_is_refused(url: str) -> None:
    with refused(DataError, f"data.train[0]: {url}: cannot be read", volatile=r"space in \S+"):
        read(url=url)


@pytest.mark.parametrize(
    "source",
    [
        {"url": "s3://key:secret@bucket/data"},
        {"url": "no-url"},
        {"url": "s3://bucket/data", "path": "x.txt"},
        {},
    ],
)
def test_an_invalid_source_is_refused(source: dict[str, str]) -> None:
    with pytest.raises(ValidationError) as caught:
        SourceOptions(**source)
    assert "key:secret" not in caught.value.errors(include_input=False)[0]["msg"]


def test_a_name_outside_of_the_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hostile:
        def isfile(self, path: str) -> bool:
            return False

        def find(self, root: str) -> list[str]:
            return [f"{root}/../../x.jsonl"]

    monkeypatch.setattr(remote, "url_to_fs", lambda url: (Hostile(), "bucket/law"))
    with refused(DataError, "data.train[0]: s3://bucket/law: ", volatile=r"space in \S+"):
        read(url="s3://bucket/law")
