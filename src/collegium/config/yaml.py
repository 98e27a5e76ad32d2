"""YAML 1.2 files with line numbers and overrides, decoded to options with all errors at once.

A RecipeError has every problem, one per line, such as `recipe.yaml:12: train.lr: ...`. Text that is
not YAML, not a mapping, or an override that does not fit is an error at once.
"""

from __future__ import annotations

import functools
import json
import math
import operator
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import is_pydantic_dataclass
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.tokens import TagToken

from collegium.errors import RecipeError, nearest
from collegium.options import OneOf
from collegium.storage.credentials import SECRET_KEY, assigns_secret, holds_secret

T = TypeVar("T")
KeyPath = tuple[str | int, ...]
MAX_BYTES = 1_000_000
MAX_DEPTH = 40
MAX_VALUES = 100_000
"""Values of a recipe with its aliases expanded: nested ones grow exponentially."""
_OPENING = frozenset({"[", "{", "<block sequence start>", "<block mapping start>"})
_CLOSING = frozenset({"]", "}", "<block end>"})
CODE_KEYS = frozenset({"_target_", "_component_", "_function_", "!function"})
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
"""Keys of other tools, and ours."""

_WORDS = {
    "an object": "a mapping",
    "a valid array": "a list",
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    " after validation": "",
}
"""Words of pydantic, and ours."""


@dataclass
class YamlDocument:
    """Plain data of a YAML file, the place of each key, and all problems found."""

    name: str
    data: Any = None
    places: dict[KeyPath, tuple[int, str]] = field(default_factory=dict)
    """Offset in the file and `recipe.yaml:12`, or -1 and the override that set the key."""
    problems: list[tuple[int, KeyPath, str]] = field(default_factory=list)
    """Offset, path and message."""
    num_values: int = 0
    """Values read, each alias counted as often as it occurs."""

    def add(self, path: KeyPath, text: str) -> None:
        """Record a problem at a key. Its place is that of the nearest enclosing key with one."""
        prefixes = (path[:end] for end in range(len(path), 0, -1))
        places = (self.places[prefix] for prefix in prefixes if prefix in self.places)
        offset, place = next(places, (-1, self.name))
        self.problems.append((offset, path, ": ".join(filter(None, (place, dotted(path), text)))))

    def check(self, problems: Iterable[str] = ()) -> None:
        """Raise RecipeError with all problems, recorded or given as `key: problem`, in order."""
        for problem in problems:
            key, _, text = problem.partition(": ")
            parts = (int(part) if part.isdecimal() else part for part in key.split("."))
            self.add(tuple(parts), text)
        if self.problems:
            lines = [text for *_, text in sorted(self.problems, key=lambda problem: problem[0])]
            raise RecipeError("\n".join(dict.fromkeys(lines)))

    def read(self, node: Any, path: KeyPath, place: Callable[[Any], tuple[int, str]]) -> Any:
        """Convert a node of ruamel to plain data. A value with a problem becomes null."""
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise RecipeError(
                f"{self.name}: must have at most {MAX_VALUES:,} values; use no aliases"
            )
        if isinstance(node, MappingNode):
            pairs = [(k.value if isinstance(k, ScalarNode) else "?", k, v) for k, v in node.value]
        elif isinstance(node, SequenceNode):
            pairs = [(index, child, child) for index, child in enumerate(node.value)]
        else:
            try:
                return None if node is None else _scalar(node, path[-1])
            except ValueError as error:
                return self.add(path, str(error))
        values: dict[Any, Any] = {}
        for key, key_node, child in pairs:
            at = (*path, key)
            problem = "a recipe cannot name code; remove this key" if key in CODE_KEYS else ""
            if key in values:
                problem = f"given twice, first at {self.places[at][1]}; remove one"
            self.places[at] = place(key_node.start_mark)
            values[key] = self.add(at, problem) if problem else self.read(child, at, place)
        return values if isinstance(node, MappingNode) else list(values.values())

    def override(self, override: str) -> None:
        """Set one value, as in `train.max_steps=10`. Its path is checked when it is decoded."""
        name, equals, text = override.partition("=")
        parts = name.strip().split(".")
        is_secret = _is_secret(parts[-1], text) or assigns_secret(override)
        shown_name = "..." if is_secret and "://" in name else name
        label = f"override `{shown_name}{equals}{'...' if is_secret else text}`"
        if not equals or not all(parts):
            raise RecipeError(f"{label}: must be KEY=VALUE, for example train.max_steps=10")
        target: Any = {"": self.data}
        key: Any = ""
        path: KeyPath = ()
        for part in parts:
            if isinstance(target, dict) and target.get(key) is None:
                target[key] = {}
                self.places[path] = (-1, label)
            target = target[key]
            is_index = isinstance(target, list) and part.isdecimal() and int(part) < len(target)
            if not is_index and not isinstance(target, dict):
                got = f"{dotted(path)}: got {shown(target)}"
                raise RecipeError(f"{label}: {got}; must have a key or item `{part}`")
            key = int(part) if is_index else part
            path = (*path, key)
        # Problems of the old value no longer matter.
        self.problems = [item for item in self.problems if item[1][: len(path)] != path]
        self.places = {at: place for at, place in self.places.items() if at[: len(path)] != path}
        self.places[path] = (-1, label)
        target[key] = self.read(_compose(text, lambda _: label), path, lambda _: (-1, label))


