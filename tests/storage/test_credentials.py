"""Secrets in text: URLs with a password or a key, and values under the key of a secret."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from collegium.cache.options import CacheOptions
from collegium.cli import app
from collegium.errors import CacheError
from collegium.storage.credentials import assigns_secret, holds_secret
from collegium.storage.location import Location
from recipes_for_tests import minimal

CANARY = "canary-7f3a"
SECRETS = (
    f"memory://bob:{CANARY}@store/cache",
    f"s3://AKEY:{CANARY}@bucket/cache",
    f"redis://:{CANARY}@host",
    f"https://{CANARY}@host/cache",
    f"ftp://bob:{CANARY}/with/slash@host",
    f"https://store/cache?X-Amz-Signature={CANARY}",
    f"https://store/cache?sv=1&sig={CANARY}",
    f"gs://bucket/cache#access_token={CANARY}",
)
HARMLESS = (
    "s3://bucket/cache",
    "abfs://container@account.dfs.core.windows.net/cache",
    "sftp://bob@host/cache",
    "http://host:9000/models/a@main",
    "https://host/page?tokens=12&v=1",
    "hub:name@revision",
    "ask bob: mail to bob@host",
)


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_in_a_url_is_neither_accepted_nor_shown(text: str, tmp_path: Path) -> None:
    assert holds_secret(text)
    for kind, make in ((CacheError, Location.of), (ValidationError, lambda u: CacheOptions(url=u))):
        with pytest.raises(kind) as caught:
            make(text)
        assert kind is ValidationError or CANARY not in "".join(
            traceback.format_exception(caught.value)
        )
    plain, quoted = tmp_path / "plain.yaml", tmp_path / "recipe.yaml"
    plain.write_text(minimal())
    quoted.write_text(minimal(cache=f'{{enabled: true, url: "{text}"}}'))
    for arguments in (
        ["run", str(quoted)],
        ["run", str(plain), f"cache.url={text}"],
        ["run", str(plain), f"cache={{url: '{text}'}}"],
        ["check", str(plain), f"data.train.0.path={text}"],
        ["check", str(plain), f"{text}=1"],
        ["cache", "info", text],
        ["cache", "verify", text],
    ):
        result = CliRunner().invoke(app, ["--debug", *arguments])
        assert result.exit_code == 2, (arguments, result.exception)
        assert CANARY not in result.output + result.stderr, arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.yaml", "recipe.yaml"]


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_is_no_secret(text: str) -> None:
    assert not holds_secret(text)
    assert not assigns_secret(text)


@pytest.mark.parametrize(
    "override",
    [
        f"train.password={CANARY}",
        f"train={{password: {CANARY}}}",
        f"student={{model: m, 'hf_token': '{CANARY}'}}",
        f"cache={{enabled: true, api_key: [{CANARY}",
    ],
)
def test_an_override_with_a_secret_is_not_repeated(override: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(minimal())
    result = CliRunner().invoke(app, ["--debug", "check", str(tmp_path / "recipe.yaml"), override])
    assert result.exit_code == 2
    assert CANARY not in result.output + result.stderr
