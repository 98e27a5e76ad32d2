"""Store: exact round trips, and refusal of every kind of damage."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import cache_cases
from collegium.cache.codecs.targets import SCALARS, TargetCodec
from collegium.cache.keys import PieceKey, window_hash
from collegium.cache.options import Samples, Targets, TopK
from collegium.cache.shards import ShardMetadata, shard_bytes
from collegium.cache.store import open_cache, verify_cache
from collegium.cli import app
from collegium.errors import CacheError
from refusals import refused

NUM_CORRUPTIONS = 2000
NUM_LATE_CORRUPTIONS = 300


def _same(a, b) -> bool:
    """Compare the targets of rows; the order of a row's entries is irrelevant."""
    tails = (a.log_tail is None) == (b.log_tail is None)
    if a.log_tail is not None and tails:
        tails = torch.equal(a.log_tail, b.log_tail)
    every = slice(0, len(a))
    is_same = tails and torch.equal(a.starts, b.starts)
    return is_same and torch.allclose(a.logits(every), b.logits(every), rtol=0, atol=1e-6)


@pytest.mark.parametrize("targets", cache_cases.CODECS, ids=str)
def test_targets_round_trip_in_any_order(tmp_path: Path, targets: Targets) -> None:
    cache_cases.build(tmp_path, targets)
    cache = open_cache(tmp_path, cache_cases.identity(targets))
    places = [(s, p, n) for s in range(3) for p, n in enumerate(cache_cases.LENGTHS)]
    random.Random(0).shuffle(places)
    for shard, piece, length in places:
        rows = cache.read([cache_cases.key_of(shard, piece, length)])
        written = cache_cases.pieces_of(shard, targets)[piece].columns
        assert _same(rows, cache_cases.codec_of(targets).decode(written))
        assert len(rows) == length - 1, "L tokens give L - 1 targets"
    joined = cache.read([cache_cases.key_of(*place) for place in places[:5]])
    parts = [cache.read([cache_cases.key_of(*place)]) for place in places[:5]]
    dense = torch.cat([part.logits(slice(0, len(part))) for part in parts])
    assert torch.equal(joined.logits(slice(0, len(joined))), dense)
    assert len(cache) == len(places)


def test_a_bounded_number_of_row_groups_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium.cache.store.MAX_GROUPS", 2)
    cache_cases.build(tmp_path, num_shards=5)
    cache = open_cache(tmp_path)
    cache.check()
    assert len(cache._groups) == 2


def test_a_manifest_with_another_number_of_targets_fails_the_check(tmp_path: Path) -> None:
    cache_cases.build(tmp_path)

    def add_one(manifest: dict) -> None:
        manifest["shards"][0]["targets"] += 1
        manifest["num_targets"] += 1

    cache_cases.rewrite_manifest(tmp_path, add_one)
    cache = open_cache(tmp_path)
    with refused(CacheError, "TMP: "):
        cache.check()


def test_no_pieces_give_no_rows(tmp_path: Path) -> None:
    cache_cases.build(tmp_path)
    assert len(open_cache(tmp_path).read([])) == 0


@pytest.mark.parametrize("targets", cache_cases.CODECS, ids=str)
def test_a_shard_is_an_ordinary_parquet_file(tmp_path: Path, targets: Targets) -> None:
    import datasets

    cache_cases.build(tmp_path / "cache", targets)
    path = tmp_path / "cache" / cache_cases.entries_of(tmp_path / "cache")[0]["name"]
    table = pq.read_table(path)
    assert table.num_rows == len(cache_cases.LENGTHS)
    assert all(not field.nullable for field in table.schema)
    assert table.schema.field("gaps").type.value_type == pa.uint16()
    assert table.schema.field("entropy").type.value_type == pa.float16()
    assert [len(x) for x in table["entropy"].to_pylist()] == [n - 1 for n in cache_cases.LENGTHS]
    logp = cache_cases.logp_of(0, 2, cache_cases.LENGTHS[2])
    for number, name in enumerate(SCALARS):
        assert table[name][2].as_py() == pytest.approx(logp[:, number].tolist(), rel=2**-10)
    codec = pq.ParquetFile(path).metadata.row_group(0).column(3).compression
    assert codec == "ZSTD"
    data = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "hf"))
    assert data[2]["offset"] == 20
    assert sorted(data[0]["vocabulary"]) == sorted(
        {int(v) for p in cache_cases.pieces_of(0, targets) for v in p.columns["ids"]}
    )


