"""Run folder: stage states and times, atomic files, one writer at a time."""

from __future__ import annotations

import os
import platform
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from collegium.config.recipe import Recipe, load_recipe
from collegium.console import say
from collegium.errors import CollegiumError, Interrupted, RecipeError
from collegium.storage.files import LOCK, differing_fields, lock_folder, write_json, write_text
from collegium.storage.records import Environment, FileDigest, Stage, read_record
from collegium.storage.stages import STAGES, damage, read_stages, sealed

REMEDY = "wait for it, or choose another output_dir"
RUN_FILES = ("recipe.json", STAGES)
"""A folder with one of these files is a run folder."""
# Several ranks build a corpus and a cache while one of them claims the folder.
EARLY_FOLDERS = ("cache", "corpus")
"""Folders that may exist before the run folder is claimed."""
PACKAGES = ("collegium", "torch", "transformers", "tokenizers", "datasets", "numpy")
PREVIOUS = "previous"
"""Folder of products that were made by an earlier recipe of the run, in numbered folders."""
MAX_CHANGE = 100
"""Longest shown change of a recipe, in characters."""
PLACE = frozenset({"name", "output_dir"})
"""Recipe keys that change when a run folder is renamed or moved."""


@dataclass(frozen=True)
class RunFolder:
    """Folder of one run, laid out as in docs/design/layout.md."""

    path: Path
    _verified: dict[str, str | None] = field(default_factory=dict, compare=False, repr=False)
    """Damage of each stage whose files were read, None for an intact one."""
    _made: set[Path] = field(default_factory=set, compare=False, repr=False)
    """The path, once the folder was made: from then on it must exist."""
    _former: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Files of the recipe that this process has replaced."""
    _retired: list[Path] = field(default_factory=list, compare=False, repr=False)
    """The numbered folder of this process, once it has moved something."""

    def changes(self, recipe: Mapping[str, Any]) -> list[str]:
        """Return `key: old -> new` for each key that differs from the recipe of the last run."""
        old = read_record(self.path / "recipe.json", dict[str, Any]) or {}
        parts = ({k: v for k, v in one.items() if k not in PLACE} for one in (old, recipe))
        before, now = parts
        return differing_fields(before, now) if old else []

    def retire(self, stage: str, paths: Iterable[Path]) -> None:
        """Move products of a stage, made by another recipe, into a numbered folder, and name it.

        The products of all stages that one process replaces share the folder, with their recipe.
        """
        existing = [path for path in paths if path.exists()]
        if not existing:
            return
        if not self._retired:
            numbers = [
                int(p.name) for p in (self.path / PREVIOUS).glob("[0-9]*") if p.name.isdigit()
            ]
            self._retired.append(self.path / PREVIOUS / str(max(numbers, default=0) + 1))
            for name, text in self._former.items():
                write_text(self._retired[0] / name, text)
        for path in existing:
            target = self._retired[0] / path.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        names = ", ".join(path.relative_to(self.path).as_posix() for path in existing[:3])
        more = f" and {len(existing) - 3} more" if len(existing) > 3 else ""
        say(f"{stage}: made by another recipe; {names}{more} kept in {self._retired[0]}")

    def check_place(self, *, also: Collection[str] = ()) -> None:
        """Check that the folder is writable and holds a run, only the names in `also`, or nothing.

        Raises RecipeError if it holds other files, and CollegiumError if it is not writable.
        """
        nearest = next(p for p in (self.path, *self.path.parents) if p.exists())
        if not nearest.is_dir():
            raise self._not_writable(f"{nearest} is a file")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise self._not_writable(f"{nearest.absolute()} is read-only")
        if nearest != self.path or any((self.path / name).is_file() for name in RUN_FILES):
            return
        names = {path.name for path in self.path.iterdir()}.difference(EARLY_FOLDERS, also)
        # The lock file is there before the first run claims the folder.
        others = sorted(name for name in names if not name.startswith("."))
        if others:
            more = f" and {len(others) - 5} more" if len(others) > 5 else ""
            raise RecipeError(
                f"output_dir: {self.path} holds other data ({', '.join(others[:5])}{more}); "
                "must be new, empty or the folder of this run; choose another output_dir"
            )

    def check_free(self) -> None:
        """Raise CollegiumError if another process holds the folder, without holding it."""
        if (self.path / LOCK).is_file():
            with lock_folder(self.path, REMEDY):
                pass

    def is_in_use(self) -> bool:
        """Whether a living process holds the folder. The lock of a killed one is void."""
        try:
            self.check_free()
        except CollegiumError:
            return True
        return False

    def make(self) -> None:
        """Create the folder and its parents. Raises CollegiumError if it cannot be created."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_writable(str(error.strerror)) from error
        self._made.add(self.path)

    def claim(self, recipe: Mapping[str, Any], text: str) -> None:
        """Create the folder if necessary, and record recipe and environment.

        Raises RecipeError for a folder of other data, and CollegiumError if it is not writable.
        """
        self.check_place()
        if changes := self.changes(recipe):
            more = f"; and {len(changes) - 5} more" if len(changes) > 5 else ""
            shown = (
                textwrap.shorten(change, MAX_CHANGE, placeholder=" ...") for change in changes[:5]
            )
            say(f"{self.path}: changed since the last run: {'; '.join(shown)}{more}")
            for name in ("recipe.yaml", "recipe.json"):
                if (self.path / name).is_file():
                    self._former[name] = (self.path / name).read_text(encoding="utf-8")
        self.record(recipe, text)

    def record(self, recipe: Mapping[str, Any], text: str) -> None:
        """Record recipe and environment. Raises CollegiumError if they cannot be written."""
        try:
            write_json(self.path / "recipe.json", recipe)
            write_text(self.path / "recipe.yaml", text)
            write_json(self.path / "environment.json", environment().to_json())
        except OSError as error:
            raise self._not_writable(str(error.strerror)) from error

    def _not_writable(self, reason: str) -> CollegiumError:
        problem = f"cannot write {self.path} ({reason})"
        return CollegiumError(f"output_dir: {problem}; choose another folder")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder's lock, or raise CollegiumError if another process holds it."""
        self.make()
        with lock_folder(self.path, REMEDY):
            yield

    def stages(self) -> dict[str, Stage]:
        """Return the state of every stage that has been started, without damaged entries."""
        return read_stages(self.path)[0]

    def is_done(self, stage: str, key: str) -> bool:
        """Return True if the stage was finished with the same inputs (`key`) and is undamaged.

        Its files are read once. A damaged stage is named, and one without digests too.
        """
        stages, damaged = read_stages(self.path)
        state = stages.get(stage, Stage())
        if stage not in damaged and (state.status != "done" or state.key != key):
            return False
        if stage not in self._verified:
            if stage in damaged:
                problem: str | None = f"its entry in {STAGES} fails its sha256"
            elif state.files is None:
                problem = "was recorded without the digests of its files"
            else:
                problem = damage(self.path, state.files)
            if problem is not None:
                say(f"{stage}: {problem}; the stage is repeated")
            self._verified[stage] = problem
        return self._verified[stage] is None

    @contextmanager
    def stage(
        self, name: str, key: str, digests: Callable[[], Mapping[str, FileDigest]] = dict
    ) -> Iterator[None]:
        """Record a stage's start, seconds (summed over interruptions), outcome and `digests`.

        Raises CollegiumError if the folder disappears in the meantime.
        """
        started = time.monotonic()
        before = self.stages().get(name, Stage())
        # Another key is other work: its time does not count.
        spent = before.seconds or 0.0 if before.key == key else 0.0
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        state = Stage(status="running", key=key, started=now, seconds=spent)
        if self._made and not self.path.is_dir():
            raise self._gone()
        self._record(name, state)
        outcome: dict[str, Any] = {"status": "done"}
        say(f"{name} ...")
        try:
            yield
            self._require_running(name)
            outcome["files"] = digests()
        # BaseException, because Ctrl-C must not leave the stage as "running".
        except BaseException as error:
            is_stopped = isinstance(error, KeyboardInterrupt | Interrupted)
            status = "interrupted" if is_stopped else "failed"
            outcome = {"status": status, "note": (str(error) or type(error).__name__)[:500]}
            raise
        finally:
            outcome["seconds"] = round(spent + time.monotonic() - started, 2)
            # A deleted folder must not come back with this file in it.
            if (self.path / STAGES).is_file():
                self._record(name, state.model_copy(update=outcome))
            self._verified.pop(name, None)
            say(f"{name}: {outcome['status']}, {outcome['seconds']:.0f} s")

    def _record(self, name: str, state: Stage) -> None:
        stages = {**self.stages(), name: state}
        write_json(self.path / STAGES, {n: sealed(n, one).to_json() for n, one in stages.items()})

    def _require_running(self, name: str) -> None:
        """Check that the entry of a running stage is still there."""
        if self.stages().get(name, Stage()).status != "running":
            raise self._gone()

    def _gone(self) -> CollegiumError:
        return CollegiumError(
            f"output_dir: {self.path} was deleted or moved during the run; must stay in place; "
            "run the same command again"
        )


def recipe_of(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Return the recipe of a run folder, or of a recipe file, with `key=value` overrides.

    Raises:
        RecipeError: the path is neither, or the recipe is not valid.
    """
    if not path.is_dir():
        return load_recipe(path, list(overrides))
    if not any((path / name).is_file() for name in RUN_FILES):
        raise RecipeError(f"{path}: has no {' or '.join(RUN_FILES)}; must be a run folder")
    # A run folder may have been moved.
    return load_recipe(path / "recipe.yaml", [f"output_dir={path.as_posix()}", *overrides])


def environment() -> Environment:
    """Return package versions and machine data for the report."""
    versions = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
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
