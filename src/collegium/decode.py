"""Plain data to option classes, with every problem collected and none raised."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Union

from pydantic import TypeAdapter, ValidationError

from collegium.errors import CollegiumError, nearest
from collegium.yaml12 import Document, KeyPath

Forms = Mapping[tuple[type, str], Mapping[str, type]]
"""Fields that have several forms: (option class, field) -> table of names."""

RENAMED = {
    "alpha": "objective.kd_ratio (the share of the distillation loss)",
    "lambda": "objective.kd_ratio (the share of the distillation loss)",
    "lr": "train.learning_rate",
    "batch_size": "train.per_device_train_batch_size",
    "T": "objective.temperature",
    "tau": "objective.temperature",
    "steps": "train.max_steps",
    "num_steps": "train.max_steps",
    "epochs": "train.num_train_epochs",
    "loss": "objective.divergence",
    "teacher": "teachers (a map of names)",
    "model_name_or_path": "model",
}
"""Names that other tools use for what is meant here."""

FAILED: Any = object()
"""Stands for a value that could not be decoded; its problems are noted."""


def decode(cls: type, value: Any, path: KeyPath, *, document: Document, forms: Forms) -> Any:
    """Build `cls` from a mapping, or return `FAILED` after noting each problem in `document`."""
    return _Decoder(document, forms).option(cls, value, path)


@cache
def hints(cls: type) -> dict[str, Any]:
    """The type hints of an option class."""
    return typing.get_type_hints(cls, include_extras=True)


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def members(hint: Any) -> list[Any]:
    """The alternatives of a type hint, without `Annotated`: `Literal["auto"] | Fusion` has two."""
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (Union, types.UnionType):
        return [inner for part in typing.get_args(hint) for inner in members(part)]
    return [hint]


def shown(value: Any) -> str:
    """A value as a message shows it: as YAML would, cut to one short line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = f"`{value}`" if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclasses.dataclass(frozen=True)
class _Decoder:
    document: Document
    forms: Forms

    def option(self, cls: type, value: Any, path: KeyPath, *, skip: str = "") -> Any:
        """Decode a mapping into `cls`; `skip` is a key that the caller has read already."""
        kinds = hints(cls)
        names = [f.name for f in dataclasses.fields(cls) if f.init]
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            text = f"got {shown(value)}; must be a mapping with keys of: {', '.join(names)}"
            self.document.add(path, text)
            return FAILED
        given: dict[str, Any] = {}
        failed: set[str] = set()
        for key, item in value.items():
            if key == skip:
                continue
            if key not in names:
                self.document.add((*path, key), unknown_key(key, names))
                failed.add(key)
                continue
            decoded = self._field(cls, key, kinds[key], item, (*path, key))
            if decoded is FAILED:
                failed.add(key)
            else:
                given[key] = decoded
        return self._build(cls, given, failed, path)

    def _field(self, cls: type, key: str, hint: Any, value: Any, path: KeyPath) -> Any:
        if path in self.document.bad:
            return FAILED
        table = self.forms.get((cls, key))
        if table is not None:
            return self._form(table, value, path)
        return self._value(hint, value, path)

    def _form(self, table: Mapping[str, type], value: Any, path: KeyPath) -> Any:
        """`forward_kl` or `{name: skewed_forward_kl, skew: 0.2}`, looked up in a table of names."""
        name = value.get("name") if isinstance(value, Mapping) else value
        if not isinstance(name, str):
            text = f"got {shown(value)}; must be a name, or a mapping with `name`"
            self.document.add(path, f"{text}; known: {', '.join(sorted(table))}")
            return FAILED
        if name not in table:
            self.document.add(path, f"got `{name}`; unknown name{nearest(name, table)}")
            return FAILED
        rest = value if isinstance(value, Mapping) else {}
        return self.option(table[name], rest, path, skip="name")

    def _value(self, hint: Any, value: Any, path: KeyPath) -> Any:
        if path in self.document.bad:
            return FAILED
        kinds = members(hint)
        if value is None and type(None) in kinds:
            return None
        option = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        if option is not None and (isinstance(value, Mapping) or len(kinds) == 1):
            return self.option(option, value, path)  # type: ignore[arg-type]
        for kind in kinds:
            if isinstance(value, Mapping) and typing.get_origin(kind) in (dict, Mapping):
                return self._mapping(kind, value, path)
            if isinstance(value, list) and typing.get_origin(kind) in (list, tuple, Sequence):
                return self._list(kind, value, path)
        wrong = wrong_scalar(kinds, value)
        if wrong:
            self.document.add(path, f"got {shown(value)}; must be {wrong}")
            return FAILED
        return value

    def _mapping(self, kind: Any, value: Mapping[str, Any], path: KeyPath) -> Any:
        arguments = typing.get_args(kind)
        item_hint = arguments[1] if len(arguments) == 2 else Any
        result = {k: self._value(item_hint, v, (*path, k)) for k, v in value.items()}
        return FAILED if any(v is FAILED for v in result.values()) else result

    def _list(self, kind: Any, value: list[Any], path: KeyPath) -> Any:
        arguments = typing.get_args(kind)
        item_hint = arguments[0] if arguments else Any
        result = [self._value(item_hint, v, (*path, i)) for i, v in enumerate(value)]
        return FAILED if any(v is FAILED for v in result) else result

    def _build(self, cls: type, given: dict[str, Any], failed: set[str], path: KeyPath) -> Any:
        """Construct `cls`; what was noted as failed already is not reported again."""
        try:
            built = _adapter(cls).validate_python(given)
        except ValidationError as error:
            for item in _told_once(error.errors()):
                self._note(item, given, failed, path, names=hints(cls))
            return FAILED
        except CollegiumError as error:
            if not failed:
                self.document.add(path, str(error))
            return FAILED
        return FAILED if failed else built

    def _note(
        self,
        item: Mapping[str, Any],
        given: dict[str, Any],
        failed: set[str],
        path: KeyPath,
        *,
        names: Collection[str],
    ) -> None:
        location = item["loc"]
        if location and location[0] in failed:
            return
        if not location and failed:
            return
        if item["type"] == "missing" and location:
            self.document.add((*path, location[0]), "missing; must be given")
            return
        keys, value = _walk(given, location)
        text = message(item, value)
        field, colon, rest = text.partition(": ")
        if not keys and colon and field in names:
            keys, text = [field], rest
        self.document.add((*path, *keys), text)


