"""One format of an export: the files it writes, the tool that loads them, and its bounds."""

from __future__ import annotations

import logging
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from collegium.errors import ExportError
from collegium.storage.records import FolderManifest, Verification
from collegium.train.checkpoint import WEIGHT_FILES, read_manifest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    from collegium.export.fake_quantization import WeightGrid

INSTALL = "pip install 'collegium[export]'"


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The largest distance to the student at which an export is finished."""

    bits_per_byte: float
    """Absolute change on held-out text, in either direction."""
    logits: float | None = None
    """Largest difference of a logit over max(1, standard deviation of all logits)."""

    def problems(self, measured: Verification, *, is_trained: bool = False) -> Iterator[str]:
        """Yield a phrase with the measured number for each bound that is exceeded.

        With a bound on logits, greedy continuations must be equal, up to ties closer than twice
        that bound. An export that `is_trained` further may have any number of bits per byte less.
        """
        if measured.kl is None or measured.max_logit_difference is None:
            yield "the logits are not finite"
            return
        change = measured.bits_per_byte_change
        size = None if change is None else change if is_trained else abs(change)
        if size is not None and not size <= self.bits_per_byte:
            yield f"bits per byte change by {change:+.4f} (bound {self.bits_per_byte:g})"
        limit = None if self.logits is None else self.logits * max(1.0, measured.logit_spread)
        if limit is not None and measured.max_logit_difference > limit:
            largest = measured.max_logit_difference
            yield f"the largest logit difference is {largest:.3g} (bound {limit:.3g})"
        if limit is not None and measured.tie_gap > 2 * limit:
            yield (
                f"{measured.differing_texts:.0%} of the greedy continuations differ, by a "
                f"logit gap of {measured.tie_gap:.3g}"
            )
        yield from _tokenizer_problems(measured)


def _tokenizer_problems(measured: Verification) -> Iterator[str]:
    if measured.differing_tokenizations:
        share = measured.differing_tokenizations
        yield f"{share:.1%} of the texts are tokenized differently"
    if not measured.same_chat_template:
        yield "the chat template differs"
    if not measured.same_eos:
        yield "the eos token differs"


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """A format: one class for each way to write one."""

    bounds: Bounds
    packages: ClassVar[tuple[str, ...]] = ()
    """Packages of the extra `export` that it needs, as pip names them."""
    loader: ClassVar[str] = "transformers"
    """The foreign loader: a branch of `foreign.load`."""
    file: ClassVar[str | None] = None
    """The file that the loader opens, None for the folder."""

    @property
    def grid(self) -> WeightGrid | None:
        """The integers that it rounds weights to, None for floats.

        Training can simulate them, up to rounding of embedding, head and activations.
        """
        return None

    @property
    def finer(self) -> Format | None:
        """The format with more scales, written where this one is beyond a bound. None for none."""
        return None

    def check(
        self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, where: str
    ) -> None:
        """Raise ExportError if a package is missing, or the format cannot hold such a student."""
        del config, tokenizer
        if missing := self.missing_packages():
            raise ExportError(
                f"{where}: needs the package {missing[0]}; must be installed; run `{INSTALL}`"
            )

    def missing_packages(self) -> list[str]:
        """Return the packages that it needs and that are not installed."""
        return [name for name in self.packages if not is_installed(name)]

    @abstractmethod
    def write(self, student: Path, target: Path) -> None:
        """Write the files into an empty folder. Raises ExportError if the student does not fit."""

    def source(self, folder: Path) -> dict[str, Any]:
        """Return the location of an export as `foreign.load` reads it."""
        source = {"loader": self.loader, "folder": str(folder), "file": self.file}
        return {key: value for key, value in source.items() if value is not None}

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that wrote it."""
        return {name: version(name) for name in ("torch", "transformers", *self.packages)}


def is_installed(package: str) -> bool:
    """Return whether a package is installed, by its name for pip."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def copy_files(student: Path, target: Path, *, weights: bool) -> None:
    """Copy the files of a student, byte for byte, with or without its weights."""
    manifest: FolderManifest = read_manifest(student)
    for entry in manifest.files:
        if weights or not WEIGHT_FILES.match(entry.name):
            (target / entry.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(student / entry.name, target / entry.name)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide warnings and log lines of exporters and quantizers about their own internals."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@dataclass(frozen=True, kw_only=True)
class HuggingFace(Format):
    """The student's own files, for transformers and every tool that reads its folders."""

    def write(self, student: Path, target: Path) -> None:
        copy_files(student, target, weights=True)
