"""Run folder: stage states and times, atomic files, one writer at a time."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from collegium.console import say
from collegium.errors import CollegiumError, Interrupted, RecipeError
from collegium.storage.files import (
    LOCK,
    differing_fields,
    lock_folder,
    read_json,
    write_json,
    write_text,
)
from collegium.storage.records import Environment, Stage, read_record

REMEDY = "wait for it, or choose another output_dir"
RUN_FILES = ("recipe.json", "stages.json")
"""A folder with one of these files is a run folder."""
# Several ranks build a cache while one of them claims the folder.
EARLY_FOLDERS = ("cache",)
"""Folders that may exist before the run folder is claimed."""
PACKAGES = ("collegium", "torch", "transformers", "tokenizers", "datasets", "numpy")
FREE_SECTIONS = frozenset({"cache", "evaluate", "preflight", "name", "output_dir"})
"""Recipe sections that may change between calls on one run folder.

Measurements are repeated, and a run folder may be renamed or moved.
"""


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object, empty if the file does not exist."""
    value = read_json(path)
    if value is not None and not isinstance(value, dict):
        raise CollegiumError(f"{path}: not a JSON object; delete it to recreate it")
    return value or {}


@dataclass(frozen=True)
class RunFolder:
    """Folder of one run, laid out as in docs/design/layout.md."""

    path: Path

    def check(self, recipe: Mapping[str, Any]) -> None:
        """Check that this recipe can run in the folder, without writing anything.

        Raises:
            RecipeError: the folder holds a run of an incompatible recipe, or is no run folder.
            CollegiumError: the folder is not writable.
        """
        self.check_place()
        old = _read_object(self.path / "recipe.json")
        kept = {key: value for key, value in old.items() if key not in FREE_SECTIONS}
        new = {key: value for key, value in recipe.items() if key not in FREE_SECTIONS}
        fields = differing_fields(kept, new) if old else []
        if fields:
            raise RecipeError(
                f"output_dir: {self.path} holds a run of another recipe ({'; '.join(fields[:5])}); "
                "choose another output_dir, or delete this folder"
            )

    def check_place(self, *, also: Collection[str] = ()) -> None:
        """Check that the folder is writable and holds a run, only the names in `also`, or nothing.

        Raises:
            RecipeError: it holds other files.
            CollegiumError: it is not writable.
        """
        nearest = next(p for p in (self.path, *self.path.parents) if p.exists())
        if not nearest.is_dir():
            raise self._not_writable(f"{nearest} is a file")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise self._not_writable(f"{nearest.absolute()} is read-only")
        if nearest != self.path or any((self.path / name).is_file() for name in RUN_FILES):
            return
        names = sorted(path.name for path in self.path.iterdir())
        # The lock file is there before the first run claims the folder.
        others = [
            name
            for name in names
            if not name.startswith(".") and name not in (*EARLY_FOLDERS, *also)
        ]
        if others:
            more = f" and {len(others) - 5} more" if len(others) > 5 else ""
            raise RecipeError(
                f"output_dir: {self.path} holds other data ({', '.join(others[:5])}{more}); "
                "must be new, empty or the folder of this run; choose another output_dir"
            )

    def check_free(self) -> None:
        """Check that no other process holds the folder, without holding it.

        Raises:
            CollegiumError: another process holds it.
        """
        if (self.path / LOCK).is_file():
            with lock_folder(self.path, REMEDY):
                pass

    def make(self) -> None:
        """Create the folder and its parents.

        Raises:
            CollegiumError: it cannot be created.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_writable(str(error.strerror)) from error

    def claim(self, recipe: Mapping[str, Any], text: str) -> None:
        """Create the folder if necessary, and record the recipe and the environment in it.

        Raises:
            RecipeError: as in `check`.
            CollegiumError: the folder is not writable.
        """
        self.check(recipe)
        self.make()
        try:
            write_json(self.path / "recipe.json", recipe)
            write_text(self.path / "recipe.yaml", text)
            write_json(self.path / "environment.json", environment().to_json())
        except OSError as error:
            raise self._not_writable(str(error.strerror)) from error

    def _not_writable(self, reason: str) -> CollegiumError:
        return CollegiumError(
            f"output_dir: cannot write {self.path} ({reason}); choose another folder"
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder's lock during the context.

        Raises:
            CollegiumError: another process holds it.
        """
        self.make()
        with lock_folder(self.path, REMEDY):
            yield

    def stages(self) -> dict[str, Stage]:
        """Return the state of every stage that has been started."""
        return read_record(self.path / "stages.json", dict[str, Stage]) or {}

    def is_done(self, stage: str, key: str) -> bool:
        """Return True if the stage was finished with the same inputs (`key`)."""
        state = self.stages().get(stage, Stage())
        return state.status == "done" and state.key == key

    @contextmanager
    def stage(self, name: str, key: str) -> Iterator[None]:
        """Record a stage's start, seconds (summed over interruptions) and outcome."""
        started = time.monotonic()
        before = self.stages().get(name, Stage())
        # Another key is other work: its time does not count.
        spent = before.seconds or 0.0 if before.key == key else 0.0
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        state = Stage(status="running", key=key, started=now, seconds=spent)
        self._record(name, state)
        outcome: dict[str, Any] = {}
        say(f"{name} ...")
        try:
            yield
        # BaseException, because Ctrl-C must not leave the stage as "running".
        except BaseException as error:
            is_stopped = isinstance(error, KeyboardInterrupt | Interrupted)
            outcome["status"] = "interrupted" if is_stopped else "failed"
            outcome["note"] = str(error)[:500]
            raise
        else:
            outcome["status"] = "done"
        finally:
            outcome["seconds"] = round(spent + time.monotonic() - started, 2)
            self._record(name, state.model_copy(update=outcome))
            say(f"{name}: {outcome['status']}, {outcome['seconds']:.0f} s")

    def _record(self, name: str, state: Stage) -> None:
        stages = {**self.stages(), name: state}
        write_json(
            self.path / "stages.json", {name: stage.to_json() for name, stage in stages.items()}
        )


def environment() -> Environment:
    """Return package versions and machine data for the report."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cpus=os.cpu_count(),
        packages=versions,
    )


def _processor() -> str:
    # `platform.processor()` is often empty on Linux.
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
