"""Chat templates in a process of their own: equal text, a deadline, a fixed date, no leftovers."""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime
from typing import Any

import pytest

import tiny
from collegium.data import render
from collegium.data.render import TemplateRenderer

NOW = datetime(2024, 7, 26, 12)
CHAT = [{"role": "user", "content": "héllo 数"}, {"role": "assistant", "content": "yo"}]
ROW = {"messages": CHAT}
LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
SIMPLE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def errors(template: str, rows: list[dict[str, Any]], **options: Any) -> list[str | None]:
    renderer = TemplateRenderer(template, now=NOW, **options)
    return [one.error for one in renderer.render([dict(row) for row in rows])]


@pytest.mark.parametrize(
    "template",
    [
        tiny.CHAT_TEMPLATE,
        SIMPLE,
        "{{ bos_token }}{{ eos_token }}{{ messages | tojson }}{% if tools %}{{ tools }}{% endif %}",
        "{%- for m in messages -%}{% if loop.last %}{% break %}{% endif %}{{ m.content | trim }}"
        "{%- endfor %}{% set ns = namespace(a=1) %}{{ ns.a }}{{ enable_thinking }}",
    ],
)
def test_the_text_is_that_of_the_tokenizer(template: str) -> None:
    tokenizer = tiny.tiny_tokenizer(400, chat=True)
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        tokens = tokenizer.special_tokens_map
        renderer = TemplateRenderer(template, now=NOW, special_tokens=tokens)
        rows: list[dict[str, Any]] = [
            {"messages": CHAT},
            {"messages": CHAT[:1], "add_generation_prompt": True},
            {"messages": CHAT * 3, "tools": [{"type": "function"}], "enable_thinking": False},
            {"messages": [{"role": "user", "content": "a\ud800\x00\u2028b\n"}]},
        ]
        expected = [
            tokenizer.apply_chat_template(row["messages"], tokenize=False, **{
                key: value for key, value in row.items() if key != "messages"
            })
            for row in rows
        ]  # fmt: skip
        for _ in range(2):  # one worker serves all calls
            rendered = renderer.render([dict(row) for row in rows])
            assert [one.text for one in rendered] == expected
            assert {one.error for one in rendered} == {None}
    finally:
        tokenizer.chat_template = before


def test_generation_blocks_give_spans() -> None:
    renderer = TemplateRenderer(tiny.CHAT_TEMPLATE, now=NOW)
    (rendered,) = renderer.render([{"messages": CHAT * 2}])
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["yo<|end|>"] * 2


def test_the_clock_of_a_template_stands_still() -> None:
    template = "{{ strftime_now('%d %b %Y %H:%M') }}"
    for now in (NOW, datetime(2031, 5, 2, 3, 4)):
        renderer = TemplateRenderer(template, now=now)
        texts = [one.text for one in renderer.render([dict(ROW), dict(ROW)])]
        assert texts == [now.strftime("%d %b %Y %H:%M")] * 2


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages.__class__.a }}", "fails (SecurityError: "),
        ("{{ ''.__class__.__mro__ }}", "fails (SecurityError: "),
        ("{{ raise_exception('no system role') }}", "fails (TemplateError: no system role)"),
        ("{{ messages[9].content }}", "fails (UndefinedError: "),
        ("{% for %}", "fails (TemplateSyntaxError: "),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "fails (RecursionError: "),
        ("{{ 1 / 0 }}", "fails (ZeroDivisionError: "),
        ("{% include '/etc/passwd' %}", "fails (TypeError: "),
        ("{{ range(999999999) | list }}", "fails (OverflowError: "),
        ("{{ 'x' * 20000000000 }}", "fails (MemoryError: "),
        ("{{ 'x' * 80000000 }}", "writes 80,000,000 characters; must write at most 67,108,864"),
    ],
)
def test_a_template_that_fails_is_an_error_of_its_row(template: str, problem: str) -> None:
    good = "{% if messages | length == 1 %}ok{% else %}" + template + "{% endif %}"
    (error,) = errors(template, [ROW])
    assert (error or "").startswith(problem), error
    if "SyntaxError" not in problem and "Memory" not in problem:
        first, other, last = errors(good, [{"messages": CHAT[:1]}, ROW, {"messages": CHAT[:1]}])
        assert (first, last) == (None, None)
        assert (other or "").startswith(problem)


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{{ 9 ** (9 ** 9) }}",  # in the compiler
        "{% for m in messages %}{{ 'x' | replace('x', 'xx' * 9999) | length }}" + LOOP
        + "{% endfor %}",
    ],
    ids=["loop", "constant", "late"],
)  # fmt: skip
def test_a_template_that_does_not_end_is_stopped(template: str) -> None:
    started = time.monotonic()
    late = "{% if messages | length > 1 %}" + template + "{% endif %}ok"
    rows = [{"messages": CHAT[:1]}, ROW, {"messages": CHAT[:1]}]
    assert errors(template, [ROW], seconds=0.5) == ["does not end within 0.5 s"]
    if "**" not in template:
        problem = "does not end within 0.5 s"
        assert errors(late, rows, seconds=0.5) == [None, problem, problem]
    assert time.monotonic() - started < 60


def test_many_slow_rows_exceed_the_deadline_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "SECONDS_PER_ROW", 0.0)
    slow = "{% for i in range(99999) %}{% for j in range(9) %}{% endfor %}{% endfor %}"
    problems = errors(slow, [ROW] * 1000, seconds=1.0)
    assert problems[-1] == "does not end within 1 s"


def test_one_process_serves_all_renderers_and_none_is_left_behind() -> None:
    renderer = TemplateRenderer(SIMPLE, now=NOW)
    assert renderer.render([dict(ROW)])[0].error is None
    number = _process()
    assert errors(tiny.CHAT_TEMPLATE, [ROW]) == [None]
    assert _process() == number
    render.close()
    assert not _is_alive(number)
    assert renderer.render([dict(ROW)])[0].error is None
    os.kill(_process(), signal.SIGKILL)
    (rendered,) = renderer.render([dict(ROW)])
    assert rendered.error == "exhausts its memory, or ends its process"
    assert errors(SIMPLE, [ROW]) == [None]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_starts_a_worker_of_its_own() -> None:
    renderer = TemplateRenderer(SIMPLE, now=NOW)
    assert renderer.render([dict(ROW)])[0].error is None
    number = _process()
    child = os.fork()
    if child == 0:
        (rendered,) = renderer.render([dict(ROW)])
        is_other = rendered.error is None and _process() != number
        render.close()
        os._exit(0 if is_other else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert renderer.render([dict(ROW)])[0].error is None
    assert _process() == number


def _process() -> int:
    (worker,) = render._workers
    detached = worker.kill.peek()
    assert detached is not None
    return detached[2][0].pid


def _is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True
