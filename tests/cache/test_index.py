"""The index of a cache, on disk for large ones, and the verification of shards on first read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import cache_cases
from collegium.cache.index import PieceIndex
from collegium.cache.keys import PieceKey
from collegium.cache.options import Samples
from collegium.cache.shards import read_keys
from collegium.cache.store import CacheReader, open_cache
from collegium.cli import app
from collegium.errors import CacheError
from collegium.storage.location import Location

KEYS = [cache_cases.key_of(s, p, n) for s in range(3) for p, n in enumerate(cache_cases.LENGTHS)]
NUMBERS = st.integers(0, 3) | st.integers(0, 2**64 - 1)


@given(st.lists(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=8), max_size=4))
def test_an_index_is_a_dictionary_of_the_first_places(shards: list[list[tuple[int, ...]]]) -> None:
    places: dict[tuple[int, int], tuple[int, int]] = {}
    arrays = []
    for shard, keys in enumerate(shards):
        columns = np.array(keys, np.uint64).reshape(-1, 3)
        arrays.append((columns[:, 0], columns[:, 1:]))
        for row, (document, first, second) in enumerate(keys):
            places.setdefault((document ^ first, second), (shard, row))
    index = PieceIndex.from_keys(arrays)
    assert len(index) == len(places)
    for keys in shards:
        for document, first, second in keys:
            window = np.array([first, second], "<u8").tobytes()
            assert index.find(PieceKey(document, 0, window)) == places[document ^ first, second]
            absent = np.array([first, second ^ 5], "<u8").tobytes()
            expected = places.get((document ^ first, second ^ 5))
            assert index.find(PieceKey(document, 0, absent)) == expected


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that counts as large, and an empty cache folder of the user."""
    monkeypatch.setattr("collegium.cache.index.STORED_TARGETS", 1)
    monkeypatch.setattr("collegium.cache.verified.REMEMBERED_BYTES", 1)
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "user"))
    cache_cases.build(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files of which the checksum was computed."""
    names: list[str] = []
    sha256 = Location.sha256
    monkeypatch.setattr(
        Location, "sha256", lambda self, name: names.append(name) or sha256(self, name)
    )
    return names


def content(cache: CacheReader) -> list[bytes]:
    """All targets of a cache, by key."""
    return [cache.read([key]).logits(slice(None)).numpy().tobytes() for key in KEYS]


def test_a_second_open_reads_no_shard_and_trusts_verified_ones(
    large: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = open_cache(large)
    assert hashed == []
    expected = content(cache)
    assert sorted(hashed) == sorted(path.name for path in large.glob("*.parquet"))
    hashed.clear()
    opened: list[str] = []
    parquet = Location.parquet
    monkeypatch.setattr(
        Location, "parquet", lambda self, name: opened.append(name) or parquet(self, name)
    )
    cache = open_cache(large)
    assert (opened, len(cache)) == ([], len(KEYS))
    assert content(cache) == expected
    assert hashed == []


def test_a_changed_shard_is_verified_when_it_is_first_read(large: Path) -> None:
    content(open_cache(large))
    victim = sorted(large.glob("*.parquet"))[1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    cache = open_cache(large)
    cache.read([KEYS[0]])
    with pytest.raises(CacheError, match=rf"{victim.name}: fails its sha256"):
        cache.read([KEYS[len(cache_cases.LENGTHS)]])


def test_the_command_verify_trusts_nothing(large: Path) -> None:
    content(open_cache(large))
    victim = min(large.glob("*.parquet"))
    before = victim.stat()
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    ended = CliRunner().invoke(app, ["cache", "verify", str(large)])
    assert ended.exit_code == 2
    assert "fails its sha256" in ended.output


def test_a_shard_of_another_size_is_refused_on_open(large: Path) -> None:
    open_cache(large)
    victim = min(large.glob("*.parquet"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(CacheError, match=rf"{victim.name}: has .* bytes instead of"):
        open_cache(large)


def test_a_copy_of_a_cache_is_verified_again(large: Path, tmp_path: Path, hashed: list) -> None:
    content(open_cache(large))
    hashed.clear()
    shutil.copytree(large, tmp_path / "copy")
    content(open_cache(tmp_path / "copy"))
    assert len(hashed) == 3


@pytest.mark.parametrize("damage", ["truncated", "other places", "other keys", "no places"])
def test_a_damaged_index_is_made_again(large: Path, damage: str) -> None:
    expected = content(open_cache(large))
    (file,) = (large.parent / "user" / "index").iterdir()
    rows = np.load(file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        if damage == "other places":
            rows[2] = np.roll(rows[2], 1)
        elif damage == "other keys":
            rows[0] += 1
        else:
            rows[2] = 2**63 - 1
        np.save(file, rows)
    assert content(open_cache(large)) == expected
    assert content(open_cache(large)) == expected


def test_without_a_writable_folder_everything_is_in_memory(
    large: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = content(open_cache(large))
    (large.parent / "file").write_text("")
    monkeypatch.setenv("COLLEGIUM_CACHE", str(large.parent / "file"))
    assert content(open_cache(large)) == expected
    assert "the index of the cache is not kept" in caplog.text


def test_small_caches_leave_nothing_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLLEGIUM_CACHE", str(tmp_path / "user"))
    cache_cases.build(tmp_path / "cache", Samples(draws=5))
    content(open_cache(tmp_path / "cache"))
    assert not (tmp_path / "user").exists()


def test_keys_of_another_type_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "document": pa.array([1, None], pa.uint64()),
        "offset": pa.array([0, 0], pa.uint32()),
    }
    columns["window"] = pa.array([b"x" * 16] * 2, pa.binary(16))
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="null"):
        read_keys(pq.ParquetFile(tmp_path / "a.parquet"), [0])
