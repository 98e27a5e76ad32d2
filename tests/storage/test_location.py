"""Caches behind URLs: the same targets and the same damage checks as in a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from pydantic import ValidationError
from typer.testing import CliRunner

import cache_cases
from collegium.cache.manifest import cache_folders, require_manifest
from collegium.cache.store import open_cache
from collegium.cli import app
from collegium.errors import CacheError, CollegiumError
from refusals import refused, stable

KEYS = [cache_cases.key_of(shard, 2, 17) for shard in range(3)]


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a copy of the cache in `tmp_path / "cache"`."""
    cache_cases.build(tmp_path / "cache")
    target = "memory://bucket/cache" if request.param == "memory" else f"file://{tmp_path}/copy"
    files, root = fsspec.url_to_fs(target)
    files.makedirs(root, exist_ok=True)
    for name, data in cache_cases.content(tmp_path / "cache").items():
        files.pipe_file(f"{root}/{name}", data)
    yield target
    files.rm(root, recursive=True)


def test_a_cache_behind_a_url_gives_the_same_targets(url: str, tmp_path: Path) -> None:
    local = open_cache(tmp_path / "cache").read(KEYS)
    remote = open_cache(url, require_manifest(tmp_path / "cache").identity).read(KEYS)
    assert torch.equal(local.ids, remote.ids)
    assert torch.equal(local.logp, remote.logp)


def test_damage_behind_a_url_is_named(url: str) -> None:
    files, root = fsspec.url_to_fs(url)
    name = sorted(n for n in files.ls(root, detail=False) if str(n).endswith(".parquet"))[1]
    good = files.cat_file(name)
    where = stable(f"{url}/{str(name).rpartition('/')[2]}: ")
    for data in (bytes([good[0] ^ 1]) + good[1:], good[:-1]):
        files.pipe_file(name, data)
        # The size of a shard depends on the version of Arrow.
        with refused(CacheError, where, volatile=r"\d+ bytes instead of \d+"):
            open_cache(url)
    files.rm(name)
    with refused(CacheError, where):
        open_cache(url)


def test_a_missing_cache_behind_a_url_is_refused(url: str) -> None:
    with refused(CacheError, stable(f"{url}/nothing: ")):
        open_cache(f"{url}/nothing")


def test_the_command_line_takes_a_url(url: str) -> None:
    for command in ("info", "verify"):
        result = CliRunner().invoke(app, ["cache", command, url])
        assert result.exit_code == 0, result.output
        assert "213 targets in 3 shards" in result.output


def test_folders_of_teachers_are_found(tmp_path: Path) -> None:
    for name in ("a", "b"):
        cache_cases.build(tmp_path / "teachers" / name / "train", num_shards=1)
    assert [Path(x).parts[-3:] for x in cache_folders(tmp_path)] == [
        ("teachers", "a", "train"), ("teachers", "b", "train")
    ]  # fmt: skip
    url = f"file://{tmp_path}"
    assert cache_folders(url) == [f"{url}/teachers/{name}/train" for name in ("a", "b")]
    assert len(open_cache(cache_folders(url)[1])) == len(cache_cases.LENGTHS)


def test_a_folder_with_special_characters_is_read(tmp_path: Path) -> None:
    root = tmp_path / "~[a]*::b"
    cache_cases.build(root / "teachers" / "a" / "train", num_shards=1)
    assert cache_folders(root) == [f"{root}/teachers/a/train"]
    assert len(open_cache(cache_folders(root)[0])) == len(cache_cases.LENGTHS)


def test_an_unknown_protocol_is_refused() -> None:
    # The text in parentheses is that of fsspec.
    with refused(CacheError, "nowhere://x: ", volatile=r"\(.*\)"):
        open_cache("nowhere://x")


def test_options_take_a_url_or_a_path() -> None:
    from collegium.cache.options import CacheOptions

    with refused(ValidationError, volatile=r" \[type=.*|For further .*"):
        CacheOptions(url="s3://b/c", path=Path("x"))
    with pytest.raises(ValidationError):
        CacheOptions(url="no url")
    assert issubclass(CacheError, CollegiumError)
