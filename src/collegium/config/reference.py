"""Reference of all recipe keys, read from the option classes: type, default and meaning."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from collegium.config.recipe import Recipe
from collegium.config.yaml import shown
from collegium.errors import RecipeError, nearest
from collegium.options import OneOf, plain

NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}
BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
ANY_KEY = "NAME"
"""Key of a mapping with names of the user's choice."""


@dataclass(frozen=True)
class Key:
    """One key of a section."""

    name: str
    type: str
    default: str
    """As it is written in a recipe, empty for a required key."""
    meaning: str


@dataclass(frozen=True)
class Section:
    """The keys of one option class, at one place of a recipe."""

    path: str
    """Dotted key, empty for the recipe itself."""
    kind: str
    """Its name where several classes are possible, else empty."""
    meaning: str
    keys: tuple[Key, ...]


def reference(start: str = "") -> list[Section]:
    """Return the sections of a recipe at or below a dotted key, such as `train` or `fusion`.

    Raises:
        RecipeError: there is no such key.
    """
    every = list(_sections(Recipe, "", ""))
    below = [s for s in every if not start or s.path == start or s.path.startswith(f"{start}.")]
    parent, _, last = start.rpartition(".")
    holders = [s for s in every if s.path == parent and any(k.name == last for k in s.keys)]
    leaves = [
        dataclasses.replace(s, keys=tuple(k for k in s.keys if k.name == last)) for s in holders
    ]
    if not below and not leaves:
        names = {s.path for s in every} | {
            f"{s.path}.{k.name}".strip(".") for s in every for k in s.keys
        }
        raise RecipeError(
            f"options: got `{start}`; must be a key of a recipe{nearest(start, names)}"
        )
    return below or leaves


def _sections(cls: type, path: str, kind: str) -> Iterator[Section]:
    meanings, hints = _meanings(cls), get_type_hints(cls, include_extras=True)
    fields = [f for f in dataclasses.fields(cls) if f.init]
    keys = [
        Key(f.name, _type_name(hints[f.name]), _default(f), meanings.get(f.name, ""))
        for f in fields
    ]
    text = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]
    yield Section(path, kind, " ".join(text.split()), tuple(keys))
    for f in fields:
        for inner, name, suffix in _classes(hints[f.name]):
            yield from _sections(inner, f"{path}.{f.name}{suffix}".strip("."), name)


def _classes(hint: Any, suffix: str = "") -> Iterator[tuple[type, str, str]]:
    """Yield the option classes of a field, their names, and the keys between field and class."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        table = next((one for one in args[1:] if isinstance(one, OneOf)), None)
        if table is None:
            yield from _classes(args[0], suffix)
            return
        for cls in dict.fromkeys(table.table.values()):
            names = [name for name, other in table.table.items() if other is cls]
            if dataclasses.is_dataclass(cls):
                yield cls, "/".join(names), suffix
    elif origin in (Union, types.UnionType, list):
        for arg in args:
            yield from _classes(arg, suffix)
    elif origin in (dict, Mapping):
        yield from _classes(args[1], f"{suffix}.{ANY_KEY}")
    elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint, "", suffix


def _type_name(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        table = next((one for one in args[1:] if isinstance(one, OneOf)), None)
        if table is not None:
            return f"one of {', '.join(table.table)}"
        limits = " and ".join(_limits(args[1:]))
        return f"{_type_name(args[0])} {limits}".rstrip()
    if origin is Literal:
        return " or ".join(str(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _type_name(arg) for arg in args)
    if origin is list:
        return f"list of {_type_name(args[0])}"
    if origin in (dict, Mapping):
        return f"mapping to {_type_name(args[1])}" if args[1] is not Any else "mapping"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "section"
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def _limits(annotations: tuple[Any, ...]) -> Iterator[str]:
    for annotation in annotations:
        parts = annotation.metadata if isinstance(annotation, FieldInfo) else [annotation]
        for part in parts:
            if isinstance(part, MinLen):
                yield "not empty" if part.min_length == 1 else f"of {part.min_length} or more"
            for kind, (sign, attribute) in BOUNDS.items():
                if isinstance(part, kind):
                    limit = getattr(part, attribute)
                    yield f"{sign} {limit:,}" if isinstance(limit, int) else f"{sign} {limit:g}"


def _default(field: dataclasses.Field[Any]) -> str:
    default, factory = field.default, field.default_factory
    if isinstance(default, FieldInfo):
        default, factory = default.default, default.default_factory or dataclasses.MISSING
    if factory is not dataclasses.MISSING:
        default = factory()  # pyright: ignore[reportCallIssue]
    if default in (dataclasses.MISSING, PydanticUndefined):
        return ""
    value = plain(default)
    # The keys of a section have their own defaults.
    return "" if isinstance(value, Mapping) and value else shown(value)


@cache
def _meanings(cls: type) -> Mapping[str, str]:
    """Return the docstring below each field of a class and its bases."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(meaning))):
                    meanings[name] = " ".join(meaning.split())
    return meanings
