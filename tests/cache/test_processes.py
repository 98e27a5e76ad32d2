"""Several processes build one cache: disjoint shards, the same bytes, nobody waits for anybody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cache_cases
from collegium.cache.build import build_cache
from collegium.cache.codec import Samples
from collegium.cache.processes import Ranks
from collegium.cache.store import open_cache
from collegium.cli import app
from collegium.errors import CacheError, CollegiumError, RecipeError

TARGETS = Samples(draws=20)
COUNTS = [sum(cache_cases.LENGTHS) - len(cache_cases.LENGTHS)] * 5


def _build(path: Path, share: Ranks, *, asked: list[int] | None = None, **changed):
    def encode(number: int):
        if asked is not None:
            asked.append(number)
        return cache_cases.pieces_of(number, TARGETS)

    identity = cache_cases.identity(TARGETS, **changed)
    return build_cache(path, identity, encode, shard_targets=COUNTS, share=share)


def test_the_last_process_ends_the_cache_with_the_bytes_of_one(tmp_path: Path) -> None:
    whole = _build(tmp_path / "whole", Ranks())
    asked: list[int] = []
    assert _build(tmp_path / "cache", Ranks(1, 3), asked=asked) is None
    assert asked == [1, 4]
    assert _build(tmp_path / "cache", Ranks(0, 3), asked=asked) is None
    with pytest.raises(CacheError, match="no finished cache"):
        open_cache(tmp_path / "cache")
    assert _build(tmp_path / "cache", Ranks(2, 3), asked=asked) == whole
    assert sorted(asked) == list(range(5))
    found = cache_cases.content(tmp_path / "cache")
    assert found == cache_cases.content(tmp_path / "whole")


def test_a_process_removes_only_what_is_its_own(tmp_path: Path) -> None:
    leftovers = [tmp_path / f".shard-{n:05d}-{'a' * 16}.parquet.tmp" for n in (0, 1)]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    _build(tmp_path, Ranks(1, 2))
    assert [leftover.exists() for leftover in leftovers] == [True, False]


def test_locks_keep_out_everybody_but_the_other_ranks(tmp_path: Path) -> None:
    with Ranks(0, 2).lock(tmp_path):
        for other in (Ranks(), Ranks(0, 2), Ranks(0, 4)):
            with pytest.raises(CollegiumError, match="another process is running"):
                _build(tmp_path, other)
        assert _build(tmp_path, Ranks(1, 2)) is None
    with (
        Ranks().lock(tmp_path),
        pytest.raises(CollegiumError, match="another process is running"),
    ):
        _build(tmp_path, Ranks(1, 2))


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "1"}],
)
def test_ranks_that_fit_nothing_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=r"RANK, WORLD_SIZE: got .*; must be"):
        Ranks.from_environment(environment)


def test_the_launcher_tells_the_share() -> None:
    assert Ranks.from_environment({}) == Ranks()
    assert Ranks.from_environment({"RANK": "1", "WORLD_SIZE": "4"}) == Ranks(1, 4)
    assert [n for n in range(9) if Ranks(1, 4).owns(n)] == [1, 5]


@pytest.mark.parametrize("unfinished", [True, False])
def test_merged_folders_have_the_bytes_of_one(tmp_path: Path, unfinished: bool) -> None:
    _build(tmp_path / "whole", Ranks())
    for rank in range(2):
        _build(tmp_path / f"part{rank}", Ranks(rank, 2))
    first = "part0" if unfinished else "new"
    others = [str(tmp_path / f"part{rank}") for rank in range(2)]
    (tmp_path / first).mkdir(exist_ok=True)
    before = cache_cases.content(tmp_path / "part1")
    result = CliRunner().invoke(app, ["cache", "merge", str(tmp_path / first), *others])
    assert result.exit_code == 0, result.output
    assert "355 targets in 5 shards" in result.output
    found = cache_cases.content(tmp_path / first)
    assert found == cache_cases.content(tmp_path / "whole")
    assert cache_cases.content(tmp_path / "part1") == before


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    def merge(*names: str) -> str:
        paths = [str(tmp_path / name) for name in names]
        result = CliRunner().invoke(app, ["cache", "merge", *paths])
        assert result.exit_code == 2
        return result.output

    _build(tmp_path / "a", Ranks(0, 2))
    _build(tmp_path / "b", Ranks(1, 2), seed=4)
    (tmp_path / "empty").mkdir()
    assert "seed: 4 -> 3" in merge("a", "b")
    assert "2 of 5 shards are in no folder (1, 3)" in merge("a")
    assert "holds no shard" in merge("a", "empty")
    assert "holds no shard" in merge("empty")
    assert "no such folder" in merge("a", "nowhere")
    assert not (tmp_path / "a" / "manifest.json").exists()


PROCESS = """
import sys
from pathlib import Path
import cache_cases
from collegium.cache.build import build_cache
from collegium.cache.processes import Ranks
targets = cache_cases.Samples(draws=20)
found = build_cache(
    Path(sys.argv[1]), cache_cases.identity(targets), lambda n: cache_cases.pieces_of(n, targets),
    shard_targets=[%d] * 5, share=Ranks.from_environment(),
)
print("last" if found else "done")
"""


@pytest.mark.slow
def test_processes_at_the_same_time_end_with_one_cache(tmp_path: Path) -> None:
    _build(tmp_path / "whole", Ranks())
    command = [sys.executable, "-c", PROCESS % COUNTS[0], str(tmp_path / "cache")]
    path = os.pathsep.join(p for p in sys.path if p)
    running = [
        subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": path, "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert "last" in told
    found = cache_cases.content(tmp_path / "cache")
    assert found == cache_cases.content(tmp_path / "whole")
