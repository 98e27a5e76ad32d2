"""YAML 1.2 read as plain data that remembers its lines: no tags, no duplicate keys, no secrets, no surprises in scalars."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    CollectionEndEvent,
    CollectionStartEvent,
    NodeEvent,
    ScalarEvent,
)
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_NODES = 10_000
MAX_DEPTH = 40
MAX_CHARS = 1_000_000
CODE_KEYS = frozenset({"_target_", "_component_", "_function_", "!function"})

KeyPath = tuple[str | int, ...]

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_RADIX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SECRET_KEY = re.compile(
    r"(.*_)?(api_?key|password|secret|hf_token|access_token|auth_token)|token", re.I
)
_SECRET_VALUE = re.compile(r"(hf_|sk-|ghp_|github_pat_|AKIA)[A-Za-z0-9_-]{16,}")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_NON_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Problem:
    """One thing wrong at one place of a document; prints as one line."""

    line: int
    """From 1; 0 for a command-line override or a whole file."""
    where: str
    """`recipe.yaml:12`, or the override that said it."""
    path: str
    """Dotted keys, empty for the whole document."""
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.path, self.text) if part)


@dataclass
class Document:
    """Plain data of one document, where each key came from, and all that is wrong with it."""

    name: str
    data: Any = None
    origins: dict[KeyPath, tuple[int, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    bad: set[KeyPath] = field(default_factory=set)
    """Keys whose value could not be read; there is nothing more to say about them."""
    is_readable: bool = False
    """Whether there is data to go on with, in spite of any problems."""

    def add(self, path: KeyPath, text: str, *, line: int | None = None) -> None:
        """Note a problem at `path`; its place is that of the nearest enclosing key that is known."""
        place = self._origin(path) if line is None else (line, f"{self.name}:{line}")
        self.problems.append(Problem(place[0], place[1], dotted(path), text))

    def forget(self, path: KeyPath) -> None:
        """Drop what is wrong at `path` and below, because another value takes its place."""
        self.bad = {bad for bad in self.bad if bad[: len(path)] != path}
        prefix = dotted(path)
        self.problems = [
            problem
            for problem in self.problems
            if problem.path != prefix and not problem.path.startswith(f"{prefix}.")
        ]

    def _origin(self, path: KeyPath) -> tuple[int, str]:
        for end in range(len(path), -1, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return (0, self.name)


def dotted(path: KeyPath) -> str:
    """`("data", "train", 0, "path")` -> `data.train.0.path`."""
    return ".".join(str(part) for part in path)


def read_yaml(text: str, name: str) -> Document:
    """Read one YAML 1.2 document; problems are collected in the result, none is raised."""
    document = Document(name)
    if len(text) > MAX_CHARS:
        document.add((), f"got {len(text)} characters; must be at most {MAX_CHARS}")
        return document
    try:
        _refuse_events(text, document)
        root = None if document.problems else YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        document.problems.append(_syntax_problem(error, name))
        return document
    except (YAMLError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else _one_line(error)
        document.add((), f"not valid YAML: {reason}")
        return document
    if root is not None:
        walker = _Walker(document)
        document.data = walker.value(root, ())
        if walker.is_over:
            document.problems = document.problems[-1:]
            return document
    document.is_readable = not document.problems or root is not None
    return document


def scalar(text: str) -> Any:
    """The value of a plain scalar in the core schema of YAML 1.2.

    Raises:
        ValueError: a number with a leading zero, or one that is not finite.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _LEADING_ZERO.fullmatch(text):
        plain = re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text)
        raise ValueError(
            f"got {text}; a leading zero is ambiguous; write {plain}, or quote it if it is text"
        )
    if _RADIX.fullmatch(text):
        return int(text, 0)
    if _INT.fullmatch(text):
        return int(text)
    is_float = _FLOAT.fullmatch(text) is not None
    if _NON_FINITE.fullmatch(text) or (is_float and not math.isfinite(float(text))):
        raise ValueError(f"got {text}; must be a finite number")
    return float(text) if is_float else text


