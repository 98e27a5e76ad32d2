"""Builds by Ray actors: the bytes of one process, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cache_cases import Encoder, build, identity
from collegium.cache.build import build_cache
from collegium.cache.cluster import MAX_LOSSES, RayShards, connected, require_ray
from collegium.cache.options import ActorOptions, RayOptions
from collegium.errors import CacheError, ModelError, RecipeError
from ray_case import TARGETS, Accidents, Source
from refusals import refused

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of Ray
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def own_signals() -> Iterator[None]:
    """Leave the handlers of later tests as they were: nodes that are started here replace them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores, to which tests add nodes of one core, so that each holds one actor."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        tests = str(Path(__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
        arguments = {"num_cpus": 0, "object_store_memory": 100 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        before = signal.getsignal(signal.SIGTERM)
        with connected(RayOptions(address=cluster.address)):
            # A build is stopped by SIGTERM as any other stage.
            assert signal.getsignal(signal.SIGTERM) is before
            yield cluster
        cluster.shutdown()


@pytest.fixture
def nodes(cluster: Any) -> Iterator[list[Any]]:
    added = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    cluster.wait_for_nodes()
    yield added
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node)


def build_on_actors(path: Path, source: Source, actors: int = 2) -> Any:
    targets = source.encoder().shard_targets
    pool = ActorOptions(actors=actors)
    with closing(RayShards(source, targets, pool, name="cache")) as shards:
        return build_cache(path, identity(TARGETS), shards)


def content(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir() if not p.name.startswith(".")}


def source(folder: Path, *, num_shards: int = 3, **accidents: Any) -> Source:
    folder.mkdir()
    return Source(Accidents(TARGETS, num_shards, folder=folder, **accidents))


def attempts(source: Source) -> list[int]:
    """Return how often each shard was begun."""
    names = [int(p.name.split("-")[0]) for p in source.encoder().folder.iterdir()]
    return [names.count(number) for number in range(source.encoder().num_shards)]


# The first tests are those without the cluster, because a connected process stays connected.
def test_an_actor_that_does_not_fit_on_this_machine_is_refused() -> None:
    big = ActorOptions(resources={"wafer": 2})
    with refused(RecipeError), connected(RayOptions(teachers={"code": big})):
        pass


def test_an_address_without_ray_is_refused() -> None:
    with refused(CacheError, volatile=r"\(.*\)"), connected(RayOptions(address="127.0.0.1:1")):
        pass


@pytest.mark.usefixtures("nodes")
def test_actors_write_the_bytes_of_one_process(tmp_path: Path) -> None:
    assert build(tmp_path / "one", TARGETS, encoder=Encoder(TARGETS, 6)) is not None
    asked = source(tmp_path / "calls", num_shards=6, processes=2)
    assert build_on_actors(tmp_path / "many", asked) is not None
    assert content(tmp_path / "many") == content(tmp_path / "one")
    assert attempts(asked) == [1] * 6
    processes = {p.name.split("-")[2] for p in asked.encoder().folder.iterdir()}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes


@pytest.mark.usefixtures("nodes")
def test_an_actor_that_dies_costs_its_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(tmp_path / "one", TARGETS, encoder=Encoder(TARGETS, 5))
    asked = source(tmp_path / "calls", num_shards=5, dies_once_at=1)
    assert build_on_actors(tmp_path / "many", asked) is not None
    assert content(tmp_path / "many") == content(tmp_path / "one")
    assert attempts(asked) == [1, 2, 1, 1, 1]
    assert "cache: lost an actor" in capsys.readouterr().err


@pytest.mark.slow
def test_a_node_and_an_actor_die_in_mid_build(
    cluster: Any, nodes: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No finished shard is written again, and each loss costs the shard at hand only."""
    build(tmp_path / "one", TARGETS, encoder=Encoder(TARGETS, 12))
    asked = source(tmp_path / "calls", num_shards=12, seconds=0.5, processes=2)
    folder = tmp_path / "many"
    before: dict[str, int] = {}

    def strike() -> None:
        _wait_for_shards(folder, 2)
        before.update({p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*.parquet")})
        cluster.remove_node(nodes[0], allow_graceful=False)
        _wait_for_shards(folder, 5)
        newest = max(asked.encoder().folder.iterdir(), key=lambda p: p.stat().st_mtime_ns)
        os.kill(int(newest.name.split("-")[2]), signal.SIGKILL)

    thread = Thread(target=strike)
    thread.start()
    assert build_on_actors(folder, asked) is not None
    thread.join()
    assert content(folder) == content(tmp_path / "one")
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    # The same shard may be at hand both times.
    assert min(attempts(asked)) == 1
    assert sum(attempts(asked)) <= 12 + 2
    assert capsys.readouterr().err.count("lost an actor") == 2


def _wait_for_shards(folder: Path, number: int) -> None:
    for _ in range(600):
        if len(list(folder.glob("shard-*.parquet"))) >= number:
            return
        time.sleep(0.05)
    raise AssertionError(f"{folder}: has fewer than {number} shards")


@pytest.mark.slow
@pytest.mark.usefixtures("nodes")
def test_a_shard_that_kills_every_actor_ends_the_build(tmp_path: Path) -> None:
    asked = source(tmp_path / "calls", dies_always_at=2)
    with refused(CacheError, volatile=r"\(.*\)|by [^;]*"):
        build_on_actors(tmp_path / "many", asked, actors=1)
    assert attempts(asked) == [1, 1, MAX_LOSSES + 1]
    # What is finished is kept.
    asked = source(tmp_path / "more")
    assert build_on_actors(tmp_path / "many", asked) is not None
    assert attempts(asked) == [0, 0, 1]


@pytest.mark.usefixtures("nodes")
def test_an_error_of_an_actor_is_that_of_the_build(tmp_path: Path) -> None:
    with refused(ModelError):
        build_on_actors(tmp_path / "many", source(tmp_path / "calls", fails_at=1))


@pytest.mark.usefixtures("nodes")
def test_a_node_with_other_files_is_refused(tmp_path: Path) -> None:
    asked = source(tmp_path / "calls")
    asked.differs_elsewhere = True
    with refused(CacheError, volatile=r"on [\d.]+"):
        build_on_actors(tmp_path / "many", asked)
    assert attempts(asked) == [0, 0, 0]


def test_a_cluster_without_room_is_reported(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build goes on when a node joins."""
    heard = list[str]()
    added = list[Any]()

    def hear(text: str) -> None:
        heard.append(text)
        added.extend([] if added else [cluster.add_node(num_cpus=1, object_store_memory=100 << 20)])

    monkeypatch.setattr("collegium.cache.cluster.PATIENCE", 0.0)
    monkeypatch.setattr("collegium.cache.cluster.say", hear)
    assert build_on_actors(tmp_path / "many", source(tmp_path / "calls"), actors=1) is not None
    cluster.remove_node(added[0])
    assert heard[0] == "cache: waits for an actor with 1 CPU; the cluster has free nothing"


def test_a_missing_package_and_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(RecipeError):
        require_ray({"WORLD_SIZE": "2"})
    monkeypatch.setattr("collegium.cache.cluster.find_spec", lambda _: None)
    with refused(RecipeError):
        require_ray({})