def _told_once(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of `a name or a mapping`, keep what is said of the name; a mapping would have been decoded before."""
    told = {item["loc"][:1] for item in items if item["type"] != "dataclass_type"}
    return [i for i in items if i["type"] != "dataclass_type" or i["loc"][:1] not in told]


def unknown_key(key: str, names: Sequence[str]) -> str:
    """What to say of a key that nothing reads; such keys are never ignored."""
    renamed = RENAMED.get(key)
    if renamed is not None and key not in names:
        return f"unknown key; write {renamed}"
    return f"unknown key{nearest(key, names)}" if names else "unknown key; it has none"


def wrong_scalar(kinds: Sequence[Any], value: Any) -> str:
    """What a number or a switch must be, when `value` would only pass by being coerced; else empty."""
    plain = {kind for kind in kinds if kind is not type(None)}
    if not plain or not plain <= {int, float, bool}:
        return ""
    is_wrong = isinstance(value, str) or (isinstance(value, bool) and bool not in plain)
    is_wrong = is_wrong or (plain == {bool} and not isinstance(value, bool))
    if not is_wrong:
        return ""
    if plain == {bool}:
        return "true or false"
    return "a number" if float in plain else "a whole number"


def _walk(data: Any, location: Sequence[str | int]) -> tuple[list[str | int], Any]:
    """Follow as much of a pydantic location as exists in the data; the rest names union members."""
    keys: list[str | int] = []
    for part in location:
        if isinstance(data, Mapping) and part in data:
            data = data[part]  # type: ignore[index]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        keys.append(part)
    return keys, data


_TEXTS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "dict_type": "must be a mapping",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "literal_error": "must be one of: {expected}",
    "too_short": "must have at least {min_length} items",
    "string_too_short": "must not be empty",
}


def message(item: Mapping[str, Any], value: Any) -> str:
    """One pydantic error as `got value; must be ...`."""
    context = {
        key: f"{limit:g}" if isinstance(limit, float) else limit
        for key, limit in item.get("ctx", {}).items()
    }
    if item["type"] in ("value_error", "assertion_error"):
        text = str(context["error"])
        return text if "got " in text or not item["loc"] else f"got {shown(value)}; {text}"
    template = _TEXTS.get(item["type"])
    if template is None:
        return f"got {shown(value)}; {item['msg'][:1].lower()}{item['msg'][1:]}"
    return f"got {shown(value)}; {template.format(**context)}"
