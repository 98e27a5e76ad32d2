"""Positions of messages in a rendered chat, found by rendering it again with marked content.

A mark is a private-use character that no template touches. If the second rendering without its
marks equals the first, the marks show where each message lies in it, however the template treats
system prompts, last turns, dates and whitespace.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str]

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which data sets and templates hold the reasoning of a message."""
# Private-use characters, two per message. Planes 15 and 16 have 65,534 each.
_PLANES = (0xF0000, 0x100000)
_PLANE_SIZE = 0xFFFE


class UnstableTemplateError(Exception):
    """The rendering of a chat depends on its content in a way that hides the turns."""


@dataclass(frozen=True, slots=True)
class Located:
    """Characters of a message in the rendered chat."""

    after: int
    """End of the content of the messages before it."""
    start: int | None
    """Start of its content. None if the template moved or removed the beginning."""
    end: int | None
    """End of its content or of its last tool call. None if it is not rendered or empty."""
    is_call: bool
    """Whether `end` is inside a tool call, which may go on."""


def locate(messages: Sequence[Message], text: str, render: Render) -> list[Located]:
    """Return the position of every message in `text`, the rendering of all of them.

    Raises:
        UnstableTemplateError: no marked rendering equals `text`.
    """
    plane = _free_plane(messages)
    is_mark = re.compile(f"[{chr(plane)}-{chr(plane + _PLANE_SIZE - 1)}]")
    # A mark before the content hides what it starts with, such as a thinking block, from the
    # template. So the assistant's may be marked at their end only.
    for marks_start in (lambda _: True, lambda m: m["role"] != "assistant", lambda _: False):
        marked = [
            _mark(message, chr(plane + 2 * i), chr(plane + 2 * i + 1), marks_start(message))
            for i, message in enumerate(messages)
        ]
        rendered = render(marked)
        if is_mark.sub("", rendered) == text:
            break
    else:
        raise UnstableTemplateError
    position: dict[int, int] = {}
    for count, match in enumerate(is_mark.finditer(rendered)):
        position.setdefault(ord(match[0]) - plane, match.start() - count)
    places, after = [], 0
    for i, message in enumerate(messages):
        start, end = position.get(2 * i), position.get(2 * i + 1)
        places.append(Located(after, start, end, bool(message.get("tool_calls"))))
        after = max(after, end or 0)
    return places


def lost_words(message: Message, place: Located, text: str) -> str | None:
    """Return the key of the message whose text is missing from the rendering, or None.

    Whitespace is not compared. Strings inside JSON may be escaped.
    """
    if place.end is None:
        return next((key for key, value in _texts(message) if value.strip()), None)
    region = _squeeze(text[place.after : place.end])
    for key, value in _texts(message):
        # The position ends at the name of a call, its arguments follow.
        where = _squeeze(text[place.after :]) if key.startswith("tool_calls") else region
        escaped = (json.dumps(value, ensure_ascii=a)[1:-1] for a in (False, True))
        if not any(_squeeze(form) in where for form in (value, *escaped)):
            return key
    return None


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    for key in ("content", *REASONING):
        if isinstance(value := message.get(key), str):
            yield key, value
    for number, call in enumerate(message.get("tool_calls") or ()):
        function: Any = call.get("function", call)
        yield f"tool_calls[{number}]", str(function["name"])
        arguments = function.get("arguments")
        values: Any = arguments.values() if isinstance(arguments, Mapping) else ()
        for value in values:
            if isinstance(value, str):
                yield f"tool_calls[{number}]", value


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _free_plane(messages: Sequence[Message]) -> int:
    used = json.dumps([*messages], ensure_ascii=False, default=str)
    for plane in _PLANES:
        is_free = not any(plane <= ord(c) <= plane + _PLANE_SIZE for c in used)
        if is_free and 2 * len(messages) < _PLANE_SIZE:
            return plane
    raise UnstableTemplateError


def _mark(message: Message, start: str, end: str, marks_start: bool) -> Message:
    """Return a copy with its content between marks, inside of the whitespace around it."""
    marked = dict(message)
    content = message.get("content")
    calls = message.get("tool_calls")
    if isinstance(content, str) and (core := content.strip()):
        at = content.index(core)
        head, tail = content[:at], content[at + len(core) :]
        closing = "" if calls else end
        marked["content"] = f"{head}{start if marks_start else ''}{core}{closing}{tail}"
    if calls:
        marked["tool_calls"] = copy.deepcopy(calls)
        last = marked["tool_calls"][-1]
        function = last.get("function", last)
        function["name"] += end
    return marked
