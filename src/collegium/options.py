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
    from torch import Tensor as Tensor
else:
    # Importing torch takes more than a second, which an error in a recipe need not wait for.
    torch = _LazyModule("torch")
    Tensor = Any  # for annotations, which are never evaluated


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field, Field)
)
def option(cls: type[T]) -> type[T]:
    """Make a frozen dataclass with keyword-only fields that are validated on construction."""
    return cast(type[T], dataclass(frozen=True, kw_only=True, config=STRICT)(cls))


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, for `Annotated[...] | None`
class OneOf:
    """Annotation of a field that holds an instance of one of several option classes.

    The field accepts an instance, or a mapping with the options of a class and its name, which
    `plain` writes too. With the key `name`, a bare name is a class without options.
    """

    table: Mapping[str, type]
    """Option classes by name."""
    key: str | None = "name"
    """The key of the name. None: the keys of the mapping that are in the table name one class."""
    default: str | None = None
    """The class of a mapping without a name, which `plain` leaves out."""

    def name_of(self, options: Mapping[str, Any]) -> Any:
        """Return the name of the class that a mapping chooses, None where it is ambiguous."""
        if self.key is not None:
            return options.get(self.key, self.default)
        names = [name for name in self.table if options.get(name) is not None]
        return names[0] if len({self.table[name] for name in names}) == 1 else None

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        def choose(value: Any, info: core_schema.ValidationInfo) -> Any:
            if isinstance(value, source):
                return value
            is_name = self.key == "name" and not isinstance(value, Mapping)
            options = {"name": value} if is_name else value
            adapter = TypeAdapter(self._class_of(options))
            options = {key: value for key, value in options.items() if key != self.key}
            if info.mode == "json":  # strict, like the rest of a recipe
                return adapter.validate_json(json.dumps(options), strict=True)
            return adapter.validate_python(options)

        serialization = core_schema.plain_serializer_function_ser_schema(self._plain)
        return core_schema.with_info_plain_validator_function(choose, serialization=serialization)

    def _class_of(self, options: Any) -> type:
        if not isinstance(options, Mapping):
            raise PydanticCustomError("mapping", "must be a mapping")
        name, hint = self.name_of(options), ""
        if self.key is None and name is None:
            text = "must have exactly one of the keys {names}"
        elif not isinstance(name, str):
            text = "must be a name, or a mapping with `{key}`; known: {names}"
        elif name not in self.table:
            text, hint = "got `{name}`; unknown {key}{hint}", nearest(name, self.table)
        else:
            return self.table[name]
        # Names of one class may be given together.
        classes = dict.fromkeys(self.table.values())
        together = ["/".join(n for n, c in self.table.items() if c is one) for one in classes]
        names = {"names": ", ".join(sorted(together)), "key": self.key}
        raise PydanticCustomError("name", text, {"name": name, "hint": hint, **names})

    def _plain(self, value: Any) -> dict[str, Any]:
        names = {cls: name for name, cls in self.table.items()}
        # In Python, any instance of the base class is accepted, also one without options.
        name = names.get(type(value), type(value).__name__)
        options = plain(value) if dataclasses.is_dataclass(value) else {}
        return options if self.key is None or name == self.default else {self.key: name, **options}


def plain(options: Any) -> Any:
    """Convert options to plain data, the form that recipes and JSON files hold."""
    return to_jsonable_python(options)