@pytest.mark.parametrize("targets", cache_cases.CODECS, ids=str)
def test_the_documented_reader_needs_no_collegium(tmp_path: Path, targets: Targets) -> None:
    """Runs the code of docs/cache-format.md unchanged."""
    page = Path(__file__).parents[2] / "docs" / "cache-format.md"
    code = page.read_text(encoding="utf-8").split("```python")[1].split("```")[0]
    assert "collegium" not in code
    names: dict = {}
    exec(code, names)
    cache_cases.build(tmp_path, targets)
    for shard, entry in enumerate(cache_cases.entries_of(tmp_path)):
        read = list(names["read_shard"](tmp_path / entry["name"]))
        assert len(read) == len(cache_cases.LENGTHS)
        for number, (document, offset, decoded) in enumerate(read):
            key = cache_cases.key_of(shard, number, cache_cases.LENGTHS[number])
            assert (document, offset) == (key.document, key.offset)
            logp = cache_cases.logp_of(shard, number, cache_cases.LENGTHS[number])
            for target, row in zip(decoded, logp, strict=True):
                if isinstance(targets, Samples):
                    assert sum(target.values()) == targets.draws
                else:
                    top = row.topk(targets.k)
                    assert set(target) == set(top.indices.tolist())
                    for token, value in target.items():
                        assert value == pytest.approx(row[token].item(), abs=1 / 128 + 1e-6)


def test_row_groups_are_whole_windows(tmp_path: Path) -> None:
    """At least `group_targets` of them, so that reading one window decodes little else."""
    targets = TopK(k=1)
    pieces = cache_cases.pieces_of(0, targets, [1500] * 7)
    pieces = [
        dataclasses.replace(one, window=(0, 0, 1, 1, 2, 3, 4)[n]) for n, one in enumerate(pieces)
    ]
    path = tmp_path / "x.parquet"
    metadata = ShardMetadata(format=2, shard=0, num_targets=7 * 1499, num_shards=1)
    path.write_bytes(shard_bytes(pieces, cache_cases.codec_of(targets), metadata))
    stored = pq.ParquetFile(path).metadata
    assert [stored.row_group(i).num_rows for i in range(stored.num_row_groups)] == [2, 2, 1, 1, 1]
    assert TargetCodec.group_targets == 1000


