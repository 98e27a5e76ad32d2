"""Chat encoding: render the tokenizer's template and mark the assistant's tokens."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from collegium.data.readers import Document, at
from collegium.data.tokens import Tokens, bytes_of_tokens, encode_offsets
from collegium.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROBE_SECONDS = 2.0
"""Time limit for rendering two short messages. A sane template takes a thousandth of it."""
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
_GENERATION = re.compile(r"\{%-?\s*generation\b")


def probe_template(tokenizer: PreTrainedTokenizerFast, *, where: str = "") -> None:
    """Reject a chat template that does not terminate.

    A template is a program that ships with the model's files. It is rendered once in a separate
    thread, which is stopped at the time limit. Exceptions are left to the encoding of the rows.
    Memory is not limited.

    Raises:
        DataError: two short messages take longer than `PROBE_SECONDS`.
    """

    def render() -> None:
        with suppress(Exception, SystemExit):
            tokenizer.apply_chat_template(list(_PROBE), tokenize=False)

    if not tokenizer.chat_template:
        return
    worker = threading.Thread(target=render, daemon=True)
    worker.start()
    worker.join(PROBE_SECONDS)
    if worker.is_alive():
        # Takes effect between bytecodes, so a single long operation cannot be interrupted:
        # https://docs.python.org/3/c-api/init.html#c.PyThreadState_SetAsyncExc
        stop = ctypes.pythonapi.PyThreadState_SetAsyncExc
        stop(ctypes.c_ulong(worker.ident or 0), ctypes.py_object(SystemExit))
        raise DataError(
            f"{at(where, 'tokenizer')}: chat template took more than {PROBE_SECONDS:g} s for two "
            "short messages; must terminate; fix tokenizer_config.json or chat_template.jinja"
        )


def encode_chat(
    document: Document, tokenizer: PreTrainedTokenizerFast, *, where: str = ""
) -> Tokens:
    """Render and encode a chat, with the assistant's turns and their stop tokens as targets.

    Target spans come from the template's `{% generation %}` blocks, or else from rendering the
    chat up to each turn. `num_bytes` counts the rendered text, without special tokens.

    Raises:
        DataError: the chat template is missing, fails, rewrites earlier turns, or ends an
            assistant turn without a stop token.
    """
    place = at(where, document.id)
    if not tokenizer.chat_template:
        raise DataError(
            f"{place}: got `messages` but the tokenizer has no chat template; must have one; use "
            "another tokenizer, or rows of `prompt` and `completion`"
        )
    messages = [dict(message) for message in document.messages or ()]
    text = _render(messages, tokenizer, place)
    ((ids, offsets),) = encode_offsets([text], tokenizer)
    # The mask of `apply_chat_template` is all zeros for a template without generation blocks.
    if _GENERATION.search(_template(tokenizer)):
        is_target = _generation_mask(messages, tokenizer, ids, place)
    else:
        is_target = np.zeros(len(ids), bool)
        for start, end in _turn_spans(messages, text, tokenizer, place):
            is_target |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
    is_special = np.isin(ids, _special_ids(tokenizer))
    _trim_turns_to_stop(
        text, offsets, is_target, is_special & ~_is_never_stop(ids, tokenizer), place
    )
    num_bytes = np.where(is_special, 0, bytes_of_tokens(text, offsets[:, 1]))
    return Tokens(ids, is_target, num_bytes)


def _template(tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.get_chat_template()


def _render(
    messages: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    place: str,
    *,
    is_prompt: bool = False,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=is_prompt
            )
        )
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise DataError(
            f"{place}: the chat template fails ({type(error).__name__}: {reason}); must render "
            "every row; fix the row or the template"
        ) from error


def _generation_mask(
    messages: Sequence[dict[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    ids: np.ndarray,
    place: str,
) -> np.ndarray:
    encoding: Any = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    if list(encoding["input_ids"]) != ids.tolist():
        raise DataError(
            f"{place}: the chat template renders one chat as two texts; must be deterministic"
        )
    return np.array(encoding["assistant_masks"], bool)


def _turn_spans(
    messages: Sequence[dict[str, str]], text: str, tokenizer: PreTrainedTokenizerFast, place: str
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


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]


def _is_never_stop(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Mark bos and unknown tokens, which cannot end a turn unless they are eos as well."""
    others = [tokenizer.bos_token_id, tokenizer.unk_token_id]
    eos = tokenizer.eos_token_id
    # Some tokenizers, such as GPT-2's, use one token as bos, unk and eos.
    return np.isin(ids, [n for n in others if isinstance(n, int) and n != eos])


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
