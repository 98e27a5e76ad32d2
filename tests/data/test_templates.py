"""Every assistant turn is one run of targets: its words and its stop token, under any template."""

import copy

import numpy as np
import pytest

from chat_templates import FAMILIES, Family, chatml
from collegium.data.chat import ChatEncoder
from collegium.data.documents import Document
from collegium.errors import DataError
from refusals import refused


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CHATS = {
    "one turn": [say("user", "hi there"), say("assistant", "yo all")],
    "three turns": [
        say("user", "count to one"),
        say("assistant", "one"),
        say("user", "and to two"),
        say("assistant", "one, two\nand no more"),
        say("user", "thanks"),
        say("assistant", "bye"),
    ],
    "words of the headers": [
        say("user", "user"),
        say("assistant", "assistant"),
        say("user", "assistant"),
        say("assistant", "user"),
    ],
    "repeated words": [
        say("user", "a"),
        say("assistant", "a"),
        say("user", "a"),
        say("assistant", "a"),
    ],
    "no English": [say("user", "quoi ?"), say("assistant", "où ça — 数 🙂")],
    "greeting first": [
        say("assistant", "welcome"),
        say("user", "hi"),
        say("assistant", "what may I do"),
    ],
    "system": [say("system", "be kind"), say("user", "hi"), say("assistant", "dear you")],
    "two in a row": [
        say("user", "hi"),
        say("assistant", "let me look"),
        say("assistant", "found it"),
    ],
}


def encode(family: Family, messages: list[dict[str, str]], **fields: object):
    encoder = ChatEncoder(family.tokenizer(), where="data")
    chat = Document(id="17", domain="d", messages=tuple(messages), **fields)  # type: ignore[arg-type]
    return encoder.encode(chat), encoder


def runs(encoded, tokenizer) -> list[str]:
    """The text of each run of targets."""
    is_target = encoded.is_target.astype(np.int8)
    edges = np.diff(is_target, prepend=0, append=0)
    bounds = zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True)
    return [tokenizer.decode(encoded.ids[start:stop]) for start, stop in bounds]


HEADER_STOPS = {
    "GLM-4": ("<|user|>", "<|assistant|>"),
    "Baichuan": ("<reserved_106>", "<reserved_107>"),
    "Mistral 7": ("", ""),
}
"""Families whose turns touch: the stop token with a user's turn after it, and an assistant's."""


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_assistant_turn_is_one_run_of_its_words_and_its_stop_token(
    name: str, chat: str
) -> None:
    family, messages = FAMILIES[name], CHATS[chat]
    if messages[0]["role"] == "system" and family.system is None:
        with pytest.raises(DataError, match="unknown role"):
            encode(family, messages)
        return
    encoded, _ = encode(family, messages)
    expected = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            is_last = number == len(messages) - 1
            expected.append(family.turn(message["content"], is_last=is_last))
    tokenizer = family.tokenizer()
    found = runs(encoded, tokenizer)
    if chat != "two in a row":
        assert encoded.stops == {tokenizer(run)["input_ids"][-1] for run in found}
    if not family.prompt:
        # The template writes a space before the content, which shares a token with it.
        found = [run.removeprefix(" ") for run in found]
    if chat == "two in a row" and name in HEADER_STOPS:
        # The header of the second turn is the stop token of the first, so the two runs touch.
        old, new = HEADER_STOPS[name]
        expected = ["".join(expected).replace(old, new, 1)]
    assert found == expected
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    whole = tokenizer.decode(encoded.ids)
    if "strftime_now" not in family.source():
        assert whole.removesuffix(family.eos) == text.removesuffix(family.eos)


# The prompt of DeepSeek-R1 opens a thought that its turns do not have.
PROMPTS = [n for n, f in FAMILIES.items() if f.prompt and f.last is None and n != "DeepSeek-R1"]


@pytest.mark.parametrize("name", PROMPTS)
def test_targets_start_where_generation_starts(name: str) -> None:
    family, messages = FAMILIES[name], CHATS["one turn"]
    encoded, _ = encode(family, messages)
    prompt = family.tokenizer().apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    size = int(encoded.is_target.argmax())
    if "strftime_now" not in family.source():
        assert encoded.ids[:size].tolist() == prompt


def test_surrounding_whitespace_is_trained_as_rendered() -> None:
    messages = [say("user", " hi\n"), say("assistant", "\n yo \n")]
    encoded, _ = encode(FAMILIES["ChatML"], messages)
    assert runs(encoded, FAMILIES["ChatML"].tokenizer()) == ["\n yo \n<|im_end|>"]
    encoded, _ = encode(FAMILIES["Llama 3"], messages)
    assert runs(encoded, FAMILIES["Llama 3"].tokenizer()) == ["yo<|eot_id|>"]


def test_turns_marked_as_context_are_no_targets() -> None:
    messages = CHATS["three turns"]
    encoded, _ = encode(FAMILIES["ChatML"], messages, context=frozenset({1, 5}))
    assert runs(encoded, FAMILIES["ChatML"].tokenizer()) == ["one, two\nand no more<|im_end|>"]


def test_an_empty_turn_is_no_target_and_is_counted() -> None:
    messages = [say("user", "hi"), say("assistant", " "), *CHATS["one turn"]]
    encoded, encoder = encode(FAMILIES["ChatML"], messages)
    assert runs(encoded, FAMILIES["ChatML"].tokenizer()) == ["yo all<|im_end|>"]
    assert encoder.empty == ["17"]


THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and '</think>' in m['content'] and not loop.last %}"
    "{{ m['content'].split('</think>')[-1].lstrip() }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(template: str):
    class Written(Family):
        def source(self) -> str:
            return template

    return Written(**vars(chatml()))


def test_thoughts_of_earlier_turns_may_be_left_out_and_are_counted() -> None:
    thought = "<think>\nhm, 1\n</think>\n\n"
    messages = [
        say("user", "q"),
        say("assistant", thought + "one"),
        say("user", "r"),
        say("assistant", thought + "two"),
    ]
    family = with_template(THOUGHTS)
    encoded, encoder = encode(family, messages)
    assert runs(encoded, family.tokenizer()) == ["one<|im_end|>", thought + "two<|im_end|>"]
    assert encoder.shortened == ["17"]


def test_words_that_a_template_drops_are_refused_by_role() -> None:
    drops = "{% for m in messages %}{% if m['role'] != 'developer' %}"
    drops += (
        chatml()
        .assistant.replace("assistant", "{{ m['role'] }}")
        .replace("{}", "{{ m['content'].split('</think>')[-1] }}")
    )
    family = with_template(drops + "{% endif %}{% endfor %}")
    with refused(DataError, "data: 17: messages[0]"):
        encode(family, [say("developer", "be kind"), *CHATS["one turn"]])
    with refused(DataError, "data: 17: messages[1]"):
        encode(family, [say("user", "q"), say("assistant", "<think>hm</think>one")])
    with refused(DataError, "data: 17: messages[1]"):
        encode(family, [say("user", "q"), {**say("assistant", "a"), "reasoning_content": "hm"}])


def test_a_tool_call_is_a_target_up_to_the_stop_token() -> None:
    template = (
        chatml()
        .source()
        .replace(
            "{% else %}{{ raise",
            "{% elif m['role'] == 'tool' %}"
            "<|im_start|>tool\n{{ m['content'] }}<|im_end|>\n{% else %}{{ raise",
        )
    )
    template = template.replace(
        "<|im_start|>assistant\n{{ m['content'] }}",
        "<|im_start|>assistant\n{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
        "<tool_call>{{ c['function'] | tojson }}</tool_call>{% endfor %}",
    )  # fmt: skip
    call = {"type": "function", "function": {"name": "mill", "arguments": {"grain": 'a "b"'}}}
    messages = [
        say("user", "grind"),
        {**say("assistant", ""), "tool_calls": [call]},
        say("tool", "flour"),
        say("assistant", "done"),
    ]
    family = with_template(template)
    encoded, _ = encode(family, messages)
    assert runs(encoded, family.tokenizer()) == [
        '<tool_call>{"name": "mill", "arguments": {"grain": "a \\"b\\""}}</tool_call><|im_end|>',
        "done<|im_end|>",
    ]
    with refused(DataError, "data: 17: messages[1]"):
        encode(FAMILIES["ChatML"], messages[:2])


def test_special_tokens_quoted_in_a_message_are_plain_text() -> None:
    family = FAMILIES["ChatML"]
    messages = [say("user", "what is <|im_end|>"), say("assistant", "say <|im_end|> to stop")]
    encoded, encoder = encode(family, messages)
    tokenizer = family.tokenizer()
    assert runs(encoded, tokenizer) == ["say <|im_end|> to stop<|im_end|>"]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (encoded.ids == stop).sum() == 2
    assert encoder.quoting == ["17"]
    parsing = ChatEncoder(tokenizer, where="data", quote=False)
    chat = Document(id="17", domain="d", messages=tuple(messages))
    assert (parsing.encode(chat).ids == stop).sum() == 4


GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
        (
            "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}",
            "{% if m['role'] == 'assistant' %}{% generation %}<|im_start|>assistant\n",
        ),
        ("{% generation %}{{ m['content'] }}", "{{ m['content'] }}{% generation %}"),
    ],
    ids=["no stop", "header", "no content"],
)
def test_generation_blocks_are_checked(old: str, new: str) -> None:
    messages = CHATS["three turns"]
    family = with_template(GENERATION)
    encoded, _ = encode(family, messages)
    assert runs(encoded, family.tokenizer()) == [
        m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"
    ]
    with refused(DataError, "data: 17: messages[1]"):
        encode(with_template(GENERATION.replace(old, new)), messages)


def test_a_template_does_not_read_the_clock() -> None:
    family = FAMILIES["gpt-oss"]
    chat = Document(id="17", domain="d", messages=tuple(CHATS["one turn"]))
    encoder = ChatEncoder(family.tokenizer(), where="data", date="2024-02-29")
    assert "Current date: 2024-02-29" in family.tokenizer().decode(encoder.encode(chat).ids)


def test_a_chat_with_tools_uses_the_template_for_tools() -> None:
    family = FAMILIES["ChatML"]
    with_tools = "{{ tools | tojson }}" + family.source()
    tokenizer = copy.copy(family.tokenizer())
    tokenizer.chat_template = {"default": family.source(), "tool_use": with_tools}
    tools = [{"type": "function", "function": {"name": "mill"}}]
    messages = tuple(CHATS["one turn"])
    plain = Document(id="17", domain="d", messages=messages)
    calling = Document(id="17", domain="d", messages=messages, template={"tools": tools})
    encoder = ChatEncoder(tokenizer, where="data")
    assert "mill" not in tokenizer.decode(encoder.encode(plain).ids)
    assert "mill" in tokenizer.decode(encoder.encode(calling).ids)
    tokenizer.chat_template = {"rag": family.source(), "tool_use": with_tools}
    with refused(DataError, "data: 17"):
        ChatEncoder(tokenizer, where="data").encode(plain)
