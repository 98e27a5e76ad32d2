"""Shards encoded by the actors of a Ray cluster.

    this process                                  actors, on any node
    lock, identity, progress, files               models
         │ ── number of a shard ───────────────────▶ │
         │ ◀─────────────── bytes of its file ────── │

An actor gets its next shard when it has delivered the last one, so a lost actor or node costs the
shards at hand. They go to the next free actor, and a new actor takes the place of a lost one as
soon as the cluster has room. The retries of Ray itself would wait for the lost actor to return
while others are free.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from collegium.cache.options import ActorOptions, RayOptions
from collegium.cache.shards import Codec, ShardMetadata
from collegium.cache.sources import LocalShards, OnTargets, PieceSource
from collegium.console import quiet_libraries, say
from collegium.errors import CacheError, CollegiumError, RecipeError, first_line
from collegium.storage.files import differing_fields

MAX_LOSSES = 4
"""Actors lost per actor of the pool, without a shard between, before a build gives up."""
PATIENCE = 30.0
"""Seconds without a free actor before a message says so."""

_LOCAL = "local"
"""The address of a cluster of this machine, which ends with the connection."""


class CacheSource(Protocol):
    """The inputs of one cache, which can be pickled."""

    def identity(self) -> dict[str, Any]: ...
    def encoder(self) -> PieceSource: ...


def require_ray(environment: Mapping[str, str] = os.environ) -> None:
    """Raise RecipeError without the package, or in one of several processes of a launcher."""
    if find_spec("ray") is None:
        raise RecipeError("cache.ray: needs the package ray; pip install 'collegium[ray]'")
    if environment.get("WORLD_SIZE", "1") != "1":
        raise RecipeError(
            f"cache.ray: got WORLD_SIZE={environment['WORLD_SIZE']}; must be a single process, "
            "which starts actors; run `collegium cache` before the launcher, or remove cache.ray"
        )


@contextmanager
def connected(options: RayOptions) -> Iterator[None]:
    """Connect to the cluster, or start Ray on this machine. A no-op in a connected process."""
    ray = _ray()
    if ray.is_initialized():
        yield
        return
    # Without an address, Ray joins whichever cluster runs on this machine.
    address = options.address or os.environ.get("RAY_ADDRESS") or _LOCAL
    # Ray replaces the handler by one that kills the process before its files are tidied.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _require_listener(address)
        is_own = {"include_dashboard": False} if address == _LOCAL else {}
        ray.init(address, log_to_driver=False, logging_level="ERROR", **is_own)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise CacheError(
            f"cache.ray.address: no Ray at {address} ({first_line(error)}); must be a cluster that "
            "runs; start one with `ray start --head`"
        ) from error
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, handler)
    try:
        if address == _LOCAL:
            _require_resources(options, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


class RayShards:
    """Shards of one cache, encoded by a pool of actors. Close it to release them."""

    def __init__(
        self, source: CacheSource, num_targets: Sequence[int], pool: ActorOptions, *, name: str
    ) -> None:
        """Use a pool for the cache of this name, whose shards have `num_targets`."""
        self._ray = _ray()
        self._pool = pool
        self._name = name
        self._targets = list(num_targets)
        # Stored once: each new actor reads it.
        self._opening = self._ray.put((name, source, source.identity(), os.getcwd()))
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, int | None]] = {}
        """Each call in progress: its actor, and its task. None: it loads its models."""
        self._losses = 0
        self._waits_since = time.monotonic()

    @property
    def shard_targets(self) -> list[int]:
        return self._targets

    def load(self) -> None:
        next(self._run({0: ("load",)}))

    def fit(self) -> bytes:
        return next(self._run({0: ("fit",)}))[1]

    def bytes_per_target(self, codec: Codec[Any]) -> float:
        return next(self._run({0: ("bytes_per_target", codec)}))[1]

    def shards(
        self, metadata: Mapping[int, ShardMetadata], codec: Codec[Any], advance: OnTargets
    ) -> Iterator[tuple[int, memoryview | bytes]]:
        stored = self._ray.put(codec)
        tasks = {number: ("shard", number, one, stored) for number, one in metadata.items()}
        for number, data in self._run(tasks):
            yield number, data
            advance(metadata[number].num_targets)

    def close(self) -> None:
        """Release all actors."""
        for actor in [*self._idle, *(actor for actor, _ in self._running.values())]:
            self._ray.kill(actor)
        self._idle.clear()
        self._running.clear()

    def _run(self, tasks: Mapping[int, tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Yield the result of each task, a method with its arguments, as they finish."""
        waiting = deque(tasks)
        self._fill(len(tasks))
        while waiting or any(task is not None for _, task in self._running.values()):
            while self._idle and waiting:
                actor, task = self._idle.pop(), waiting.popleft()
                method, *arguments = tasks[task]
                self._running[getattr(actor, method).remote(*arguments)] = actor, task
            done, _ = self._ray.wait(list(self._running), timeout=1.0)
            if not done:
                self._notice_waiting()
                continue
            actor, task = self._running.pop(done[0])
            try:
                result = self._ray.get(done[0])
            except self._ray.exceptions.RayTaskError as error:
                raise self._failure(error.cause) from None
            except self._ray.exceptions.RayError as error:
                # Also a result that was lost with the node that had computed it.
                self._replace(actor, error)
                if task is not None:
                    waiting.appendleft(task)
                continue
            self._idle.append(actor)
            self._losses = 0 if task is not None else self._losses
            if task is not None:
                yield task, result

    def _fill(self, num_tasks: int) -> None:
        """Start the actors that are missing, no more than there are tasks."""
        started = len(self._idle) + len(self._running)
        for _ in range(started, min(self._pool.actors, num_tasks)):
            self._start()

    def _start(self) -> None:
        pool = self._pool
        actor = (
            self._ray.remote(_Worker)
            .options(
                num_cpus=pool.num_cpus,
                num_gpus=pool.num_gpus,
                resources=dict(pool.resources) or None,
                # The default fills one node first, and its memory with copies of the models.
                scheduling_strategy="SPREAD",
            )
            .remote()
        )
        self._running[actor.open.remote(self._opening)] = actor, None

    def _replace(self, actor: Any, error: Exception) -> None:
        """Start another actor for one that was lost, unless too many are lost in a row."""
        self._losses += 1
        if self._losses > MAX_LOSSES * self._pool.actors:
            raise CacheError(
                f"{self._name}: lost {self._losses} actors in a row, the last one by "
                f"{_reason(error)}; must finish a shard between; give them more memory, or "
                "lower cache.batch_size; finished shards are kept"
            )
        say(f"{self._name}: lost an actor ({_reason(error)}); starts another")
        # An actor that cannot be reached may be computing still.
        self._ray.kill(actor)
        self._start()

    def _notice_waiting(self) -> None:
        """Report a cluster without room for a single actor, once every `PATIENCE` seconds."""
        now = time.monotonic()
        if self._idle or any(task is not None for _, task in self._running.values()):
            self._waits_since = now
        elif now - self._waits_since > PATIENCE:
            self._waits_since = now
            required, free = _wanted(self._pool), self._ray.available_resources()
            say(
                f"{self._name}: waits for an actor with {_amounts(required)}; the cluster has free "
                f"{_amounts({name: free.get(name, 0) for name in required})}"
            )

    def _failure(self, cause: Any) -> CollegiumError:
        if isinstance(cause, CollegiumError):
            return cause
        return CacheError(
            f"{self._name}: an actor failed ({first_line(cause)}); finished shards are kept"
        )


