"""Option classes: frozen dataclasses that check their values, and choices among them by name."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError, core_schema, to_jsonable_python
from typing_extensions import dataclass_transform

from collegium.errors import nearest

T = TypeVar("T")
STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


class _LazyModule(ModuleType):
    """A module that is imported when its first attribute is read."""

    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(self.__name__)
        # Later reads cost no more than those of the module itself.
        self.__dict__.update(module.__dict__)
        return getattr(module, name)


if TYPE_CHECKING:
    import torch as torch
else:
    # Importing torch takes more than a second, which an error in a recipe need not wait for.
    torch = _LazyModule("torch")


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field, Field)
)
def option(cls: type[T]) -> type[T]:
    """Make a frozen dataclass with keyword-only fields that are validated on construction."""
    return cast(type[T], dataclass(frozen=True, kw_only=True, config=STRICT)(cls))


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Annotation of a field that holds an instance of one of several option classes.

    The field accepts an instance, a name from the table, or a mapping with `name` and the options
    of that class. `plain` writes it as such a mapping.
    """

    table: Mapping[str, type]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        def choose(value: Any, info: core_schema.ValidationInfo) -> Any:
            if isinstance(value, source):
                return value
            options = dict(value) if isinstance(value, Mapping) else {"name": value}
            name = options.pop("name", None)
            if not isinstance(name, str):
                text = "must be a name, or a mapping with `name`; known: {names}"
                raise PydanticCustomError("name", text, {"names": ", ".join(sorted(self.table))})
            if name not in self.table:
                text = "got `{name}`; unknown name{hint}"
                hint = nearest(name, self.table)
                raise PydanticCustomError("name", text, {"name": name, "hint": hint})
            adapter = TypeAdapter(self.table[name])
            if info.mode == "json":  # strict, like the rest of a recipe
                return adapter.validate_json(json.dumps(options), strict=True)
            return adapter.validate_python(options)

        serialization = core_schema.plain_serializer_function_ser_schema(self._plain)
        return core_schema.with_info_plain_validator_function(choose, serialization=serialization)

    def _plain(self, value: Any) -> dict[str, Any]:
        names = {cls: name for name, cls in self.table.items()}
        # In Python, any instance of the base class is accepted.
        return {"name": names.get(type(value), type(value).__name__), **plain(value)}


def plain(options: Any) -> Any:
    """Convert options to plain data, the form that recipes and JSON files hold."""
    return to_jsonable_python(options)
