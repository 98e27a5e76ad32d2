"""Error kinds that a user can meet, and checks of the installed packages."""

from __future__ import annotations

import difflib
import errno
import re
import signal
from collections.abc import Iterable
from importlib import metadata

FLOORS = {
    "torch": ("2.10", "CVE-2026-24747"),
    "transformers": ("5.5", "CVE-2026-5241"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
}
"""Packages that parse third-party files: minimum safe version, and the CVE it fixes."""
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a full disk, an exhausted quota and the size limit of a file."""


class CollegiumError(Exception):
    """Base of all errors a user can fix. The CLI prints no traceback and exits with 2."""


class RecipeError(CollegiumError):
    """The recipe is invalid: unknown key, wrong type, value out of range, incompatible parts."""


class DataError(CollegiumError):
    """A corpus is unreadable or has nothing to train on."""


class ModelError(CollegiumError):
    """A model folder or its weights are unusable."""


class VocabularyError(CollegiumError):
    """A token id has different meanings in a teacher and the student."""


class TrainingError(CollegiumError):
    """A run cannot continue: non-finite values, an inert loss term, a damaged checkpoint."""


class CacheError(CollegiumError):
    """A teacher cache is missing, damaged, or belongs to another run."""


class ExportError(CollegiumError):
    """An export is damaged, differs too much from the student, or cannot hold such a student."""


class Interrupted(CollegiumError):
    """The user stopped the run by a signal, SIGINT by default. A checkpoint was saved."""

    def __init__(self, text: str, number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.number = number


class Terminated(KeyboardInterrupt):
    """SIGTERM was received, which stops a command as SIGINT does."""


def check_versions() -> None:
    """Check that no installed package has a known vulnerability in loading models.

    Raises:
        CollegiumError: a package is missing or older than its entry in `FLOORS`.
    """
    # Reads metadata only: it has to run before the vulnerable code is imported.
    for package, (floor, flaw) in FLOORS.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "none"
        if _release(version) < _release(floor):
            raise CollegiumError(
                f"{package}: got version {version}; must be at least {floor} ({flaw}); "
                f"run `pip install --upgrade {package}`"
            )


def _release(version: str) -> tuple[int, ...]:
    """Parse the leading numbers of a version: `2.10.1+cpu` -> (2, 10, 1)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return `; did you mean X?` for the closest candidate, else `; known: ` and all of them."""
    names = sorted(candidates)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(names) or 'none'}"


def first_line(error: Exception) -> str:
    """Return the first paragraph of an error as one line, with its class if it is one word."""
    text = " ".join(str(error).split("\n\n")[0].split())
    return text if " " in text else f"{type(error).__name__}: {text}"
