"""Hidden states at one byte per coefficient: error bounds, and detection of every damage."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import torch
from typer.testing import CliRunner

import cache_cases
from collegium.cache.build import SINGLE_PROCESS, build_cache, merge_all
from collegium.cache.codecs.hidden import OFFSET, HiddenCodec, Projection
from collegium.cache.keys import PieceKey
from collegium.cache.manifest import MANIFEST, Manifest
from collegium.cache.processes import Ranks
from collegium.cache.shards import EncodedPiece
from collegium.cache.sources import LocalShards
from collegium.cache.store import CacheReader, open_cache
from collegium.cli import app
from collegium.errors import CacheError
from collegium.losses.features import _normalize
from refusals import refused

D = 24
TAPS = {"layer_0": 24, "layer_3": 16}
IDENTITY: dict[str, Any] = {
    "kind": "features",
    "layers": sorted(TAPS),
    "rank": 8,
    "teachers": {"code": {"weights": "aa"}},
}
LENGTHS = [5, 1, 9]
SHARDS = 3


def hidden(num_rows: int, width: int = D, *, seed: int = 0) -> np.ndarray:
    """Realistic states: few directions hold most of the variance, and the mean is not zero."""
    generator = np.random.default_rng(seed)
    spectrum = 30.0 * 0.7 ** np.arange(width)
    rotation, _ = np.linalg.qr(np.random.default_rng(99).standard_normal((width, width)))
    states = generator.standard_normal((num_rows, width)) * spectrum @ rotation + 3.0
    return states.astype(np.float32)


@pytest.mark.parametrize("rank", [1, 8, D, 100])
def test_the_error_meets_its_bound_against_float64(rank: int) -> None:
    projection = Projection.fit(hidden(500), rank, seed=1)
    states = hidden(200, seed=2)
    codes, scales = projection.encode(states)
    assert codes.dtype == np.uint8
    assert codes.shape == (200, min(rank, D))
    basis, mean = projection.basis_DR.astype(np.float64), projection.mean_D.astype(np.float64)
    exact = states.astype(np.float64)
    coefficients = (exact - mean) @ basis
    quantized = (codes.astype(np.float64) - OFFSET) * scales.astype(np.float64)[:, None]
    assert (np.abs(quantized - coefficients) <= 0.5 * scales[:, None] * (1 + 1e-3) + 1e-5).all()
    left_out = np.linalg.norm(exact - mean - coefficients @ basis.T, axis=1)
    error = np.linalg.norm(exact - projection.decode(codes, scales), axis=1)
    assert (error <= left_out + np.sqrt(codes.shape[1]) * scales / 2 * (1 + 1e-3) + 1e-3).all()
    assert np.abs(basis.T @ basis - np.eye(codes.shape[1])).max() < 1e-6


def test_the_projection_is_optimal_for_its_rank() -> None:
    """Against the truncated singular value decomposition, in float64."""
    states = hidden(300).astype(np.float64)
    centered = states - states.mean(0)
    best = np.square(np.linalg.svd(centered, compute_uv=False)[8:]).sum()
    projection = Projection.fit(states, 8, seed=3)
    basis = projection.basis_DR.astype(np.float64)
    left = np.square(centered - centered @ basis @ basis.T).sum()
    assert left == pytest.approx(best, rel=1e-3)


def test_the_rotation_saves_small_coefficients() -> None:
    states, sample = hidden(300, seed=5), hidden(2000)
    rotated = Projection.fit(sample, D, seed=1)
    centered = sample.astype(np.float64) - sample.mean(0)
    vectors = np.linalg.eigh(centered.T @ centered)[1][:, ::-1]
    plain = Projection(rotated.mean_D, np.ascontiguousarray(vectors, np.float32))
    errors = [np.square(p.decode(*p.encode(states)) - states).mean() for p in (rotated, plain)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize(("rank", "tolerance"), [(D, 0.01), (12, 0.03)])
def test_the_alignment_loss_and_its_gradient_are_preserved(rank: int, tolerance: float) -> None:
    """Relative error of the normalized squared distance F, and of its gradient."""
    projection = Projection.fit(hidden(2000), rank, seed=1)
    theirs = hidden(400, seed=2)
    kept = projection.decode(*projection.encode(theirs))
    values, grads = [], []
    for states in (theirs, kept):
        ours = torch.from_numpy(hidden(400, seed=7)).double().requires_grad_()
        target = _normalize(torch.from_numpy(states).double())
        loss = (_normalize(ours) - target).square().mean(-1).sum()
        (grad,) = torch.autograd.grad(loss, ours)
        values.append(float(loss.detach()))
        grads.append(grad)
    assert values[1] == pytest.approx(values[0], rel=tolerance)
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < 3 * tolerance


def test_edge_cases() -> None:
    projection = Projection.fit(hidden(3), D, seed=0)
    codes, scales = projection.encode(projection.mean_D[None])
    assert (codes == OFFSET).all()
    assert scales.tolist() == [0.0]
    assert np.array_equal(projection.decode(codes, scales)[0], projection.mean_D)
    again = Projection.fit(hidden(3), D, seed=0)
    assert HiddenCodec({"a": projection}).dump() == HiddenCodec({"a": again}).dump()
    other = Projection.fit(hidden(3), D, seed=1)
    assert HiddenCodec({"a": projection}).dump() != HiddenCodec({"a": other}).dump()
    assert HiddenCodec.load(HiddenCodec({"a": projection}).dump()).projections.keys() == {"a"}


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a.mean": np.zeros(3, np.float32)},
        {"a.mean": np.zeros(3, np.float32), "a.basis": np.zeros((2, 3), np.float32)},
    ],
    ids=["empty", "no basis", "other width"],
)
def test_a_side_file_without_projections_is_refused(tensors: dict[str, np.ndarray]) -> None:
    with refused(ValueError):
        HiddenCodec.load(safetensors.numpy.save(tensors))
    with refused(ValueError, volatile=r"\(.*\)"):
        HiddenCodec.load(b"other bytes")


# Complete folders


def key_of(shard: int, piece: int) -> PieceKey:
    return PieceKey(100 * shard + piece, 7 * piece, bytes([shard, piece] * 8))


def states_of(shard: int, piece: int, tap: str) -> np.ndarray:
    return hidden(LENGTHS[piece], TAPS[tap], seed=10 * shard + piece)


class Encoder:
    """A corpus encoder of synthetic states."""

    shard_targets = [sum(LENGTHS)] * SHARDS

    def load(self) -> None:
        pass

    def fit(self) -> bytes:
        projections = {
            tap: Projection.fit(hidden(200, width), 8, seed=0) for tap, width in TAPS.items()
        }
        return HiddenCodec(projections).dump()

    def encode(self, shard: int, codec: HiddenCodec) -> Iterator[EncodedPiece]:
        for piece in range(len(LENGTHS)):
            states = {tap: states_of(shard, piece, tap) for tap in TAPS}
            yield EncodedPiece(key_of(shard, piece), codec.encode(states), piece)

    def sample(self, codec: HiddenCodec) -> list[EncodedPiece]:
        return list(self.encode(0, codec))


def build(path: Path, ranks: Ranks = SINGLE_PROCESS, **changed: Any) -> Manifest | None:
    return build_cache(
        path, IDENTITY | changed, LocalShards(Encoder()), label="hidden", ranks=ranks
    )


@pytest.fixture
def built(tmp_path: Path) -> Path:
    build(tmp_path / "code")
    return tmp_path / "code"


def content(path: Path) -> dict[str, bytes]:
    return {
        file.name: file.read_bytes() for file in path.iterdir() if not file.name.startswith(".")
    }


def read_all(cache: CacheReader[Any]) -> None:
    for shard in range(SHARDS):
        for piece in range(len(LENGTHS)):
            cache.read([key_of(shard, piece)])


def test_pieces_are_read_in_any_order(built: Path) -> None:
    cache = open_cache(built, IDENTITY)
    projections = cache.codec.projections
    places = [(2, 2), (0, 1), (1, 0)]
    states = cache.read([key_of(*place) for place in places])
    assert states.keys() == TAPS.keys()
    for tap, states_ND in states.items():
        parts = [
            projections[tap].decode(*projections[tap].encode(states_of(*p, tap))) for p in places
        ]
        # The last bit of a matrix product depends on how its rows are split.
        np.testing.assert_allclose(states_ND.numpy(), np.concatenate(parts), rtol=1e-5)
    assert cache.read([])["layer_3"].shape == (0, TAPS["layer_3"])
    cache.check()
    with refused(CacheError, "TMP/code: "):
        cache.read([PieceKey(1, 3, bytes(16))])


def test_the_size_is_announced_before_the_shards(tmp_path: Path, capsys) -> None:
    build(tmp_path)
    text = capsys.readouterr().err
    # Two taps of 8 coefficients and a scale each.
    assert "hidden: 45 targets, about 0.0 MB to write to" in text
    codec = open_cache(tmp_path).codec
    assert codec.bytes_per_target([], 45) == 2 * (8 + 4)


def test_low_disk_space_is_refused_before_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with refused(CacheError, "TMP: "):
        build(tmp_path)
    assert not list(tmp_path.glob("shard-*"))


def test_ranks_build_the_bytes_of_a_single_process(built: Path, tmp_path: Path) -> None:
    for rank in range(2):
        manifest = build(tmp_path / "ranks", Ranks(rank, 2))
        assert (manifest is None) == (rank == 0)
    assert content(tmp_path / "ranks") == content(built)


def test_merged_folders_have_the_bytes_of_a_single_build(built: Path, tmp_path: Path) -> None:
    for rank in range(2):
        build(tmp_path / f"part{rank}" / "features" / "code", Ranks(rank, 2))
    merge_all([tmp_path / "part0", tmp_path / "part1"])
    assert content(tmp_path / "part0" / "features" / "code") == content(built)


def test_shards_of_another_projection_are_not_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "a", Ranks(0, 2))
    other = HiddenCodec(
        {tap: Projection.fit(hidden(99, width), 8, seed=1) for tap, width in TAPS.items()}
    )
    monkeypatch.setattr(Encoder, "fit", lambda _: other.dump())
    build(tmp_path / "b", Ranks(1, 2))
    with refused(CacheError, "TMP/b: "):
        merge_all([tmp_path / "a", tmp_path / "b"])
    next((tmp_path / "b").glob("projection-*")).unlink()
    with refused(CacheError, "TMP/new: "):
        (tmp_path / "new").mkdir()
        build(tmp_path / "c", Ranks(0, 2))
        next((tmp_path / "c").glob("projection-*")).unlink()
        merge_all([tmp_path / "new", tmp_path / "b", tmp_path / "c"])


def test_hidden_states_of_format_1_are_refused(built: Path) -> None:
    folder = built.rename(built.parent / "old")
    folder = Path(shutil.copytree(folder, built.parent / "features" / "code"))
    (folder / MANIFEST).rename(folder / "features.json")
    for call in (open_cache, build):
        with refused(CacheError, "TMP/features/code/features.json: "):
            call(folder)
    for command in ("info", "verify"):
        result = CliRunner().invoke(app, ["cache", command, str(built.parent)])
        assert result.exit_code == 2
        assert "features.json" in result.stderr


def test_any_parquet_reader_opens_a_shard(built: Path) -> None:
    file = sorted(built.glob("shard-*.parquet"))[0]
    table = pq.read_table(file)
    assert table.column_names == [
        "document", "offset", "window",
        "layer_0.codes", "layer_0.scales", "layer_3.codes", "layer_3.scales",
    ]  # fmt: skip
    assert [len(x) for x in table["layer_0.codes"].to_pylist()] == [8 * n for n in LENGTHS]
    assert [len(x) for x in table["layer_0.scales"].to_pylist()] == LENGTHS


def test_another_run_is_refused_field_by_field(built: Path) -> None:
    other = IDENTITY | {"rank": 16, "layers": ["layer_0"]}
    with refused(CacheError, "TMP/code: "):
        open_cache(built, other)
    with refused(CacheError, "TMP/code: "):
        build(built, rank=16)


# Counts both entry points of an atomic rename, and dies before the `at`-th one.
_CHILD = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from cache.codecs import test_hidden as cases
count, inner = 0, os.replace
def replace(*arguments, **named):
    global count
    count += 1
    if count == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*arguments, **named)
os.replace = replace
Path.replace = lambda self, target: replace(self, target)
cases.build(Path({folder!r}))
"""


