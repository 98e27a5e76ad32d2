"""The few kinds of error that a user can meet, and the one place that asks what is installed."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable
from importlib import metadata
from types import ModuleType

FLOORS = {
    "torch": ("2.10", "CVE-2026-24747"),
    "transformers": ("5.5", "CVE-2026-5241"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
}
"""The packages that read files of others: the first version that is safe to use, and the flaw of those before."""


class CollegiumError(Exception):
    """Base of every error that a user can mend; the command line prints it without a traceback and exits with 2."""


class RecipeError(CollegiumError):
    """The recipe is wrong: unknown key, wrong type, value out of range, parts that do not fit together."""


class DataError(CollegiumError):
    """A corpus cannot be read, or holds nothing to learn from."""


class ModelError(CollegiumError):
    """A model folder or its weights cannot be used."""


class VocabularyError(CollegiumError):
    """A teacher and the student do not give the same meaning to the same token id."""


class TrainingError(CollegiumError):
    """A run cannot go on: non-finite values, an inert loss term, a checkpoint that does not verify."""


class CacheError(CollegiumError):
    """A teacher cache is missing, damaged, or of another run."""


class Interrupted(CollegiumError):
    """The user stopped the run; a checkpoint was saved (exit code 130)."""


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra brings it.

    Raises:
        CollegiumError: the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise CollegiumError(
            f"{package}: not installed; run `pip install 'collegium[{extra}]'`"
        ) from error


def check_versions() -> None:
    """Refuse packages with a known flaw in how they read models; asked before any of them is imported.

    Raises:
        CollegiumError: a package is older than its entry in `FLOORS`, or missing.
    """
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
    """`2.10.1+cpu` -> (2, 10, 1); nothing of it but the leading numbers is compared."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name closest to `name`, or the list of names when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(names)}"
