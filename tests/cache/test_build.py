"""Cache builds: resumable, byte-identical, with a single writer and a clean stop on a full disk."""

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
from collegium.storage.files import lock_folder
from refusals import refused

TARGETS = Samples(draws=20)
PER_SHARD = sum(cache_cases.LENGTHS) - len(cache_cases.LENGTHS)


class _Stop(Exception):
    pass


def _build(path: Path, *, encoded: list[int] | None = None, stop_at: int = -1) -> dict:
    def encode(number: int):
        if number == stop_at:
            raise _Stop
        if encoded is not None:
            encoded.append(number)
        return cache_cases.pieces_of(number, TARGETS)

    manifest = build_cache(
        path, cache_cases.identity(TARGETS), encode, shard_targets=[PER_SHARD] * 4
    )
    assert manifest is not None
    return manifest


def test_an_interrupted_build_resumes_and_gives_the_same_bytes(tmp_path: Path) -> None:
    _build(tmp_path / "whole")
    with pytest.raises(_Stop):
        _build(tmp_path / "broken", stop_at=2)
    with refused(CacheError, "TMP/broken: "):
        open_cache(tmp_path / "broken")
    (tmp_path / "broken" / ".shard-00002-aa.parquet.tmp").write_bytes(b"half a shard")
    encoded: list[int] = []
    _build(tmp_path / "broken", encoded=encoded)
    assert encoded == [2, 3]
    assert cache_cases.content(tmp_path / "broken") == cache_cases.content(tmp_path / "whole")


def test_a_finished_cache_is_not_rebuilt(tmp_path: Path) -> None:
    first = _build(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*")}
    encoded: list[int] = []
    assert _build(tmp_path, encoded=encoded) == first
    assert encoded == []
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*")} == before


@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_only_a_damaged_shard_is_built_again(tmp_path: Path, damage: str) -> None:
    _build(tmp_path)
    good = cache_cases.content(tmp_path)
    victim = sorted(tmp_path.glob("shard-*"))[1]
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    else:
        victim.unlink()
    encoded: list[int] = []
    _build(tmp_path, encoded=encoded)
    assert encoded == [1]
    assert cache_cases.content(tmp_path) == good


def test_foreign_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "shard-mine.parquet").write_bytes(b"mine")
    _build(tmp_path)
    assert (tmp_path / "shard-mine.parquet").read_bytes() == b"mine"


@pytest.mark.parametrize("is_finished", [True, False])
def test_shards_of_another_run_are_refused_by_field(tmp_path: Path, is_finished: bool) -> None:
    _build(tmp_path)
    if not is_finished:
        (tmp_path / "manifest.json").unlink()
    with refused(CacheError, "TMP: "):
        cache_cases.build(tmp_path, TARGETS, seed=4)


def test_a_second_builder_is_refused(tmp_path: Path) -> None:
    with lock_folder(tmp_path, "wait"), refused(CollegiumError, "TMP: "):
        _build(tmp_path)
    _build(tmp_path)


def _limit_file_size(num_bytes: int) -> None:
    # Larger writes then fail with EFBIG, which simulates a full disk.
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))


def test_a_full_disk_stops_cleanly_and_the_build_resumes_later(tmp_path: Path) -> None:
    _build(tmp_path / "whole")
    path = tmp_path / "cache"
    with pytest.raises(_Stop):
        _build(path, stop_at=2)
    kept = cache_cases.content(path)
    soft = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    # Bytes needed and free depend on the version of Arrow and on the machine.
    with refused(CacheError, "TMP/cache: ", volatile=r"[\d,]{3,}"):
        _limit_file_size(500)
        try:
            _build(path)
        finally:
            _limit_file_size(soft)
    assert cache_cases.content(path) == kept, "no partial file may remain"
    _build(path)
    assert cache_cases.content(path) == cache_cases.content(tmp_path / "whole")


def test_low_disk_space_is_refused_before_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1, 1, 10))
    encoded: list[int] = []
    with refused(CacheError, "TMP: "):
        _build(tmp_path, encoded=encoded)
    assert encoded == []


def test_a_shard_with_too_few_targets_is_not_written(tmp_path: Path) -> None:
    with refused(ValueError, "shard 0: "):
        build_cache(
            tmp_path,
            cache_cases.identity(TARGETS),
            lambda number: cache_cases.pieces_of(number, TARGETS),
            shard_targets=[PER_SHARD + 1],
        )
    assert not list(tmp_path.glob("shard-*"))


def test_the_size_estimate_is_in_the_measured_range() -> None:
    assert 25 < expected_bytes_per_token(Layout("fused", Samples(draws=50)), 49_152) < 48
    assert 80 < expected_bytes_per_token(Layout("fused", TopK(k=50)), 49_152) < 130


def test_the_estimate_uses_a_sample_and_then_the_finished_shards(tmp_path: Path) -> None:
    """No sample is drawn once shards exist, nor if none is missing."""
    estimates: list[int] = []
    samples: list[int] = []

    def build(stop_at: int = -1) -> None:
        def encode(number: int):
            assert estimates, "announced too late"
            if number == stop_at:
                raise _Stop
            return cache_cases.pieces_of(number, TARGETS)

        def sample() -> float:
            samples.append(1)
            return 7.0

        build_cache(
            tmp_path,
            cache_cases.identity(TARGETS),
            encode,
            shard_targets=[PER_SHARD] * 4,
            sample=sample,
            announce=estimates.append,
        )

    with pytest.raises(_Stop):
        build(stop_at=2)
    layout = Layout("fused", TARGETS)
    vocab_size = cache_cases.identity(TARGETS)["vocab_size"]
    per_token = expected_bytes_per_token(layout, vocab_size, 7.0)
    assert estimates == [round(4 * PER_SHARD * per_token)]
    build()
    assert estimates[1] == pytest.approx(
        sum(p.stat().st_size for p in tmp_path.glob("shard-0000[01]*")), abs=1
    )
    build()
    assert (len(estimates), len(samples)) == (2, 1)


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
def test_a_kill_costs_at_most_one_shard(tmp_path: Path) -> None:
    """After three SIGKILLs at random times, the bytes equal those of an uninterrupted build."""
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
    assert len(started) <= 12 + 3, "a kill may cost only the shard in progress"
    assert cache_cases.content(tmp_path / "cut") == cache_cases.content(tmp_path / "whole")
