"""Descriptions of a fusion: a short name, and its section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collegium.fusion.fuse import Fusion
from collegium.options import plain


def describe(fusion: Fusion) -> str:
    """Return a short name, such as `prefix_likelihood(eta=0.3, decay=0.9), linear`."""
    snippet = plain(fusion)
    weighting, conflict = snippet["weighting"], snippet["conflict"]
    pool = f"power_mean(r={fusion.exponent:.3g})" if fusion.pool == "power_mean" else fusion.pool
    parts = [_call(weighting.pop("name"), weighting), pool]
    if fusion.temperatures:
        parts.append(_call("temperatures", fusion.temperatures))
    if fusion.pooled_temperature != 1.0:
        parts.append(f"pooled_temperature={fusion.pooled_temperature:.3g}")
    if fusion.conflict.is_active:
        parts.append(_call(conflict.pop("name"), conflict))
    return ", ".join(parts)


def to_recipe(fusion: Fusion) -> dict[str, Any]:
    """Return the `fusion:` section of a recipe for this fusion, in plain dicts and numbers."""
    snippet = plain(fusion)
    # Other pools reject an exponent other than the default.
    if fusion.pool != "power_mean":
        del snippet["exponent"]
    if not fusion.conflict.is_active:
        del snippet["conflict"]
    return snippet


def _call(name: str, options: Mapping[str, object]) -> str:
    """Format `name(key=value, ...)` and inline the entries of dicts."""
    inner = ", ".join(
        f"{key}={_short(value)}" for key, value in _flat(options).items() if value is not None
    )
    return f"{name}({inner})" if inner else name


def _short(value: object) -> str:
    # Kept short for tables: three digits, and only the number of knots.
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{len(value)} knots" if isinstance(value, list) else str(value)


def _flat(options: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Flatten nested dicts: the outer key is dropped, a second level gives `domain/teacher`."""
    flat: dict[str, object] = {}
    for key, value in options.items():
        if not isinstance(value, dict):
            flat[f"{prefix}{key}"] = value
            continue
        for inner, item in value.items():
            name = f"{prefix}{inner}"
            flat.update(_flat(item, f"{name}/") if isinstance(item, dict) else {name: item})
    return flat