def dotted(path: KeyPath) -> str:
    """Format a path: `("data", "train", 0)` is `data.train.0`."""
    parts = map(str, path)
    return ".".join("..." if holds_secret(part) else part for part in parts)


def shown(value: Any) -> str:
    """Format a value for a message, as YAML would, on one short line."""
    if isinstance(value, (Mapping, list)):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    text = f"`{value}`" if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _scalar(node: Any, key: str | int) -> Any:
    # The core schema of YAML 1.2, where dates and 1_000 are text.
    text, kind = node.value, node.tag.rpartition(":")[2]
    if _is_secret(key, text):
        remedy = "keep it in the environment (HF_TOKEN for the model hub)"
        raise ValueError(f"holds a secret; {remedy}; value not shown")
    if node.style or "_" in text:
        return text
    if kind in ("null", "bool"):
        return {"true": True, "false": False}.get(text.lower())
    if kind not in ("int", "float"):
        return text
    if re.match("[-+]?0[0-9]", text):
        raise ValueError(f"got {text}; a leading zero is ambiguous; remove it, or quote the value")
    number = int(text, 0) if kind == "int" else float(re.sub(r"\.(?=[in])", "", text.lower()))
    if number in (math.inf, -math.inf) or number != number:
        raise ValueError(f"got {text}; must be a finite number")
    return number


def _is_secret(key: str | int, text: str) -> bool:
    has_secret_key = text != "" and SECRET_KEY.fullmatch(str(key)) is not None
    return has_secret_key or holds_secret(text)


