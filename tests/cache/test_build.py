"""Building: resumable, byte-identical, one writer at a time, and a full disk stops it cleanly."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cache_cases
from collegium.cache.build import build_cache, expected_bytes_per_token
from collegium.cache.codec import Samples, TopK
from collegium.cache.layout import Layout
from collegium.cache.store import open_cache
from collegium.errors import CacheError, CollegiumError
from collegium.files import lock_folder

TARGETS = Samples(draws=20)
PER_SHARD = sum(cache_cases.LENGTHS) - len(cache_cases.LENGTHS)


class _Stop(Exception):
    pass


def _build(path: Path, *, asked: list[int] | None = None, stop_at: int = -1) -> dict:
    def encode(number: int):
        if number == stop_at:
            raise _Stop
        if asked is not None:
            asked.append(number)
        return cache_cases.pieces_of(number, TARGETS)

    found = build_cache(path, cache_cases.identity(TARGETS), encode, shard_targets=[PER_SHARD] * 4)
    assert found is not None
    return found


def test_a_build_goes_on_where_it_stopped_and_gives_the_same_bytes(tmp_path: Path) -> None:
    _build(tmp_path / "whole")
    with pytest.raises(_Stop):
        _build(tmp_path / "broken", stop_at=2)
    with pytest.raises(CacheError, match="no finished cache"):
        open_cache(tmp_path / "broken")
    (tmp_path / "broken" / ".shard-00002-aa.parquet.tmp").write_bytes(b"half a shard")
    asked: list[int] = []
    _build(tmp_path / "broken", asked=asked)
    assert asked == [2, 3]
    assert cache_cases.content(tmp_path / "broken") == cache_cases.content(tmp_path / "whole")


def test_a_finished_cache_is_left_alone(tmp_path: Path) -> None:
    first = _build(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*")}
    asked: list[int] = []
    assert _build(tmp_path, asked=asked) == first
    assert asked == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*")} == before


@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_a_damaged_shard_alone_is_built_again(tmp_path: Path, damage: str) -> None:
    _build(tmp_path)
    good = cache_cases.content(tmp_path)
    victim = sorted(tmp_path.glob("shard-*"))[1]
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    else:
        victim.unlink()
    asked: list[int] = []
    _build(tmp_path, asked=asked)
    assert asked == [1]
    assert cache_cases.content(tmp_path) == good


def test_files_of_others_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "shard-mine.parquet").write_bytes(b"mine")
    _build(tmp_path)
    assert (tmp_path / "shard-mine.parquet").read_bytes() == b"mine"


@pytest.mark.parametrize("is_finished", [True, False])
def test_shards_of_another_run_are_refused_by_field(tmp_path: Path, is_finished: bool) -> None:
    _build(tmp_path)
    if not is_finished:
        (tmp_path / "manifest.json").unlink()
    with pytest.raises(CacheError, match="seed: 3 -> 4"):
        cache_cases.build(tmp_path, TARGETS, seed=4)


def test_of_two_builders_one_wins_and_the_other_says_so(tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path, "wait"),
        pytest.raises(CollegiumError, match="another process is running"),
    ):
        _build(tmp_path)
    _build(tmp_path)


def _limit_file_size(num_bytes: int) -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))


def test_a_full_disk_stops_cleanly_and_the_build_goes_on_later(tmp_path: Path) -> None:
    _build(tmp_path / "whole")
    path = tmp_path / "cache"
    with pytest.raises(_Stop):
        _build(path, stop_at=2)
    kept = cache_cases.content(path)
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    _limit_file_size(500)
    try:
        with pytest.raises(
            CacheError, match=r"the disk is full; about [\d,]+ bytes more are needed"
        ) as told:
            _build(path)
    finally:
        _limit_file_size(soft)
    assert "2 of 4 shards are finished and kept" in str(told.value)
    assert cache_cases.content(path) == kept, "nothing half written may stay"
    _build(path)
    assert cache_cases.content(path) == cache_cases.content(tmp_path / "whole")


def test_too_little_space_is_told_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1, 1, 10))
    asked: list[int] = []
    with pytest.raises(CacheError, match="the disk is full"):
        _build(tmp_path, asked=asked)
    assert asked == []


def test_a_shard_with_a_target_too_few_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="71 targets instead of 72"):
        build_cache(
            tmp_path,
            cache_cases.identity(TARGETS),
            lambda number: cache_cases.pieces_of(number, TARGETS),
            shard_targets=[PER_SHARD + 1],
        )
    assert not list(tmp_path.glob("shard-*"))


def test_the_estimate_is_of_the_right_size() -> None:
    assert 25 < expected_bytes_per_token(Layout("fused", Samples(draws=50)), 49_152) < 48
    assert 80 < expected_bytes_per_token(Layout("fused", TopK(k=50)), 49_152) < 130


def test_the_estimate_counts_the_entries_of_a_sample_and_then_of_what_stands(
    tmp_path: Path,
) -> None:
    """No sample is asked for where shards tell, nor where nothing is missing."""
    told: list[int] = []
    asked: list[int] = []

    def build(stop_at: int = -1) -> None:
        def encode(number: int):
            assert told, "announced too late"
            if number == stop_at:
                raise _Stop
            return cache_cases.pieces_of(number, TARGETS)

        def sample() -> float:
            asked.append(1)
            return 7.0

        build_cache(
            tmp_path,
            cache_cases.identity(TARGETS),
            encode,
            shard_targets=[PER_SHARD] * 4,
            sample=sample,
            announce=told.append,
        )

    with pytest.raises(_Stop):
        build(stop_at=2)
    layout = Layout("fused", TARGETS)
    vocab_size = cache_cases.identity(TARGETS)["vocab_size"]
    per_token = expected_bytes_per_token(layout, vocab_size, 7.0)
    assert told == [round(4 * PER_SHARD * per_token)]
    build()
    assert told[1] == pytest.approx(
        sum(p.stat().st_size for p in tmp_path.glob("shard-0000[01]*")), abs=1
    )
    build()
    assert (len(told), len(asked)) == (2, 1)


KILLED = """
import sys, time
from pathlib import Path
import cache_cases
from collegium.cache.build import build_cache
targets = cache_cases.Samples(draws=20)
def encode(number):
    print(number, flush=True)
    time.sleep(0.02)
    return cache_cases.pieces_of(number, targets)
build_cache(Path(sys.argv[1]), cache_cases.identity(targets), encode, shard_targets=[%d] * 12)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_costs_one_shard_at_most(tmp_path: Path) -> None:
    """SIGKILL three times at random moments; the end is byte for byte that of an unbroken build."""
    build_cache(
        tmp_path / "whole",
        cache_cases.identity(TARGETS),
        lambda number: cache_cases.pieces_of(number, TARGETS),
        shard_targets=[PER_SHARD] * 12,
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", KILLED % PER_SHARD, str(tmp_path / "cut")]
    rng = random.Random(0)
    started: list[int] = []
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        started.append(int(process.stdout.readline()))
        time.sleep(rng.uniform(0.0, 0.09))
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        started += [int(number) for number in rest]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    started += [int(number) for number in result.stdout.split()]
    assert len(started) <= 12 + 3, "a kill may cost the shard that was under way, and no other"
    assert cache_cases.content(tmp_path / "cut") == cache_cases.content(tmp_path / "whole")
