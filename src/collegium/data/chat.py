"""Chat encoding: render the tokenizer's template and mark the assistant's tokens."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from collegium.data.documents import Document
from collegium.data.render import Rendered, TemplateRenderer
from collegium.data.tokens import Encoded, bytes_of_tokens, tokenize, tokenize_quoting
from collegium.data.turns import Located, Message, UnstableTemplateError, locate, lost_words
from collegium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

_GENERATION = re.compile(r"\{%-?\s*generation\b")
_RESERVED = (
    "messages", "conversations", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template", "return_assistant_tokens_mask",
)  # fmt: skip


class ChatEncoder:
    """Encoder of chats under the template of one tokenizer.

    Each assistant turn that is trained gives one run of targets: what follows the generation
    prompt, which ends with the turn's content, and the stop token after it. Runs come from the
    template's `{% generation %}` blocks if it has any, else from the positions of the content in
    the rendered chat.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, where: str, date: str = "2025-01-01", quote: bool = True
    ) -> None:
        """Templates that print today's date print `date` (ISO 8601).

        `quote` encodes special tokens inside messages as plain text.
        """
        self.tokenizer = tokenizer
        self.where = where
        self.quote = quote
        self.shortened: list[str] = []
        """Ids of the chats whose earlier assistant turns the template shortens."""
        self.empty: list[str] = []
        """Ids of the chats with an empty assistant turn, which is no target."""
        self.quoting: list[str] = []
        """Ids of the chats whose messages contain special tokens."""
        added = tokenizer.added_tokens_decoder
        self._special = {number: t.content for number, t in added.items() if t.special}
        # Bos and unknown tokens end no turn. Some tokenizers, such as GPT-2's, use one token as
        # bos, unknown and eos.
        never = [t for t in (tokenizer.bos_token, tokenizer.unk_token) if t != tokenizer.eos_token]
        self._stops = [n for n, name in self._special.items() if name not in never]
        self._added_stops = [n for n, token in added.items() if token.content not in never]
        names = sorted((t.content for t in added.values() if t.special), key=len, reverse=True)
        self._special_text = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._renderers: dict[str, TemplateRenderer] = {}
        self._now = datetime.datetime.fromisoformat(date)

    def encode(self, document: Document) -> Encoded:
        """Encode a chat. `num_bytes` counts the rendered text, without special tokens.

        Raises:
            DataError: the tokenizer has no template, the template fails or leaves out words, a
                turn cannot be found, or a turn ends without a stop token.
        """
        place = f"{self.where}: {document.id}"
        messages, rendered, places = self._locate(document, place)
        text = rendered.text
        ids, offsets = self._tokenize(document, places, text)
        turns = self._trained_turns(document, messages, places)
        has_blocks = bool(_GENERATION.search(self._template(document, place)))
        if not has_blocks and any(places[n].end == len(text) for n in turns):
            # GLM's templates end a turn with the header of the next, and the last with nothing.
            eos: Any = self.tokenizer.eos_token_id
            ids = np.append(ids, eos)
            offsets = np.concatenate([offsets, [[len(text), len(text)]]])
        blocks = None
        if has_blocks:
            blocks = np.zeros(len(ids), bool)
            for start, end in rendered.spans:
                blocks |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
        is_target, stops = np.zeros(len(ids), bool), set[int]()
        for number in turns:
            limits = [p.end if p.start is None else p.start for p in places[number + 1 :]]
            limit = min((p for p in limits if p is not None), default=len(text))
            chat = _Chat(text, ids, offsets, blocks)
            first, last = self._run(places[number], chat, limit, f"{place}: messages[{number}]")
            is_target[first : last + 1] = True
            stops.add(int(ids[last]))
        num_bytes = bytes_of_tokens(text, offsets[:, 1])
        num_bytes[np.isin(ids, [*self._special, *stops])] = 0
        return Encoded(ids, is_target, num_bytes, can_split=False, stops=frozenset(stops))

    def prompt_ids(self, document: Document) -> list[int]:
        """Encode a chat up to the answer of the assistant, with the generation prompt.

        Raises:
            DataError: the tokenizer has no template, or the template fails or leaves out words.
        """
        place = f"{self.where}: {document.id}"
        _, rendered, places = self._locate(document, place, is_prompt=True)
        return self._tokenize(document, places, rendered.text)[0].tolist()

    def _locate(
        self, document: Document, place: str, *, is_prompt: bool = False
    ) -> tuple[list[dict[str, Any]], Rendered, list[Located]]:
        """Return the messages, their rendering, and the position of each in it."""
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{place}: got `messages` but the tokenizer has no chat template; must have one; "
                "use another tokenizer, or rows of `prompt` and `completion`"
            )
        messages = [dict(message) for message in document.messages or ()]

        def render(marked: Sequence[Message]) -> Rendered:
            return self._render(marked, document, place, is_prompt=is_prompt)

        rendered = render(messages)
        try:
            places = locate(messages, rendered.text, lambda marked: render(marked).text)
        except UnstableTemplateError:
            raise DataError(
                f"{place}: the chat template renders marked content differently; must keep the "
                "content of messages, so that turns can be found; use another template"
            ) from None
        self._check_words(document, messages, places, rendered.text, place)
        return messages, rendered, places

    def _template(self, document: Document, place: str) -> str:
        """Return the template of a chat: a tokenizer may have one of its own for tools."""
        try:
            return self.tokenizer.get_chat_template(tools=document.template.get("tools"))
        except ValueError as error:
            names = ", ".join(sorted(self.tokenizer.chat_template or ()))
            raise DataError(
                f"{place}: the tokenizer has several chat templates ({names}) and none is "
                "`default`; must have a default; save the tokenizer with one template"
            ) from error

    def _renderer(self, template: str) -> TemplateRenderer:
        if template not in self._renderers:
            tokens = self.tokenizer.special_tokens_map
            self._renderers[template] = TemplateRenderer(
                template, now=self._now, special_tokens=tokens
            )
        return self._renderers[template]

    def _render(
        self,
        messages: Sequence[Message],
        document: Document,
        place: str,
        *,
        is_prompt: bool = False,
    ) -> Rendered:
        if reserved := sorted({*document.template} & {*_RESERVED}):
            raise DataError(
                f"{place}: `chat_template_kwargs` has `{reserved[0]}`; must be variables of the "
                "template only; remove it"
            )
        variables = {"add_generation_prompt": is_prompt, **document.template}
        renderer = self._renderer(self._template(document, place))
        (rendered,) = renderer.render([{"messages": list(messages), **variables}])
        if rendered.error is not None:
            raise DataError(
                f"{place}: the chat template {rendered.error}; must render every row; fix the row "
                "or the template"
            )
        return rendered

    @cached_property
    def _prompt(self) -> str:
        """The text that a generation prompt adds to a chat, "" if it adds none."""
        chat, empty = [{"role": "user", "content": "x"}], Document("", "")
        try:
            closed = self._render(chat, empty, self.where).text
            open_ = self._render(chat, empty, self.where, is_prompt=True).text
        except DataError:
            return ""
        # A template may end a finished chat with eos, which the prompt does not continue.
        size = next(
            (i for i, (a, b) in enumerate(zip(closed, open_, strict=False)) if a != b), len(closed)
        )
        return open_[size:]

    def _check_words(
        self,
        document: Document,
        messages: Sequence[Message],
        places: Sequence[Located],
        text: str,
        place: str,
    ) -> None:
        """Check that the rendering has all words. Earlier assistant turns may be shortened."""
        final = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
        for number, (message, span) in enumerate(zip(messages, places, strict=True)):
            key = lost_words(message, span, text)
            if key is None:
                continue
            # Templates of thinking models drop the reasoning of earlier turns on purpose, and
            # those without tools drop their calls.
            if message["role"] == "assistant" and number < final:
                if self.shortened[-1:] != [document.id]:
                    self.shortened.append(document.id)
                continue
            raise DataError(
                f"{place}: messages[{number}]: the chat template leaves out words of `{key}` (role "
                f"`{message['role']}`); must render every word; use another role or key, or "
                "another template"
            )
        for tool in document.template.get("tools") or ():
            name = _tool_name(tool)
            if name and name not in text:
                raise DataError(
                    f"{place}: the chat template leaves out the tool `{name}` of `tools`; must "
                    "render every tool; use a template with tools, or remove them"
                )

    def _trained_turns(
        self, document: Document, messages: Sequence[Message], places: Sequence[Located]
    ) -> list[int]:
        """Return the numbers of the messages to train on: the assistant's, if not empty."""
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        trained = [i for i in turns if i not in document.context]
        with_words = [i for i in trained if places[i].end is not None]
        silent = {*trained} - {*with_words}
        if any(not messages[i].get("tool_calls") for i in silent):
            self.empty.append(document.id)
        return with_words

    def _tokenize(
        self, document: Document, places: Sequence[Located], text: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize the rendering, with the special tokens that messages contain as plain text."""
        quoted = [
            match.span()
            for place in places
            if place.start is not None and place.end is not None
            for match in self._special_text.finditer(text, place.start, place.end)
        ]
        if quoted:
            self.quoting.append(document.id)
        if quoted and self.quote:
            return tokenize_quoting(text, quoted, self.tokenizer)
        ((ids, offsets),) = tokenize([text], self.tokenizer)
        return ids, offsets

    def _run(self, span: Located, chat: _Chat, limit: int, place: str) -> tuple[int, int]:
        """Return the first and last token of the targets of a turn."""
        start = self._start(span, chat.text, place)
        # A token across the border belongs to the content: nothing else predicts it.
        ends = np.maximum.accumulate(chat.offsets[:, 1])
        first = int(np.searchsorted(ends, start, side="right"))
        last = self._stop(span, chat, limit)
        is_supervised = last is not None
        if last is not None and chat.blocks is not None:
            inside = first + np.flatnonzero(chat.blocks[first : last + 1])
            is_supervised = inside[-1:].tolist() == [last]
            begins = span.end if span.start is None else span.start
            is_late = is_supervised and chat.offsets[inside[0], 0] > (begins or 0)
            has_gap = is_supervised and len(inside) <= last - inside[0]
            if chat.blocks[max(first - 1, 0)] or is_late or has_gap:
                raise DataError(
                    f"{place}: the {{% generation %}} block holds another text than the turn's; "
                    "must hold its content and its stop token, not the header; change the template"
                )
            first = int(inside[0]) if is_supervised else first
        if last is None or not is_supervised:
            tail = chat.text[start : (span.end or 0) + 9][-20:]
            raise DataError(
                f"{place}: the stop token is never supervised: an assistant turn ends with "
                f"{tail!r}; must end with the eos token or the template's end-of-turn token, or "
                "the student never learns to stop; put that token after the content, inside the "
                "template's assistant turn (before {% endgeneration %})"
            )
        return first, last

    def _start(self, span: Located, text: str, place: str) -> int:
        """Return the character at which generation of the turn starts."""
        assert span.end is not None
        at = text.find(self._prompt, span.after, span.end) if self._prompt else -1
        if at >= 0 and (span.start is None or at < span.start):
            return at + len(self._prompt)
        if span.start is None:
            raise DataError(
                f"{place}: the start of the turn cannot be found: the chat template moves the "
                "beginning of the content, and writes another header than its generation prompt; "
                "must start a turn with one of them; use another template"
            )
        return span.start

    def _stop(self, span: Located, chat: _Chat, limit: int) -> int | None:
        """Return the number of the stop token that follows the content, or None."""
        end = span.end or 0
        after = np.flatnonzero((chat.offsets[:, 0] >= end) & (chat.offsets[:, 1] <= limit))
        for stops in (self._stops, self._added_stops):
            is_stop = np.isin(chat.ids[after], stops)
            at = int(is_stop.argmax()) if is_stop.any() else len(after)
            # Only a tool call goes on after its position.
            if at == len(after) or (
                chat.text[end : chat.offsets[after[at], 0]].strip() and not span.is_call
            ):
                continue
            # Of tokens in a row, such as <|END_RESPONSE|><|END_OF_TURN_TOKEN|>, eos ends the turn.
            row = after[at:][np.cumprod(is_stop[at:]).astype(bool)]
            is_eos = chat.ids[row] == self.tokenizer.eos_token_id
            return int(row[is_eos.argmax()])
        return None


@dataclass(frozen=True, slots=True)
class _Chat:
    """A rendered chat of L tokens."""

    text: str
    ids: np.ndarray
    """(L,) int64."""
    offsets: np.ndarray
    """(L, 2) int64, characters."""
    blocks: np.ndarray | None
    """(L,) bool: the token lies in a generation block. None for a template without blocks."""


def _tool_name(tool: Mapping[str, Any]) -> str:
    return str(tool.get("function", tool).get("name", ""))