@pytest.mark.parametrize("at", range(1, SHARDS + 3))
def test_a_killed_build_resumes_to_the_same_bytes(built: Path, tmp_path: Path, at: int) -> None:
    """Killed just before the projection, each shard and the manifest are published."""
    folder = tmp_path / "killed"
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parents[3] / "src")]
    code = _CHILD.format(paths=paths, at=at, folder=str(folder))
    process = subprocess.run([sys.executable, "-c", code], check=False, env=os.environ)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / MANIFEST).exists()
    build(folder)
    assert content(folder) == content(built)


def test_a_finished_folder_is_not_encoded_again(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(built)
    with monkeypatch.context() as patch:
        for name in ("fit", "encode", "sample"):
            patch.setattr(Encoder, name, lambda *_: pytest.fail("encoded again"))
        build(built)
    assert content(built) == before
    sorted(built.glob("shard-*"))[1].unlink()
    build(built)
    assert content(built) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_an_error_of_the_disk_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(path: Path, data: bytes) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("collegium.cache.build.write_bytes", fail)
    where = "TMP/code: " if number == errno.ENOSPC else "TMP/code/projection-DIGEST.safetensors: "
    with refused(CacheError, where, volatile=r"[\d,]{3,}"):
        build(tmp_path / "code")


def test_every_flipped_bit_is_detected_before_reading(built: Path) -> None:
    generator = np.random.default_rng(0)
    files = sorted(file for file in built.iterdir() if not file.name.startswith("."))
    for number in range(200):
        file = files[number % len(files)]
        good = file.read_bytes()
        damaged = bytearray(good)
        damaged[generator.integers(len(good))] ^= 1 << int(generator.integers(8))
        file.write_bytes(damaged)
        with pytest.raises(CacheError):
            read_all(open_cache(built, IDENTITY))
        file.write_bytes(good)
    read_all(open_cache(built, IDENTITY))


@pytest.mark.parametrize("back", [3, 10, 20, 40, 60])
def test_damage_after_opening_fails_a_page_checksum(built: Path, back: int) -> None:
    """Damages only pages: the footer was read on opening."""
    cache = open_cache(built, IDENTITY)
    for file in built.glob("shard-*.parquet"):
        data = bytearray(file.read_bytes())
        chunk = pq.ParquetFile(file).metadata.row_group(0).column(3)
        data[chunk.data_page_offset + chunk.total_compressed_size - back] ^= 64
        with file.open("r+b") as handle:
            handle.write(data)
    # The text in parentheses is that of Arrow.
    with refused(CacheError, "TMP/code/shard-00000-DIGEST.parquet: ", volatile=r"(?s)\(.*\)"):
        read_all(cache)


@pytest.mark.parametrize("damage", ["cut", "missing", "swapped", "projection gone", "newer"])
def test_other_damage_is_reported(built: Path, damage: str) -> None:
    first, second = sorted(built.glob("shard-*.parquet"))[:2]
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:-40])
    elif damage == "missing":
        first.unlink()
    elif damage == "swapped":
        kept = first.read_bytes()
        shutil.copy(second, first)
        second.write_bytes(kept)
    elif damage == "projection gone":
        next(built.glob("projection-*")).unlink()
    else:
        cache_cases.rewrite_manifest(built, lambda manifest: manifest.update(format=9))
    # Sizes depend on the version of Arrow; swapped shards may even have equal ones.
    sizes = r"has \d+ bytes instead of \d+"
    volatile = rf"{sizes}|fails its sha256" if damage == "swapped" else sizes
    where = {"projection gone": "projection-", "newer": MANIFEST}.get(damage, "shard-00000")
    with refused(CacheError, f"TMP/code/{where}", volatile=volatile):
        open_cache(built, IDENTITY)
    with refused(CacheError, "TMP/code/nowhere: "):
        open_cache(built / "nowhere")