def read_text(file: Path) -> str:
    """Read a UTF-8 file. Raises RecipeError if it cannot be read."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{file.name}: must be at most {MAX_BYTES:,} bytes")
        return file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        names = ", ".join(sorted(path.name for path in file.parent.glob("*.y*ml"))[:10]) or "none"
        raise RecipeError(f"{file}: not found; YAML files in {file.parent}/: {names}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read as UTF-8 text: {error}") from error


def read_yaml(text: str, name: str, overrides: Sequence[str] = ()) -> YamlDocument:
    """Read a mapping in YAML 1.2, changed by overrides such as `train.max_steps=10`."""
    document = YamlDocument(name)
    try:
        node = _compose(text, lambda line: f"{name}:{line}" if line else name)
        if not isinstance(node, MappingNode):
            got = "nothing" if node is None else f"a {node.id}"
            remedy = "`collegium init` writes a commented recipe"
            raise RecipeError(f"{name}: got {got}; must be a mapping of keys; {remedy}")
        document.data = document.read(node, (), lambda m: (m.index, f"{name}:{m.line + 1}"))
        for override in overrides:
            document.override(override)
    except RecursionError as error:
        raise RecipeError(f"{name}: must be nested less deeply, without cycles") from error
    return document


def _compose(text: str, place: Callable[[int], str]) -> Any:
    """Parse YAML to nodes of ruamel. `place` formats a line from 1, or 0 for none."""
    yaml = YAML(typ="safe", pure=True)
    try:
        tags, depth = [], 0
        for token in yaml.scan(text):
            line = token.start_mark.line + 1
            depth += (token.id in _OPENING) - (token.id in _CLOSING)
            if depth > MAX_DEPTH:  # the time of ruamel is quadratic in the depth
                raise RecipeError(f"{place(line)}: must be nested at most {MAX_DEPTH} levels deep")
            tags += [line] if isinstance(token, TagToken) else []
        if not tags:
            return yaml.compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = f"column {mark.column + 1}: not valid YAML: {error.problem}"
        where = f"{place(mark.line + 1)}: {problem}"
        if assigns_secret(text):  # the error of ruamel repeats the line
            raise RecipeError(f"{where}; line not shown, since the text holds a secret") from None
        raise RecipeError(f"{where}\n{mark.get_snippet()}") from error
    except YAMLError as error:
        raise RecipeError(f"{place(0)}: not valid YAML: {str(error).splitlines()[0]}") from error
    problem = "YAML tags are not allowed; remove the `!`"
    raise RecipeError("\n".join(f"{place(line)}: {problem}" for line in tags))


def decode(
    cls: type[T], document: YamlDocument, check: Callable[[T], Iterable[str]] = lambda _: ()
) -> T:
    """Build an option class from a document. `check` finds more problems in it."""
    try:
        # Strict JSON mode: text is no number, but text is a path and a list is a tuple.
        options = TypeAdapter(cls).validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        items = error.errors(include_url=False)
    else:
        document.check(check(options))
        return options
    problems: list[tuple[KeyPath, str]] = []
    has_counts = False
    for item in items:
        path, keys = _locate(cls, document.data, item)
        if item["type"] == "int_type" and str(item["input"]).endswith(".0"):
            # Large counts are written as 1e6.
            parent = functools.reduce(operator.getitem, path[:-1], document.data)
            parent[path[-1]] = int(item["input"])
            has_counts = True
        text = message(item, keys)
        key, _, rest = text.partition(": ")
        problems.append(((*path, key), rest) if key in keys else (path, text))
    if has_counts:
        return decode(cls, document, check)
    # The innermost problem explains those around it, such as "must be 'auto'" of a mapping.
    for path, text in sorted(problems, key=lambda problem: -len(problem[0])):
        if all(other[: len(path)] != path for _, other, _ in document.problems):
            document.add(path, text)
    document.check()
    raise AssertionError(problems)


def _locate(cls: Any, data: Any, item: Mapping[str, Any]) -> tuple[KeyPath, list[str]]:
    """Return the path of an error, and the keys of the option class there, if it is one."""
    path: KeyPath = ()
    hints = classes = [cls]
    for part in item["loc"]:
        is_index = isinstance(data, list) and isinstance(part, int)
        if not is_index and not (isinstance(data, dict) and part in data):
            continue  # a member of a union
        classes = _chosen(hints, data)
        fields = {k: f for c in classes for k, f in c.__pydantic_fields__.items()}
        data, path = data[part], (*path, part)
        if part in fields:
            hints = _classes(fields[part].annotation, *fields[part].metadata)
    if item["type"] == "missing":
        path = (*path, item["loc"][-1])
    if item["type"] != "unexpected_keyword_argument":  # about the class around the key
        classes = _chosen(hints, data)
    return path, list(classes[0].__pydantic_fields__) if len(classes) == 1 else []


def _classes(*hints: Any) -> list[Any]:
    """Return the option classes, and choices among them, in type hints."""
    classes: list[Any] = []
    for hint in hints:
        is_class = isinstance(hint, OneOf) or is_pydantic_dataclass(hint)
        classes += [hint] if is_class else _classes(*typing.get_args(hint))
    choices = [hint for hint in classes if isinstance(hint, OneOf)]
    return choices or classes  # the annotated base class of a choice has no keys to suggest


def _chosen(hints: Sequence[Any], data: Any) -> list[Any]:
    """Return option classes, a choice replaced by the class that `data` names."""
    options = data if isinstance(data, Mapping) else {}
    classes = [h.table.get(h.name_of(options)) if isinstance(h, OneOf) else h for h in hints]
    return [cls for cls in classes if cls is not None]


def message(item: Mapping[str, Any], keys: Collection[str] = ()) -> str:
    """Format an error of pydantic. `keys` are those of the option class that it is about."""
    if item["type"] == "missing":
        return "missing; must be given"
    if item["type"] == "unexpected_keyword_argument":
        key = str(item["loc"][-1])
        return "unknown key" + (f"; write {RENAMED[key]}" if key in RENAMED else nearest(key, keys))
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    text = re.sub(r"^\w+ should ", "must ", item["msg"])
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    return text if text.startswith("got ") else f"got {shown(item['input'])}; {text}"


class _Representer(RoundTripRepresenter):
    def represent_text(self, text: str) -> Any:
        """Quote what ruamel would write without quotes or fold, and read back as something else."""
        is_plain = text.isprintable() and text == text.strip()
        style = None if is_plain else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Representer.add_representer(str, _Representer.represent_text)


def yaml_writer() -> YAML:
    """Return a writer of YAML, which keeps comments and quotes of what it has read."""
    yaml = YAML(typ="rt")
    yaml.Representer = _Representer
    yaml.preserve_quotes, yaml.width = True, 4096
    return yaml
