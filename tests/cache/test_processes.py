"""Builds by several processes: disjoint shards, the same bytes, no waiting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cache_cases
from collegium.cache.build import merge_all
from collegium.cache.options import Samples
from collegium.cache.processes import Ranks
from collegium.cache.store import open_cache
from collegium.cli import app
from collegium.errors import CacheError, CollegiumError, RecipeError
from refusals import refused

TARGETS = Samples(draws=20)


def _build(path: Path, ranks: Ranks, *, encoded: list[int] | None = None, **changed):
    encoder = cache_cases.Encoder(TARGETS, 5)
    manifest = cache_cases.build(path, encoder=encoder, ranks=ranks, **changed)
    if encoded is not None:
        encoded += encoder.encoded
    return manifest


def test_the_last_rank_finishes_the_cache_with_the_bytes_of_a_single_process(
    tmp_path: Path,
) -> None:
    whole = _build(tmp_path / "whole", Ranks())
    encoded: list[int] = []
    assert _build(tmp_path / "cache", Ranks(1, 3), encoded=encoded) is None
    assert encoded == [1, 4]
    assert _build(tmp_path / "cache", Ranks(0, 3), encoded=encoded) is None
    with refused(CacheError, "TMP/cache: "):
        open_cache(tmp_path / "cache")
    assert _build(tmp_path / "cache", Ranks(2, 3), encoded=encoded) == whole
    assert sorted(encoded) == list(range(5))
    assert cache_cases.content(tmp_path / "cache") == cache_cases.content(tmp_path / "whole")


def test_a_rank_deletes_only_its_own_leftovers(tmp_path: Path) -> None:
    leftovers = [tmp_path / f".shard-{n:05d}-{'a' * 16}.parquet.tmp" for n in (0, 1)]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    _build(tmp_path, Ranks(1, 2))
    assert [leftover.exists() for leftover in leftovers] == [True, False]


def test_locks_exclude_all_but_the_other_ranks(tmp_path: Path) -> None:
    with Ranks(0, 2).lock(tmp_path):
        for other in (Ranks(), Ranks(0, 2), Ranks(0, 4)):
            with refused(CollegiumError, "TMP: "):
                _build(tmp_path, other)
        assert _build(tmp_path, Ranks(1, 2)) is None
    with Ranks().lock(tmp_path), refused(CollegiumError, "TMP: "):
        _build(tmp_path, Ranks(1, 2))


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "1"}],
)
def test_inconsistent_ranks_are_refused(environment: dict[str, str]) -> None:
    with refused(RecipeError, "RANK, WORLD_SIZE: "):
        Ranks.from_environment(environment)


def test_the_launcher_sets_the_rank_and_its_shards() -> None:
    assert Ranks.from_environment({}) == Ranks()
    assert Ranks.from_environment({"RANK": "1", "WORLD_SIZE": "4"}) == Ranks(1, 4)
    assert [n for n in range(9) if Ranks(1, 4).owns(n)] == [1, 5]


@pytest.mark.parametrize("unfinished", [True, False])
def test_merged_folders_have_the_bytes_of_a_single_build(tmp_path: Path, unfinished: bool) -> None:
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
    assert cache_cases.content(tmp_path / first) == cache_cases.content(tmp_path / "whole")
    assert cache_cases.content(tmp_path / "part1") == before


def test_folders_that_do_not_fit_are_not_merged(tmp_path: Path) -> None:
    def merge(*names: str) -> None:
        paths = [tmp_path / name for name in names]
        result = CliRunner().invoke(app, ["cache", "merge", *map(str, paths)])
        assert result.exit_code == 2
        merge_all(paths)

    _build(tmp_path / "a", Ranks(0, 2))
    _build(tmp_path / "b", Ranks(1, 2), seed=4)
    (tmp_path / "empty").mkdir()
    with refused(CacheError, "TMP/b: "):
        merge("a", "b")
    with refused(CacheError, "TMP/a: "):
        merge("a")
    with refused(CacheError, "TMP/empty: "):
        merge("a", "empty")
    with refused(CacheError, "TMP/empty: "):
        merge("empty")
    with refused(CacheError, "TMP/nowhere: "):
        merge("a", "nowhere")
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_a_merge_removes_nothing_from_the_other_folders(tmp_path: Path) -> None:
    for rank in range(2):
        _build(tmp_path / f"part{rank}", Ranks(rank, 2))
    damaged = sorted((tmp_path / "part0").glob("shard-*"))[0]
    assert damaged.name.startswith("shard-00000")
    damaged.write_bytes(b"damaged")
    (tmp_path / "part0" / f".{damaged.name}.tmp").write_bytes(b"half")
    before = cache_cases.content(tmp_path / "part0")
    with refused(CacheError, "TMP/part1: "):
        merge_all([tmp_path / "part1", tmp_path / "part0"])
    assert cache_cases.content(tmp_path / "part0") == before
    _build(tmp_path / "part0", Ranks(0, 2))
    merge_all([tmp_path / "part1", tmp_path / "part0"])
    open_cache(tmp_path / "part1").check()


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "shard-00000-x.parquet"])
def test_a_manifest_that_names_a_path_is_not_merged(tmp_path: Path, name: str) -> None:
    for folder in ("mine", "theirs"):
        _build(tmp_path / folder, Ranks())
    (tmp_path / "secret").write_text("secret")
    cache_cases.rewrite_manifest(tmp_path / "theirs", lambda m: m["shards"][0].update(name=name))
    before = cache_cases.content(tmp_path / "mine")
    with refused(CacheError, "TMP/theirs/manifest.json: shards.0.name: "):
        merge_all([tmp_path / "mine", tmp_path / "theirs"])
    assert cache_cases.content(tmp_path / "mine") == before


def test_a_shard_under_another_number_is_not_merged(tmp_path: Path) -> None:
    for rank in range(2):
        _build(tmp_path / f"part{rank}", Ranks(rank, 2))
    shard = sorted((tmp_path / "part1").glob("shard-*"))[0]
    shard.rename(shard.with_name(shard.name.replace("00001", "00007")))
    with refused(CacheError, "TMP/part1/shard-00007-DIGEST.parquet: "):
        merge_all([tmp_path / "part0", tmp_path / "part1"])


PROCESS = """
import sys
from pathlib import Path
import cache_cases
from collegium.cache.processes import Ranks
encoder, ranks = cache_cases.Encoder(num_shards=5), Ranks.from_environment()
print("last" if cache_cases.build(Path(sys.argv[1]), encoder=encoder, ranks=ranks) else "done")
"""


@pytest.mark.slow
def test_concurrent_processes_build_one_cache(tmp_path: Path) -> None:
    _build(tmp_path / "whole", Ranks())
    command = [sys.executable, "-c", PROCESS, str(tmp_path / "cache")]
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
    outputs = [process.communicate()[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert "last" in outputs
    assert cache_cases.content(tmp_path / "cache") == cache_cases.content(tmp_path / "whole")
