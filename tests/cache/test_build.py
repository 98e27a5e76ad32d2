"""Cache builds: resumable, byte-identical, with a single writer and a clean stop on a full disk."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import cache_cases
from cache_cases import Encoder, Stop, codec_of
from collegium.cache.codecs.targets import row_keys
from collegium.cache.keys import PieceKey
from collegium.cache.manifest import read_manifest
from collegium.cache.options import Samples, TopK
from collegium.cache.shards import EncodedPiece, ShardMetadata, shard_bytes
from collegium.cache.store import open_cache
from collegium.errors import CacheError, CollegiumError
from collegium.storage.files import lock_folder
from refusals import refused

TARGETS = Samples(draws=20)
PER_SHARD = sum(cache_cases.LENGTHS) - len(cache_cases.LENGTHS)


def _build(path: Path, **changed) -> list[int]:
    """Build four shards, and return the encoded ones."""
    encoder = Encoder(TARGETS, 4, **changed)
    cache_cases.build(path, encoder=encoder)
    return encoder.encoded


def test_an_interrupted_build_resumes_and_gives_the_same_bytes(tmp_path: Path) -> None:
    _build(tmp_path / "whole")
    with pytest.raises(Stop):
        _build(tmp_path / "broken", stop_at=2)
    with refused(CacheError, "TMP/broken: "):
        open_cache(tmp_path / "broken")
    (tmp_path / "broken" / f".shard-00002-{'a' * 16}.parquet.tmp").write_bytes(b"half a shard")
    assert _build(tmp_path / "broken") == [2, 3]
    assert cache_cases.content(tmp_path / "broken") == cache_cases.content(tmp_path / "whole")


def test_a_finished_cache_is_not_rebuilt(tmp_path: Path) -> None:
    _build(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*")}
    manifest = read_manifest(tmp_path)
    encoder = Encoder(TARGETS, 4)
    assert cache_cases.build(tmp_path, encoder=encoder) == manifest
    assert (encoder.encoded, encoder.sampled) == ([], 0)
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
    assert _build(tmp_path) == [1]
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
    with refused(CacheError, "TMP: "):
        cache_cases.build(tmp_path, TARGETS, num_shards=2, seed=4)


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
    with pytest.raises(Stop):
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
    encoder = Encoder(TARGETS)
    with refused(CacheError, "TMP: ", volatile=r"about [\d,]+"):
        cache_cases.build(tmp_path, encoder=encoder)
    assert encoder.encoded == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC])
def test_an_error_of_the_manifest_is_reported_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(path: Path, value: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("collegium.cache.build.write_json", fail)
    where = "TMP/manifest.json: " if number == errno.EACCES else "TMP: "
    with refused(CacheError, where, volatile=r"[\d,]{3,}"):
        _build(tmp_path)
    monkeypatch.undo()
    assert _build(tmp_path) == [], "all shards are kept"


def test_a_shard_with_too_few_targets_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "shard_targets", [PER_SHARD + 1])
    with refused(ValueError, "shard 0: "):
        _build(tmp_path)
    assert not list(tmp_path.glob("shard-*"))


def test_the_size_estimate_is_in_the_measured_range() -> None:
    def estimate(targets: Samples | TopK, entries: int) -> float:
        sample = {"sizes": np.full(10, entries), "ids": np.zeros(10 * entries)}
        return codec_of(targets, 49_152).bytes_per_target([sample], 10_000)

    assert 25 < estimate(Samples(draws=50), 15) < 48
    assert 80 < estimate(TopK(k=50), 50) < 130


def test_the_estimate_includes_the_vocabulary_of_a_small_shard() -> None:
    vocab_size, draws = 49_152, 24
    codec = codec_of(Samples(draws=draws), vocab_size)
    generator = torch.Generator().manual_seed(0)
    # Frequencies by Zipf's law, as those of words.
    base = torch.arange(1, vocab_size + 1).log().neg()
    scalars = {name: torch.zeros(256) for name in codec.scalars}
    pieces = []
    for document in range(8):
        noise = torch.randn(256, vocab_size, generator=generator)
        keys = row_keys(0, np.full(256, document, np.uint64), np.arange(256))
        columns = codec.encode((base + noise).log_softmax(-1), keys, scalars)
        pieces.append(EncodedPiece(PieceKey(document, 0, bytes(16)), columns, document))
    for number in (1, 8):
        part = pieces[:number]
        sizes = codec.pack([piece.columns for piece in part])["vocabulary"].values.size
        with_all = codec.bytes_per_target([p.columns for p in part], 256 * number)
        without = codec.bytes_per_target([p.columns for p in part], 10**9)
        assert with_all - without == pytest.approx(1.3 * sizes / (256 * number), rel=0.02)
    metadata = ShardMetadata(format=2, shard=0, num_targets=2048, num_shards=1)
    measured = len(shard_bytes(pieces, codec, metadata)) / 2048
    # From an eighth of it. Zeros as scalars take no space.
    estimate = codec.bytes_per_target([pieces[0].columns], 2048) - 1.8 * len(codec.scalars)
    assert estimate == pytest.approx(measured, rel=0.08)


def test_the_estimate_uses_a_sample_and_then_the_finished_shards(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """No sample is drawn once shards exist, nor if none is missing."""

    def announced() -> float:
        text = capsys.readouterr().err.replace("\n", " ")
        return float(re.findall(r"about ([\d.,]+) MB to write", text)[0])

    encoder = Encoder(TARGETS, 4_000, stop_at=2)
    with pytest.raises(Stop):
        cache_cases.build(tmp_path, encoder=encoder)
    sample = [piece.columns for piece in cache_cases.pieces_of(0, TARGETS)]
    per_target = codec_of(TARGETS).bytes_per_target(sample, PER_SHARD)
    assert announced() == pytest.approx(4_000 * PER_SHARD * per_target / 1e6, abs=0.051)
    with pytest.raises(Stop):
        cache_cases.build(tmp_path, encoder=encoder)
    finished = [path.stat().st_size for path in tmp_path.glob("shard-*")]
    assert announced() == pytest.approx(3_998 * sum(finished) / 2 / 1e6, abs=0.051)
    assert encoder.sampled == 1


KILLED = """
import sys, time
from pathlib import Path
import cache_cases
class Slow(cache_cases.Encoder):
    def encode(self, shard, codec):
        print(shard, flush=True)
        time.sleep(0.02)
        return super().encode(shard, codec)
cache_cases.build(Path(sys.argv[1]), encoder=Slow(num_shards=12))
"""


@pytest.mark.slow
def test_a_kill_costs_at_most_one_shard(tmp_path: Path) -> None:
    """After three SIGKILLs at random times, the bytes equal those of an uninterrupted build."""
    cache_cases.build(tmp_path / "whole", num_shards=12)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "cut")]
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
