"""Chat encoding: render the tokenizer's template and mark the assistant's tokens."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from collegium.data.readers import Document
from collegium.data.tokens import Encoded, bytes_of_tokens, tokenize
from collegium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

Messages = list[dict[str, str]]

_GENERATION = re.compile(r"\{%-?\s*generation\b")


def encode_chat(document: Document, tokenizer: Tokenizer, *, where: str) -> Encoded:
    """Render and encode a chat, with the assistant's turns and their stop tokens as targets.

    Target spans come from the template's `{% generation %}` blocks, or else from rendering the
    chat up to each turn. `num_bytes` counts the rendered text, without special tokens. Raises
    DataError if the template is missing, fails, rewrites earlier turns, or ends an assistant turn
    without a stop token.
    """
    place = f"{where}: {document.id}"
    if not tokenizer.chat_template:
        raise DataError(
            f"{place}: got `messages` but the tokenizer has no chat template; must have one; use "
            "another tokenizer, or rows of `prompt` and `completion`"
        )
    messages = [dict(message) for message in document.messages or ()]
    text = _render(messages, tokenizer, place)
    ((ids, offsets),) = tokenize([text], tokenizer)
    # The mask of `apply_chat_template` is all zeros for a template without generation blocks.
    if _GENERATION.search(tokenizer.get_chat_template()):
        encoding: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        if list(encoding["input_ids"]) != ids.tolist():
            problem = "the chat template renders one chat as two texts; must be deterministic"
            raise DataError(f"{place}: {problem}")
        is_target = np.array(encoding["assistant_masks"], bool)
    else:
        is_target = np.zeros(len(ids), bool)
        for start, end in _turn_spans(messages, text, tokenizer, place):
            is_target |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
    added = tokenizer.added_tokens_decoder.items()
    special = {number: token.content for number, token in added if token.special}
    # Bos and unknown tokens end no turn. Some tokenizers, such as GPT-2's, use one token as bos,
    # unknown and eos.
    never = (tokenizer.bos_token, tokenizer.unk_token)
    stops = [n for n, name in special.items() if name == tokenizer.eos_token or name not in never]
    _trim_turns_to_stop(text, offsets, is_target, np.isin(ids, stops), place)
    num_bytes = bytes_of_tokens(text, offsets[:, 1])
    num_bytes[np.isin(ids, list(special))] = 0
    return Encoded(ids, is_target, num_bytes, can_split=False)


def _render(
    messages: Messages, tokenizer: Tokenizer, place: str, *, is_prompt: bool = False
) -> str:
    # transformers renders in jinja2's ImmutableSandboxedEnvironment: no template reaches Python.
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_prompt
        )
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{place}: the chat template fails ({type(error).__name__}: {reason}); must render "
            "every row; fix the row or the template"
        ) from error
    return str(text)


def _turn_spans(
    messages: Messages, text: str, tokenizer: Tokenizer, place: str
) -> list[tuple[int, int]]:
    """Return the characters [start, end) of every assistant turn, from renderings of prefixes."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        end_text = _render(messages[: number + 1], tokenizer, place)
        start_text = _render(messages[:number], tokenizer, place, is_prompt=True) if number else ""
        # A template may open a turn differently for generation. Then the turn's header is a target.
        if not end_text.startswith(start_text):
            start_text = _render(messages[:number], tokenizer, place)
        if not (text.startswith(end_text) and end_text.startswith(start_text)):
            raise DataError(
                f"{place}: the chat template rewrites earlier turns (messages[{number}]); must "
                "render a chat as a continuation of its prefix; mark the assistant's content with "
                "{% generation %} ... {% endgeneration %} in the template"
            )
        spans.append((len(start_text), len(end_text)))
    return spans


def _trim_turns_to_stop(
    text: str, offsets: np.ndarray, is_target: np.ndarray, is_stop: np.ndarray, place: str
) -> None:
    """Unmark whitespace after stop tokens, in place, and reject turns without a stop token."""
    # Runs were lost to stop tokens outside the loss mask:
    # https://github.com/huggingface/trl/issues/5988
    edges = np.diff(is_target.astype(np.int8), prepend=0, append=0)
    for start, end in zip((edges == 1).nonzero()[0], (edges == -1).nonzero()[0], strict=True):
        last = end - 1
        while last > start and not is_stop[last] and not text[slice(*offsets[last])].strip():
            last -= 1
        if not is_stop[last]:
            tail = text[offsets[start, 0] : offsets[end - 1, 1]][-20:]
            raise DataError(
                f"{place}: the stop token is never supervised: an assistant turn ends with "
                f"{tail!r}; must end with the eos token or the template's end-of-turn token, or "
                "the student never learns to stop; put that token inside the template's assistant "
                "turn (before {% endgeneration %})"
            )
        is_target[last + 1 : end] = False
