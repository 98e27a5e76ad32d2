"""Recognition of passwords and keys in text, which no message or file may repeat."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

_KEY = r"(?:\w*_)?(?:api_?key|password|passwd|secret|hf_token|access_token|auth_token)"
SECRET_KEY = re.compile(rf"{_KEY}|token", re.I)
"""Names of keys whose values are secrets."""
_ASSIGNED = re.compile(rf"""\b(?:{_KEY}|token)["']?\s*[:=]\s*["']?[^\s"'}},]""", re.I)
_TOKEN = re.compile(r"(hf_|sk-|ghp_|github_pat_|AKIA)[A-Za-z0-9_-]{16,}")
# `abfs://container@account` and `sftp://user@host` name no secret, and `host:9000/a@b` is a port.
_PASSWORD = re.compile(r"://[^/?#\s@]*:(?!\d*(?:[/?#]|$))\S*@")
_HTTP_USER = re.compile(r"\bhttps?://[^/?#\s@]+@", re.I)
_SIGNED = re.compile(
    r"://\S*[?&#](?:[\w-]*(?:api[_-]?key|access[_-]?key(?:id)?|password|secret|token|signature|"
    r"credential)|sig|key|pwd)=[^&\s]",
    re.I,
)


def holds_secret(text: str) -> bool:
    """Return True for text with a known token, or a URL with a password, key or signature."""
    patterns = _TOKEN, _PASSWORD, _HTTP_USER, _SIGNED
    return any(pattern.search(text) for pattern in patterns)


def assigns_secret(text: str) -> bool:
    """Return True if YAML or Python text holds a secret, or a value under the key of one."""
    return holds_secret(text) or _ASSIGNED.search(text) is not None


def _without_secret(url: str) -> str:
    if holds_secret(url):
        raise ValueError("holds a secret; keep it in the environment; value not shown")
    return url


URL = Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://"), AfterValidator(_without_secret)]
"""An fsspec URL. Its credentials come from the environment or the configuration of fsspec."""