def refuse_secrets(document: Document) -> None:
    """Note every secret of a document and drop its value, so that nothing can show it."""
    for path in list(_secrets(document.data, ())):
        text = "holds a secret; keep it in the environment (HF_TOKEN for the model hub); value not shown"
        document.add(path, text)
        _remove(document.data, path)


def _secrets(data: Any, path: KeyPath) -> Iterator[KeyPath]:
    if isinstance(data, (dict, list)):
        for key, item in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _secrets(item, (*path, key))
    elif isinstance(data, str) and data and path:
        key = path[-1]
        is_secret_key = isinstance(key, str) and _SECRET_KEY.fullmatch(key) is not None
        if is_secret_key or _SECRET_VALUE.search(data):
            yield path


def _remove(data: Any, path: KeyPath) -> None:
    for part in path[:-1]:
        data = data[part]
    if isinstance(data, dict):
        del data[path[-1]]
    else:
        data[path[-1]] = ""


def _refuse_events(text: str, document: Document) -> None:
    """Look at the document as a stream, which ends where it becomes too deep, too long or names a type."""
    depth = num_nodes = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        line = event.start_mark.line + 1
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        num_nodes += isinstance(event, NodeEvent)
        if depth > MAX_DEPTH:
            document.add((), f"nested more than {MAX_DEPTH} levels deep", line=line)
            return
        if num_nodes > 2 * MAX_NODES:  # each a key or a value
            document.add((), f"holds more than {MAX_NODES} nodes", line=line)
            return
        if isinstance(event, (ScalarEvent, CollectionStartEvent)) and event.tag is not None:
            document.add((), "YAML tags are not allowed in a recipe; remove the `!`", line=line)


def _syntax_problem(error: MarkedYAMLError, name: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    reason = str(error.problem or error.context)
    if mark is None:
        return Problem(0, name, "", f"not valid YAML: {reason}")
    snippet = mark.get_snippet() or ""
    where = f"{name}:{mark.line + 1}"
    text = f"column {mark.column + 1}: not valid YAML: {reason}"
    return Problem(mark.line + 1, where, "", f"{text}\n{snippet}" if snippet else text)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Walker:
    """Nodes to plain data, aliases expanded, within a fixed budget of nodes."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._left = MAX_NODES
        self._seen: set[int] = set()
        self._alias = ""
        self.is_over = False

    def value(self, node: Node, path: KeyPath) -> Any:
        if not self._spend(node, path):
            return None
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self._child(item, (*path, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, ScalarNode) or node.style is not None:
            return node.value
        try:
            return scalar(node.value)
        except ValueError as error:
            self._document.add(path, str(error), line=node.start_mark.line + 1)
            self._document.bad.add(path)
            return None

    def _child(self, node: Node, path: KeyPath) -> Any:
        if self.is_over:
            return None
        self._note(path, node)
        return self.value(node, path)

    def _note(self, path: KeyPath, node: Node) -> None:
        line = node.start_mark.line + 1
        self._document.origins.setdefault(path, (line, f"{self._document.name}:{line}"))

    def _spend(self, node: Node, path: KeyPath) -> bool:
        """Count the node; False once the document has grown past its budget."""
        if self.is_over:
            return False
        self._left -= 1
        if node.anchor and id(node) in self._seen:
            self._alias = f" (alias `*{node.anchor}`)"
        self._seen.add(id(node))
        line = node.start_mark.line + 1
        if self._left < 0:
            self._document.add((), f"expands past {MAX_NODES} nodes{self._alias}", line=line)
            self.is_over = True
        elif len(path) > MAX_DEPTH:
            text = f"nested more than {MAX_DEPTH} levels deep{self._alias}"
            self._document.add((), text, line=line)
            self.is_over = True
        return not self.is_over

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                self._document.add(path, "a key must be plain text", line=line)
                continue
            key = key_node.value
            if key in lines:
                text = f"given twice, in lines {lines[key]} and {line}; remove one"
                self._document.add((*path, key), text, line=line)
                continue
            lines[key] = line
            if key in CODE_KEYS:
                text = "a recipe cannot name code; remove this key"
                self._document.add((*path, key), text, line=line)
                continue
            self._document.origins[(*path, key)] = (line, f"{self._document.name}:{line}")
            result[key] = self._child(value_node, (*path, key))
        return result