class _Worker:
    """An actor: the models of a cache in a process of their own."""

    def open(self, opening: tuple[str, CacheSource, Mapping[str, Any], str]) -> None:
        """Load the models of a cache. Raises CacheError if this node has other inputs."""
        name, source, identity, folder = opening
        with contextlib.suppress(OSError):  # paths of the recipe are relative to it
            os.chdir(folder)
        quiet_libraries()
        if changes := differing_fields(identity, source.identity()):
            raise CacheError(
                f"{name}: node {_ray().util.get_node_ip_address()} has other inputs "
                f"({'; '.join(changes[:5])}); must have the files of this machine under the same "
                "paths; use a shared file system"
            )
        # Ray sets it too late for a library that is loaded already.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self._shards = LocalShards(source.encoder())
        self._shards.load()

    def load(self) -> None:
        """Return when the models are loaded."""

    def fit(self) -> bytes:
        return self._shards.fit()

    def bytes_per_target(self, codec: Codec[Any]) -> float:
        return self._shards.bytes_per_target(codec)

    def shard(self, number: int, metadata: ShardMetadata, codec: Codec[Any]) -> bytes:
        """Return the file of a shard."""
        ((_, data),) = self._shards.shards({number: metadata}, codec, lambda _: None)
        return bytes(data)


def _reason(error: Exception) -> str:
    """Return the first sentence of an error of Ray, which goes on about logs and memory."""
    return first_line(error).partition(". ")[0].partition(" class_name")[0]


def _require_resources(options: RayOptions, available: Mapping[str, float]) -> None:
    """Raise RecipeError if an actor does not fit on this machine, for which it would wait."""
    for pool in (options, *options.teachers.values()):
        for name, amount in _wanted(pool).items():
            if amount > available.get(name, 0):
                raise RecipeError(
                    f"cache.ray: got actors with {amount:g} {name}; must be at most "
                    f"{available.get(name, 0):g}, as this machine has; lower it, or set "
                    "cache.ray.address to that of a cluster"
                )


def _wanted(pool: ActorOptions) -> dict[str, float]:
    """Return the resources of an actor by their names in Ray."""
    return {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}


def _amounts(resources: Mapping[str, float]) -> str:
    known = (f"{amount:g} {name}" for name, amount in sorted(resources.items()) if amount)
    return ", ".join(known) or "nothing"


def _require_listener(address: str) -> None:
    """Raise OSError if nothing listens there: Ray would retry for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _ray() -> Any:
    import ray

    return ray
