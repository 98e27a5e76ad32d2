"""Products of a run: each knows its inputs, builds itself once, and opens what it built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from collegium.run.context import RunContext
from collegium.storage.files import fingerprint
from collegium.storage.records import FileDigest, Stage
from collegium.storage.stages import digests_of

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True, eq=False)
class Artifact(ABC, Generic[T_co]):
    """One product of a run. `ensure` builds it, unless it exists with the same inputs."""

    stage: ClassVar[str]
    file: ClassVar[str]
    is_shared: ClassVar[bool] = False
    """Whether all processes of a run build it together."""
    context: RunContext

    @property
    def name(self) -> str:
        """Its entry in stages.json."""
        return self.stage

    @property
    def path(self) -> Path:
        """The file or folder that exists once it is built."""
        return self.context.folder.path / self.file

    @abstractmethod
    def identity(self) -> Any:
        """Everything it depends on, as plain data."""

    def dependencies(self) -> Sequence[Artifact[Any]]:
        """Return the artifacts that `build` opens."""
        return ()

    def building(self, missing: Sequence[Artifact[Any]]) -> AbstractContextManager[Any]:
        """Show progress while its missing dependencies are built one after the other."""
        return nullcontext()

    @abstractmethod
    def build(self) -> None:
        """Write it. An interrupted build resumes when called again."""

    def join(self) -> None:
        """Do the part of this process in a build of rank 0."""
        raise NotImplementedError(f"{self.name} is built by one process")

    @abstractmethod
    def open(self) -> T_co:
        """Return the finished artifact."""

    def is_done(self) -> bool:
        """Return True if it was built from the same inputs, and every file is as it was then."""
        return self.context.folder.is_done(self.name, self.key) and self.path.exists()

    @property
    def key(self) -> str:
        """Fingerprint of the identity."""
        return fingerprint(self.identity())

    def log(self) -> AbstractContextManager[None]:
        """Record start, seconds, outcome and digests in stages.json."""
        return self.context.folder.stage(self.name, self.key, self.digests)

    def digests(self) -> Mapping[str, FileDigest]:
        """Return the size and SHA-256 of each file that it consists of, verified before its use."""
        inner = (path for path in self.path.rglob("*") if path.is_file())
        files = [self.path] if self.path.is_file() else sorted(inner)
        return digests_of(self.context.folder.path, files)

    def ensure(self) -> T_co:
        """Build it and its dependencies where necessary, and open it, or raise CollegiumError."""
        if not self.is_done():
            # All of them are compared with their inputs before the first is built.
            missing = [one for one in self.dependencies() if not one.is_done()]
            with self.building(missing):
                for one in missing:
                    one.ensure()
            self.set_aside()
            with self.log(), self.sharing():
                self.build()
        return self.open()

    def sharing(self) -> AbstractContextManager[None]:
        """Let the other processes of the run join the build, if it is shared."""
        return self.context.processes.sharing(self.name) if self.is_shared else nullcontext()

    def set_aside(self) -> None:
        """Move what another recipe has made here out of the way of a build. Nothing is deleted."""
        stage = self.context.folder.stages().get(self.name)
        if stage is not None and stage.key != self.key:
            self.context.folder.retire(self.name, self.products(stage))

    def products(self, stage: Stage) -> Sequence[Path]:
        """Return the files and folders that the recorded stage has made."""
        return [self.context.folder.path / name for name in stage.files or ()]