def test_another_context_or_mask_is_another_key(tmp_path: Path) -> None:
    cache_cases.build(tmp_path)
    cache = open_cache(tmp_path)
    key = cache_cases.key_of(0, 0, 9)
    tokens, is_target = cache_cases.tokens_of(0, 0, 9), np.arange(9) > 0
    assert window_hash(tokens, is_target) == key.window
    changed = [
        window_hash(tokens[:-1], is_target[:-1]),
        window_hash(tokens, np.arange(9) > 1),
        window_hash(np.where(np.arange(9) == 4, tokens ^ 1, tokens), is_target),
    ]
    for window in changed:
        with refused(CacheError, "TMP: holds no target for the tokens at 0 of document"):
            cache.read([PieceKey(key.document, key.offset, window)])
    with refused(CacheError, "TMP: "):
        cache.read([PieceKey(key.document + 1, key.offset, key.window)])


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 4},
        {"vocab_size": 301},
        {"targets": {"name": "samples", "draws": 21}},
        {"teachers": {"code": {"weights": "ax"}, "prose": {"weights": "bb"}}, "seed": 0},
        {"new": 1},
    ],
    ids=["seed", "vocab_size", "draws", "seed and teacher", "new field"],
)
def test_a_cache_of_another_run_is_refused_by_field(tmp_path: Path, changed: dict) -> None:
    cache_cases.build(tmp_path)
    expected = cache_cases.identity(Samples(draws=20), **changed)
    with refused(CacheError, "TMP: "):
        open_cache(tmp_path, expected)


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    with refused(CacheError, "TMP/nowhere: "):
        open_cache(tmp_path / "nowhere")
    cache_cases.build(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with refused(CacheError, "TMP: "):
        open_cache(tmp_path)


@pytest.mark.parametrize("number", [3, 1])
def test_another_format_is_refused(tmp_path: Path, number: int) -> None:
    cache_cases.build(tmp_path)
    cache_cases.rewrite_manifest(tmp_path, lambda manifest: manifest.update(format=number))
    with refused(CacheError, "TMP/manifest.json: got format"):
        open_cache(tmp_path)


SHAPES = {
    "no format": lambda m: m.pop("format"),
    "format is text": lambda m: m.update(format="2"),
    "identity is a list": lambda m: m.update(identity=[]),
    "shards is a number": lambda m: m.update(shards=3),
    "a shard without a name": lambda m: m["shards"][0].pop("name"),
    "a climbing name": lambda m: m["shards"][0].update(name="../x"),
    "an absolute name": lambda m: m["shards"][0].update(name="/etc/passwd"),
    "an unknown field": lambda m: m.update(more=1),
    "num_targets is text": lambda m: m.update(num_targets="x"),
    "another sum of targets": lambda m: m["shards"][0].update(targets=1),
    "a billion draws": lambda m: m["identity"]["targets"].update(draws=10**9),
    "unknown targets": lambda m: m["identity"].update(targets={"name": "os.system"}),
    "targets is a list": lambda m: m["identity"].update(targets=[1]),
    "vocab_size is null": lambda m: m["identity"].update(vocab_size=None),
    "an unknown kind": lambda m: m["identity"].update(kind="mine"),
    "no kind": lambda m: m["identity"].pop("kind"),
    "hidden states without a projection": lambda m: m["identity"].update(kind="features"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_manifest_of_another_shape_is_refused(tmp_path: Path, shape: str) -> None:
    """The digest is right, as in a manifest that somebody has written on purpose."""
    cache_cases.build(tmp_path)
    cache_cases.rewrite_manifest(tmp_path, SHAPES[shape])
    with refused(CacheError, "TMP/manifest.json: "):
        open_cache(tmp_path)
    for command in ("info", "verify"):
        result = CliRunner().invoke(app, ["cache", command, str(tmp_path)])
        assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", "{", "\ud800"])
def test_a_manifest_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    cache_cases.build(tmp_path)
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    # The text in parentheses is that of the JSON parser.
    with refused(CacheError, "TMP/manifest.json: ", volatile=r"\(.*\)"):
        open_cache(tmp_path)


def _corrupt(path: Path, rng: random.Random) -> str:
    """Damage one shard; returns its name."""
    shards = sorted(p for p in path.iterdir() if p.suffix == ".parquet")
    victim, other = rng.sample(shards, 2)
    data = bytearray(victim.read_bytes())
    kind = rng.choice(["flip", "flip", "truncate", "swap", "missing", "append", "zero"])
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[rng.randrange(len(data)) :]
    elif kind == "append":
        data += bytes([rng.randrange(256)])
    elif kind == "zero":
        start = rng.randrange(len(data) - 64)
        data[start : start + 64] = bytes(64)
    if kind == "missing":
        victim.unlink()
    elif kind == "swap":
        data = bytearray(other.read_bytes())
        other.write_bytes(victim.read_bytes())
        victim.write_bytes(data)
    else:
        victim.write_bytes(data)
    return victim.name


def test_every_corruption_is_detected_and_names_a_shard(tmp_path: Path) -> None:
    """2,000 flipped, truncated, swapped, missing, extended and zeroed shards fail on opening."""
    good = tmp_path / "good"
    cache_cases.build(good)
    rng = random.Random(1)
    for number in range(NUM_CORRUPTIONS):
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        name = _corrupt(bad, rng)
        if cache_cases.content(bad) != cache_cases.content(good):
            with pytest.raises(CacheError) as caught:
                open_cache(bad)
            message = str(caught.value)
            assert name in message or "shard-" in message, (number, message)
        shutil.rmtree(bad)


def test_every_corruption_of_the_manifest_is_detected(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.json"
    cache_cases.build(tmp_path)
    good = manifest.read_bytes()
    rng = random.Random(2)
    for _ in range(200):
        data = bytearray(good)
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        manifest.write_bytes(data)
        try:
            same = json.loads(bytes(data)) == json.loads(good)
        except ValueError:
            same = False
        if not same:  # one blank may become another
            with pytest.raises(CacheError, match=r"manifest\.json"):
                open_cache(tmp_path)


def test_damage_after_opening_fails_a_page_checksum(tmp_path: Path) -> None:
    """Reading from an open shard returns the written values or raises, whatever the damage."""
    cache_cases.build(tmp_path, num_shards=2)
    path, other = sorted(tmp_path.glob("*.parquet"))
    good = path.read_bytes()
    key = cache_cases.key_of(0, 4, 30)
    expected = open_cache(tmp_path).read([key])
    rng = random.Random(3)
    messages: list[str] = []
    for number in range(NUM_LATE_CORRUPTIONS):
        path.write_bytes(good)
        # A new cache per round, because decoded groups stay in memory.
        cache = open_cache(tmp_path)
        data = bytearray(good)
        if number % 10 == 8:
            del data[rng.randrange(len(data)) :]
        elif number % 10 == 9:
            data = bytearray(other.read_bytes())
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            rows = cache.read([key])
        except CacheError as error:
            messages.append(str(error))
        else:
            assert _same(rows, expected)
    assert len(messages) > 100
    assert all(path.name in text for text in messages)


@pytest.mark.parametrize("number", range(3))
def test_verification_reads_every_shard(tmp_path: Path, number: int) -> None:
    """Also those that nothing has opened."""
    cache_cases.build(tmp_path)
    verify_cache(tmp_path)
    (file,) = tmp_path.glob(f"shard-0000{number}-*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with refused(CacheError, "TMP/"):
        verify_cache(tmp_path)
