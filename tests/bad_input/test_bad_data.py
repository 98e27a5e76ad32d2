"""Texts that cannot be learned from, from the command line: rows 57 to 72 and 81 of the catalogue."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import tiny
from bad_input_bench import Bench
from collegium.data.encode import split_of
from collegium.data.sources import Document

FILE = Path("zoo/code.jsonl")
HERE = f"data.train[1]: {FILE}"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def rows(*values: object) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def texts(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"text": f"{tiny.TEXT[0]} {i}"} for i in range(start, start + count)]


def chats(count: int, *, turns: Sequence[dict[str, str]] = CHAT) -> list[dict[str, object]]:
    return [{"messages": [{"role": "system", "content": f"Be {i}."}, *turns]} for i in range(count)]


GOOD = rows(*texts(60))
CASES: dict[str, tuple[bytes, str]] = {
    "58 empty": (b"", f"{HERE}: 0 rows; must hold at least one document"),
    "59 only empty texts": (
        rows({"text": ""}, {"text": None}, {"text": " \n"}),
        f"{HERE}: 3 of 3 rows have an empty `text`; must hold text; set `text_column` to the field that does",
    ),
    "61 latin-1": (
        GOOD + b'{"text": "caf\xe9"}\n',
        f"{HERE}:61: byte 0xE9 at offset {len(GOOD) + 13:,} is not UTF-8; looks like latin-1; convert it with "
        "`iconv -f latin1 -t utf8`",
    ),
    "63 NUL": (
        GOOD + rows({"text": "ab\0c"}),
        f"{HERE}:61: NUL character at column 3 of `text`; remove it",
    ),
    "63 lone surrogate": (
        GOOD + b'{"text": "abc\\ud800"}\n',
        f"{HERE}:61: lone surrogate U+D800 at column 4 of `text`; must be whole characters; remove it",
    ),
    "64 last line cut": (
        GOOD + b'{"text": "and so o',
        f"{HERE}:61: ends inside a record; was the copy cut short?",
    ),
    "64 a line in the middle": (
        b'{"text": "and so o\n' + GOOD,
        f"{HERE}:1: not JSON at column 19 (Invalid control character at); must be one object a line",
    ),
    "65 a number": (
        GOOD + rows({"text": 5}),
        f"{HERE}:61: `text` is a number (5); must be text",
    ),
    "65 a list": (rows([1]), f"{HERE}:1: record is a list; must be an object with named fields"),
    "65 missing later": (
        GOOD + rows({"body": "a"}),
        f"{HERE}:61: field `text` is missing (has: body)",
    ),
    "65 missing": (
        rows({"body": "a", "id": 3}),
        f"{HERE}:1: field `text` is missing (has: body, id); must have `messages`, `prompt` and "
        "`completion`, or a text; set `text_column`",
    ),
    "66 long line": (
        rows({"text": "a" * 9_000_000}),
        f"{HERE}:1: line of 9.0 MB; must be at most 8.0 MB; raise `max_line_bytes`",
    ),
    "69 two turns": (
        rows(*chats(60), *chats(1, turns=[*CHAT, CHAT[1]])),
        f"{HERE}:61: two `assistant` turns in a row; must take turns; join them into one",
    ),
    "69 role": (
        rows({"messages": [{"role": "robot", "content": "x"}]}),
        f"{HERE}:1: unknown role `robot`; must be one of system, developer, user, assistant, tool",
    ),
    "69 content": (
        rows({"messages": [{"role": "user", "content": None}]}),
        f"{HERE}:1: content of messages[0] is null; must be text",
    ),
    "57 no template": (
        rows(*chats(60)),
        "TRAIN: `messages` given and the tokenizer has no chat template; must have one; use a tokenizer with "
        "a template, or rows of `prompt` and `completion`",
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_corpus(case: str, bench: Bench) -> None:
    content, expected = CASES[case]
    FILE.write_bytes(content)
    if expected.startswith("TRAIN"):
        bench.refused_at(expected.removeprefix("TRAIN"))
    else:
        bench.refused(expected)


@pytest.mark.parametrize("case", ["58 empty", "61 latin-1", "64 last line cut"])
def test_check_says_the_same(case: str, bench: Bench) -> None:
    content, expected = CASES[case]
    FILE.write_bytes(content)
    bench.refused(expected, command="check")


@pytest.mark.parametrize("command", ["run", "check"])
def test_81_a_row_that_names_no_teacher(command: str, bench: Bench) -> None:
    FILE.write_bytes(
        rows(*({**row, "by": "code"} for row in texts(60)), {"text": "a", "by": "cod"})
    )
    overrides = (
        "data.train.1.teacher_column=by",
        "fusion={weighting: {name: route, default: scripture}}",
    )
    bench.refused(
        f"{HERE}:61: `by`: got `cod`; must be the name of a teacher, or null; did you mean `code`?",
        *overrides,
        command=command,
    )


@pytest.mark.parametrize(
    ("path", "weighting"),
    [
        ("domains", "{name: route, default: code, domains: {cod: code}}"),
        (
            "weights",
            "{name: domain_weights, weights: {cod: {code: 1, scripture: 0}}, default: {code: 1, scripture: 0}}",
        ),
    ],
)
def test_81_a_domain_that_does_not_occur(path: str, weighting: str, bench: Bench) -> None:
    bench.refused(
        f"fusion.weighting.{path}: got `cod`; must be a domain of the data; did you mean `code`?",
        f"fusion={{weighting: {weighting}}}",
    )


def test_81_what_routes_nothing_is_said(bench: Bench) -> None:
    lines = bench.accepted("fusion={weighting: {name: route, default: code}}")
    assert lines[-1] == (
        "warning: fusion.weighting: route without `domains` and without a `teacher_column` sends every row to `code`"
    )
    FILE.write_bytes(rows(*({**row, "by": None} for row in texts(60))))
    lines = bench.accepted("data.train.1.teacher_column=by", "fusion={weighting: uniform}")
    assert lines[-1] == (
        "warning: data.train[1].teacher_column: has no effect; only the weighting `route` reads it"
    )


def template(bench: Bench, text: str) -> None:
    """Let the tokenizer of all models have a chat template, and the corpus be chats."""
    bench.edit(
        "zoo/scripture/tokenizer_config.json", lambda value: value.update(chat_template=text)
    )
    FILE.write_bytes(rows(*chats(60)))
    Path("zoo/scripture.jsonl").write_bytes(rows(*chats(60)))


def test_a_good_template_passes(bench: Bench) -> None:
    template(bench, tiny.CHAT_TEMPLATE)
    Path("zoo/scripture.jsonl").write_bytes(rows(*texts(60)))
    assert bench.accepted()[0] == "vocabulary: 400 tokens"


def test_57_a_template_that_does_not_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collegium.data.chat.PROBE_SECONDS", 0.3)
    template(bench, ENDLESS)
    bench.refused(
        "data.train: tokenizer: its chat template took more than 0.3 s for two short messages; must end; "
        "refused (tokenizer_config.json or chat_template.jinja)"
    )


def test_57_a_template_that_reaches_for_python(bench: Bench) -> None:
    template(bench, "{{ messages.__class__.__mro__ }}")
    bench.refused_at(
        ": the chat template fails (SecurityError: access to attribute '__class__' of 'list' object is "
        "unsafe.); must render every row; mend the row or the template"
    )


def test_57_a_template_without_a_stop_token(bench: Bench) -> None:
    template(bench, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    bench.refused_at(
        ": the stop token is never supervised: an assistant turn ends with 'yo\\n'; must end with the eos "
        "token or the template's end-of-turn token, or the student never learns to stop; put that token "
        "inside the template's assistant turn (before {% endgeneration %})"
    )


def test_60_less_than_one_step(bench: Bench) -> None:
    windows = bench.accepted()[3].split(" windows")[0].split()[-1]
    bench.refused(
        f"data.train: {windows} windows, one optimizer step needs 4096; give more text, or lower "
        "train.per_device_train_batch_size or train.gradient_accumulation_steps",
        "train.per_device_train_batch_size=1024",
        "train.gradient_accumulation_steps=4",
    )


def test_60_a_part_without_a_document(bench: Bench) -> None:
    bench.refused(
        "data.calibration: none of 120 documents fell into this part; must hold at least one; raise "
        "`calibration_fraction`, give `calibration` sources, or cut the texts finer with `split_on: "
        "blank_line`",
        "data.calibration_fraction=1e-9",
    )


def test_62_a_mark_and_carriage_returns_are_accepted(bench: Bench) -> None:
    before = bench.accepted()
    FILE.write_bytes(b"\xef\xbb\xbf" + FILE.read_bytes().replace(b"\n", b"\r\n"))
    assert bench.accepted()[:-1] == before[:-1]


def pairs(length: Callable[[int], int]) -> None:
    """Make both corpora prompts of three letters with completions of so many."""
    for path, offset in ((FILE, 0), (Path("zoo/scripture.jsonl"), 60)):
        made = [
            {"prompt": f"{i:03d}", "completion": "y" * length(i)}
            for i in range(offset, offset + 60)
        ]
        path.write_bytes(rows(*made))


def test_67_samples_longer_than_a_window(bench: Bench) -> None:
    pairs(lambda i: 90 if i == 4 else 4)
    bench.refused(
        "data.train: 1 samples exceed 32 tokens (longest 94: zoo/code.jsonl:5); must fit in one window; "
        "raise `max_length` or set `truncate` to right, left or drop",
        "data.truncate=error",
    )


def test_67_what_was_cut_is_told(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    pairs(lambda i: 90 if i == 4 else 4)
    assert bench.invoke("check", "run.yaml").exit_code == 0
    assert [record.getMessage() for record in caplog.records] == [
        "data.train: 1 samples exceed 32 tokens (longest 94) and were cut (right)"
    ]


def test_68_nothing_to_learn_from(bench: Bench) -> None:
    for path in (FILE, Path("zoo/scripture.jsonl")):
        made = [{"prompt": f"{path}{i:03d} " + "xyz" * 30, "completion": "y"} for i in range(60)]
        path.write_bytes(rows(*made))
    result = bench.invoke("run", "run.yaml")
    count, _, rest = result.stderr.removeprefix("error: data.train: ").partition(" ")
    name, _, tail = rest.removeprefix("samples have no token to learn from (first: id ").partition(
        ")"
    )
    assert 50 < int(count) < 120
    assert name.startswith("zoo/")
    assert tail == (
        "; must hold a completion or an assistant turn that is not cut off; look at the rows, "
        "`max_length` and `truncate`\n"
    )
    assert (result.exit_code, result.stdout, Path("out").exists()) == (2, "", False)


def test_70_train_rows_in_the_validation_set(bench: Bench) -> None:
    kept = FILE.read_bytes().splitlines(keepends=True)
    part = split_of(
        Document(id="", domain="", text=json.loads(kept[4])["text"]),
        seed=0,
        calibration=0.2,
        validation=0.0,
    )
    Path("held_out.jsonl").write_bytes(rows(*texts(3, start=900)) + kept[4])
    bench.refused(
        f"data.validation: 1 of 4 validation documents also occur in {part} (first: held_out.jsonl:4); must "
        "be disjoint; remove them from one of the two",
        "data.validation=[{path: held_out.jsonl}]",
    )


def test_71_not_gzip(bench: Bench) -> None:
    Path("zoo/code.jsonl.gz").write_bytes(GOOD)
    bench.refused(
        'data.train[1]: zoo/code.jsonl.gz: does not start with the gzip magic (found `{"t`); must be '
        "compressed with gzip; rename it to .jsonl if it is plain text",
        "data.train.1.path=zoo/code.jsonl.gz",
    )


def test_71_gzip_cut_short(bench: Bench) -> None:
    Path("zoo/code.jsonl.gz").write_bytes(gzip.compress(GOOD)[:-9])
    bench.refused(
        "data.train[1]: zoo/code.jsonl.gz: ends inside the gzip stream; was the copy cut short?",
        "data.train.1.path=zoo/code.jsonl.gz",
    )


def test_71_not_parquet(bench: Bench) -> None:
    Path("zoo/code.parquet").write_bytes(GOOD)
    result = bench.invoke("run", "run.yaml", "data.train.1.path=zoo/code.parquet")
    start = "error: data.train[1]: zoo/code.parquet: not a whole parquet file ("
    assert result.stderr.startswith(start)
    assert result.stderr.endswith("); copy it again\n")
    assert (result.exit_code, Path("out").exists()) == (2, False)


def test_71_unknown_ending(bench: Bench) -> None:
    Path("zoo/code.csv").write_text("text\na\n")
    bench.refused(
        "data.train[1]: zoo/code.csv: unknown ending `.csv`; must be one of .txt, .text, .md, .jsonl, "
        ".ndjson, .jsonl.gz, .parquet; set `format` if the content is one of these",
        "data.train.1.path=zoo/code.csv",
    )


def test_71_no_such_file(bench: Bench) -> None:
    bench.refused(
        "data.train[1]: zoo/c0de.jsonl: no such file; zoo holds: code.jsonl, code/, "
        "scripture.jsonl, scripture/",
        "data.train.1.path=zoo/c0de.jsonl",
    )


def test_72_a_compressed_line_without_end(bench: Bench) -> None:
    with gzip.open("zoo/bomb.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(110):
            file.write(b" " * 1_000_000)
    bench.refused(
        "data.train[1]: zoo/bomb.jsonl.gz:1: line of more than 100.3 MB; must be at most 8.0 MB; raise "
        "`max_line_bytes`",
        "data.train.1.path=zoo/bomb.jsonl.gz",
    )
