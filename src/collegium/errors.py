"""The few kinds of error that a user can meet, and the one place that asks what is installed."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


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


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known name closest to `name`, or the list of names when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else f"; known: {', '.join(names)}"
