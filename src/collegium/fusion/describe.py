"""Descriptions of a fusion: a short name, and its section of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from collegium.fusion.conflict import CONFLICTS, Conflict
from collegium.fusion.fuse import Fusion
from collegium.fusion.rules import WEIGHTINGS
from collegium.fusion.weights import Weighting


def describe(fusion: Fusion) -> str:
    """Return a short name, such as `prefix_likelihood(eta=0.3, decay=0.9), linear`."""
    pool = f"power_mean(r={fusion.exponent:.3g})" if fusion.pool == "power_mean" else fusion.pool
    parts = [_call(_name_of(fusion.weighting, WEIGHTINGS), _options_of(fusion.weighting)), pool]
    if fusion.temperatures:
        parts.append(_call("temperatures", fusion.temperatures))
    if fusion.pooled_temperature != 1.0:
        parts.append(f"pooled_temperature={fusion.pooled_temperature:.3g}")
    if fusion.conflict.is_active:
        parts.append(_call(_name_of(fusion.conflict, CONFLICTS), _options_of(fusion.conflict)))
    return ", ".join(parts)


def to_recipe(fusion: Fusion) -> dict[str, object]:
    """Return the `fusion:` section of a recipe for this fusion, in plain dicts and numbers."""
    snippet: dict[str, object] = {
        "weighting": {
            "name": _name_of(fusion.weighting, WEIGHTINGS),
            **_options_of(fusion.weighting),
        },
        "pool": fusion.pool,
        "temperatures": dict(fusion.temperatures),
        "pooled_temperature": fusion.pooled_temperature,
    }
    # Other pools reject an exponent other than the default.
    if fusion.pool == "power_mean":
        snippet["exponent"] = fusion.exponent
    if fusion.conflict.is_active:
        name = _name_of(fusion.conflict, CONFLICTS)
        snippet["conflict"] = {"name": name, **_options_of(fusion.conflict)}
    return snippet


def _name_of(option: object, table: Mapping[str, type]) -> str:
    for name, option_class in table.items():
        if type(option) is option_class:
            return name
    return type(option).__name__


def _options_of(option: Weighting | Conflict) -> dict[str, object]:
    return dataclasses.asdict(option) if dataclasses.is_dataclass(option) else {}


def _call(name: str, options: Mapping[str, object]) -> str:
    """Format `name(key=value, ...)` and inline the entries of dicts."""
    # Kept short for tables: three digits, and only the number of knots.
    inner = ", ".join(
        f"{key}={value:.3g}"
        if isinstance(value, float)
        else f"{key}={len(value)} knots"
        if isinstance(value, list)
        else f"{key}={value}"
        for key, value in _flat(options).items()
        if value is not None
    )
    return f"{name}({inner})" if inner else name


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
