"""Documents, and the rows of data files that they are read from.

Columns decide the kind of a row:

- `messages`, or `conversations` with `from` and `value` (ShareGPT): a chat
- `prompt` and `completion`: two strings, or two lists of messages (TRL)
- `instruction` with `output` or `response` (Alpaca, Dolly): a chat of one question and one answer
- the text column: a text

A value that would change what is trained on is honored or refused by name. Other columns, such as
ids and sources, are not read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from collegium.data.readers import Row, SourceOptions, show
from collegium.data.turns import REASONING
from collegium.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_FLAGS = ("weight", "train", "trainable", "loss_mask")
"""Keys of a message or row that say whether to train on it: true, false, 1 or 0."""
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_ALPACA = {"output": "input", "response": "context"}
"""Answer column, and the column with the question's input."""
# Characters that no tokenizer should see.
_FORBIDDEN = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Document:
    """A text, a prompt with its completion, or the messages of a chat."""

    id: str
    """Name of the file or dataset, with the line or row if any. Stable across runs."""
    domain: str
    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    teacher: str | None = None
    """Teacher named by the row, or None."""
    context: frozenset[int] = frozenset()
    """Numbers of the assistant messages that are no targets."""
    template: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, such as `tools`."""

    @property
    def num_characters(self) -> int:
        """Length of its texts, about that of what is encoded."""
        if self.messages is None:
            return sum(len(text or "") for text in (self.text, self.prompt, self.completion))
        return sum(len(str(value)) for message in self.messages for value in message.values())

    def content_hash(self) -> str:
        """Return the SHA-256 hex digest of the content, regardless of id, domain and teacher."""
        # The prefix keeps a text from colliding with a row that serializes to it.
        if self.text is not None:
            content = "text\0" + self.text
        else:
            parts: list[Any] = [self.prompt, self.completion]
            parts.append([[*m.values()] if len(m) == 2 else dict(m) for m in self.messages or ()])
            if self.context or self.template:
                parts += [sorted(self.context), dict(self.template)]
            content = "row\0" + json.dumps(parts, default=str)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def parse_rows(
    rows: Iterable[Row], label: str, options: SourceOptions, *, domain: str, where: str
) -> Iterator[Document | DataError | None]:
    """Yield the document of each row, None if it is blank, or the error that refuses it.

    The first good row fixes the kind of all.
    """
    kind = None
    for number, row in rows:
        name = label if number is None else f"{label}:{number}"
        place = f"{where}: {name}"
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, Mapping):
                raise DataError(f"{place}: got {show(row)}; must be an object with named fields")
            kind = kind or _kind_of(row, options.text_column, place)
            content = _PARSERS[kind](row, options.text_column, place)
            # Null means no teacher. An empty string is rejected later, as an unknown name.
            column = options.teacher_column
            teacher = None if column is None else _text(row, column, place)
        except DataError as error:
            yield error
            continue
        yield None if content is None else Document(name, domain, teacher=teacher, **content)


def columns_read(options: SourceOptions) -> set[str]:
    """Return the columns that a source may read."""
    used = {options.text_column, options.teacher_column or "", "messages", "conversations"}
    used |= {"prompt", "completion", "system", "tools", "chat_template_kwargs", "instruction"}
    return used | {*_ALPACA, *_ALPACA.values(), *_FLAGS, *_MEDIA, *REASONING, "tool_calls"}


def _kind_of(row: Mapping[str, object], text_column: str, place: str) -> str:
    # An explicit `text_column` overrides the other kinds.
    if text_column != "text" and text_column in row:
        return "text"
    if "messages" in row or isinstance(row.get("conversations"), list):
        return "messages"
    if "prompt" in row and "completion" in row:
        return "prompt"
    if "instruction" in row and not {*_ALPACA}.isdisjoint(row):
        return "instruction"
    if text_column in row:
        return "text"
    raise DataError(
        f"{place}: field `{text_column}` is missing (has: {', '.join(map(str, row))}); must have "
        "`messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`, or a "
        "text; set `text_column`, or rename the fields"
    )


def _parse_text(row: Mapping[str, object], text_column: str, place: str) -> dict[str, Any] | None:
    _refuse(row, ("tools", "chat_template_kwargs"), place)
    # A null text counts as blank, so the row is skipped instead of rejected.
    text = _text(row, text_column, place) or ""
    return {"text": text} if text.strip() else None


def _parse_prompt(row: Mapping[str, object], _: str, place: str) -> dict[str, Any] | None:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        prompt, _unused = _messages(row["prompt"], "prompt", place)
        completion, context = _messages(row["completion"], "completion", place)
        shifted = {number + len(prompt) for number in context}
        return _chat(row, [*prompt, *completion], shifted | {*range(len(prompt))}, place)
    _refuse(row, ("tools", "chat_template_kwargs"), place)
    prompt, completion = _text(row, "prompt", place), _text(row, "completion", place) or ""
    if not completion.strip():
        return None
    if not prompt:
        raise DataError(
            f"{place}: `prompt` is empty; must have text; give rows without a prompt as `text`"
        )
    return {"prompt": prompt, "completion": completion}


def _parse_instruction(row: Mapping[str, object], _: str, place: str) -> dict[str, Any] | None:
    answer = next(name for name in _ALPACA if name in row)
    _refuse(row, ("history",), place)
    question, output = _text(row, "instruction", place), _text(row, answer, place)
    more = _text(row, _ALPACA[answer], place) if _ALPACA[answer] in row else None
    if not question or not question.strip():
        raise DataError(f"{place}: `instruction` is empty; must have text; remove the row")
    content = f"{question}\n\n{more}" if more and more.strip() else question
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": output or ""},
    ]
    return _chat(row, messages, (), place)


def _parse_messages(row: Mapping[str, object], _: str, place: str) -> dict[str, Any] | None:
    name = "messages" if "messages" in row else "conversations"
    messages, context = _messages(row[name], name, place)
    return _chat(row, messages, context, place)


_PARSERS = {
    "text": _parse_text,
    "prompt": _parse_prompt,
    "instruction": _parse_instruction,
    "messages": _parse_messages,
}


def _chat(
    row: Mapping[str, object],
    messages: Sequence[Mapping[str, Any]],
    context: Iterable[int],
    place: str,
) -> dict[str, Any] | None:
    """Return the fields of a chat, None if no assistant turn has content."""
    _refuse(row, (), place)
    answers = [m for m in messages if m["role"] == "assistant"]
    is_blank = answers and not any(m["content"].strip() or m.get("tool_calls") for m in answers)
    if not messages or is_blank:
        return None
    context = {number for number in context if messages[number]["role"] == "assistant"}
    if (system := _text(row, "system", place) if "system" in row else None) and system.strip():
        messages = [{"role": "system", "content": system}, *messages]
        context = {number + 1 for number in context}
    content: dict[str, Any] = {"messages": tuple(messages)}
    if context:
        content["context"] = frozenset(context)
    if template := _template(row, place):
        content["template"] = template
    return content


def _template(row: Mapping[str, object], place: str) -> dict[str, Any]:
    """Return the variables that a row gives to the chat template."""
    kwargs = _decoded(row.get("chat_template_kwargs")) or {}
    if not isinstance(kwargs, Mapping):
        raise DataError(f"{place}: `chat_template_kwargs` is {show(kwargs)}; must be an object")
    template = {name: value for name, value in kwargs.items() if value is not None}
    tools = _decoded(row.get("tools")) or []
    is_list = isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    if not is_list:
        raise DataError(f"{place}: `tools` is {show(tools)}; must be a list of objects")
    return {**template, "tools": tools} if tools else template


def _messages(value: object, name: str, place: str) -> tuple[list[Mapping[str, Any]], list[int]]:
    """Return the messages, and the numbers of those that are no targets."""
    if value is None:
        return [], []
    if not isinstance(value, list):
        problem = "must be a list of role and content"
        raise DataError(f"{place}: `{name}` is {show(value)}; {problem}")
    messages, context = [], []
    for number, given in enumerate(value):
        here = f"{place}: {name}[{number}]"
        if not isinstance(given, Mapping):
            problem = "must be an object with role and content"
            raise DataError(f"{here}: got {show(given)}; {problem}")
        message, is_target = _message(given, here)
        messages.append(message)
        if not is_target:
            context.append(number)
    return messages, context


def _message(given: Mapping[str, object], here: str) -> tuple[Mapping[str, Any], bool]:
    """Return a message for the chat template, and whether it may be a target."""
    rest = {key: value for key, value in given.items() if value not in (None, "", [], {})}
    is_sharegpt = "from" in given and "role" not in given
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    role = _field(given, role_key, here)
    role = _SHAREGPT_ROLES.get(str(role), role) if is_sharegpt else role
    if role not in ROLES:
        roles = (*ROLES, *_SHAREGPT_ROLES) if is_sharegpt else ROLES
        raise DataError(f"{here}: unknown role `{role}`; must be one of {', '.join(roles)}")
    for key in (role_key, content_key):
        rest.pop(key, None)
    calls = _tool_calls(rest.pop("tool_calls", None), str(role), here)
    content = _content(given, content_key, here) if content_key in given or not calls else ""
    if content is None and not calls:
        raise DataError(f"{here}: `{content_key}` is null; must be a string")
    message: dict[str, Any] = {"role": str(role), "content": content or ""}
    is_target = _is_target(rest, here)
    if is_target and role != "assistant":
        raise DataError(
            f"{here}: role `{role}` is marked as a target; must be the assistant's turns only; "
            "remove the mark"
        )
    for key in (*REASONING, "name", "tool_call_id"):
        if key in rest:
            message[key] = _text(rest, key, here)
            del rest[key]
    if calls:
        message["tool_calls"] = calls
    if rest:
        raise DataError(
            f"{here}: got the key `{min(rest, key=str)}`; must be one of role, content, name, "
            f"tool_calls, tool_call_id, {', '.join((*REASONING, *_FLAGS))}; remove it"
        )
    return message, is_target is not False


def _is_target(rest: dict[str, object], here: str) -> bool | None:
    """Remove the flags from `rest`, and return whether they ask for training, None without any."""
    flags = {key: rest.pop(key) for key in _FLAGS if key in rest}
    for key, value in flags.items():
        if value not in (0, 1):
            raise DataError(
                f"{here}: `{key}` is {show(value)}; must be 0 or 1, since targets are not weighted"
            )
    return all(flags.values()) if flags else None


def _tool_calls(value: object, role: str, here: str) -> list[dict[str, Any]]:
    if not value:
        return []
    if role != "assistant" or not isinstance(value, list):
        problem = "must be a list in an assistant's turn"
        raise DataError(f"{here}: `tool_calls` is {show(value)} (role `{role}`); {problem}")
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            problem = "must have a function with a name and arguments"
            raise DataError(f"{here}: `tool_calls` has {show(call)}; {problem}")
        # OpenAI's arguments are a string of JSON. Templates expect an object.
        arguments = _decoded(function.get("arguments") or {})
        target = {"name": function["name"], "arguments": arguments}
        outer = {k: v for k, v in call.items() if k in ("id", "type") and v is not None}
        calls.append({"type": "function", **outer, "function": target})
    return calls


def _content(given: Mapping[str, object], key: str, here: str) -> str | None:
    """Return the content: a string, or the joined texts of a list of parts."""
    value = given.get(key)
    if not isinstance(value, list):
        return _text(given, key, here)
    texts = []
    for part in value:
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        if not is_text:
            raise DataError(
                f"{here}: `{key}` has the part {show(part)}; must have parts of type text only"
            )
        texts.append(_text(part, "text", here) or "")
    return "".join(texts)


def _refuse(row: Mapping[str, object], more: Sequence[str], place: str) -> None:
    """Refuse values that this kind of row cannot honor."""
    for key in (*REASONING, "tool_calls", *_MEDIA, *more):
        if row.get(key) not in (None, "", [], {}):
            raise DataError(
                f"{place}: got the field `{key}`, which this kind of row cannot honor; must be "
                "empty; move it into `messages`, or remove it"
            )
    for key in _FLAGS:
        if (value := row.get(key)) is not None and value != 1:
            raise DataError(
                f"{place}: `{key}` is {show(value)}; rows are not weighted; must be 1; remove the "
                "rows that should not be trained on"
            )


def _field(row: Mapping[str, object], name: str, place: str) -> object:
    if name not in row:
        raise DataError(f"{place}: field `{name}` is missing (has: {', '.join(map(str, row))})")
    return row[name]


def _text(row: Mapping[str, object], name: str, place: str) -> str | None:
    value = _field(row, name, place)
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{place}: `{name}` is {show(value)}; must be a string")
    if match := _forbidden(value):
        character = f"lone surrogate U+{ord(match[0]):04X}" if ord(match[0]) else "NUL character"
        raise DataError(
            f"{place}: {character} at column {match.start() + 1} of `{name}`; must be valid "
            "Unicode; remove it"
        )
    return value


def _forbidden(text: str) -> re.Match[str] | None:
    # A sixth of the time of the pattern: only surrogates cannot be encoded.
    with suppress(UnicodeEncodeError):
        text.encode()
        if "\0" not in text:
            return None
    return _FORBIDDEN.search(text)


def _decoded(value: object) -> Any:
    """Decode a string of JSON, as data sets hold objects in tables."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
