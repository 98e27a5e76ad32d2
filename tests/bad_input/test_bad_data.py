"""Unusable corpora, from the command line: rows 57 to 72 and 81 of the catalogue."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import tiny
from bad_input_bench import Bench
from refusals import check_message

FILE = Path("zoo/code.jsonl")
HERE = f"data.train[1]: {FILE}"
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def rows(*values: object) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def texts(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"text": f"{tiny.TEXT[0]} {i}"} for i in range(start, start + count)]


def chats(count: int, *, turns: Sequence[dict[str, str]] = CHAT) -> list[dict[str, object]]:
    return [{"messages": [{"role": "system", "content": f"Be {i}."}, *turns]} for i in range(count)]


GOOD = rows(*texts(60))
CASES: dict[str, tuple[bytes, str]] = {
    "58 empty": (b"", HERE),
    "59 only empty texts": (rows({"text": ""}, {"text": None}, {"text": " \n"}), HERE),
    "61 latin-1": (GOOD + b'{"text": "caf\xe9"}\n', f"{HERE}:61"),
    "63 NUL": (GOOD + rows({"text": "ab\0c"}), f"{HERE}:61"),
    "63 lone surrogate": (GOOD + b'{"text": "abc\\ud800"}\n', f"{HERE}:61"),
    "64 last line cut": (GOOD + b'{"text": "and so o', f"{HERE}:61"),
    "64 a line in the middle": (b'{"text": "and so o\n' + GOOD, f"{HERE}:1"),
    "65 a number": (GOOD + rows({"text": 5}), f"{HERE}:61"),
    "65 a list": (rows([1]), f"{HERE}:1"),
    "65 missing later": (GOOD + rows({"body": "a"}), f"{HERE}:61"),
    "65 missing": (rows({"body": "a", "id": 3}), f"{HERE}:1"),
    "66 long line": (rows({"text": "a" * 9_000_000}), f"{HERE}:1"),
    "69 role": (rows({"messages": [{"role": "robot", "content": "x"}]}), f"{HERE}:1"),
    "69 content": (rows({"messages": [{"role": "user", "content": None}]}), f"{HERE}:1"),
    "57 no template": (rows(*chats(60)), ""),
}
"""Content of the corpus, and the path of the refusal; empty for whichever row is read first."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_corpus(case: str, bench: Bench) -> None:
    content, where = CASES[case]
    FILE.write_bytes(content)
    if where:
        bench.refused(where)
    else:
        bench.refused_at(":")


@pytest.mark.parametrize("case", ["58 empty", "61 latin-1", "64 last line cut"])
def test_check_refuses_as_run_does(case: str, bench: Bench) -> None:
    content, where = CASES[case]
    FILE.write_bytes(content)
    message = bench.refused(where, command="check")
    assert bench.invoke("run", "run.yaml").stderr == f"error: {message}\n"


@pytest.mark.parametrize("command", ["run", "check"])
def test_81_a_row_with_an_unknown_teacher(command: str, bench: Bench) -> None:
    FILE.write_bytes(
        rows(*({**row, "by": "code"} for row in texts(60)), {"text": "a", "by": "cod"})
    )
    overrides = (
        "data.train.1.teacher_column=by",
        "fusion={weighting: {name: route, default: scripture}}",
    )
    bench.refused(f"{HERE}:61: `by`", *overrides, command=command)


@pytest.mark.parametrize(
    ("path", "weighting"),
    [
        ("domains", "{name: route, default: code, domains: {cod: code}}"),
        (
            "weights",
            "{name: domain_weights, weights: {cod: {code: 1, scripture: 0}}, "
            "default: {code: 1, scripture: 0}}",
        ),
    ],
    ids=["domains", "weights"],
)
def test_81_a_domain_that_does_not_occur(path: str, weighting: str, bench: Bench) -> None:
    bench.refused(f"fusion.weighting.{path}", f"fusion={{weighting: {weighting}}}")


def test_81_a_route_without_effect_is_a_warning(bench: Bench) -> None:
    lines = bench.accepted("fusion={weighting: {name: route, default: code}}")
    check_message(lines[-1], "warning: fusion.weighting")
    FILE.write_bytes(rows(*({**row, "by": None} for row in texts(60))))
    lines = bench.accepted("data.train.1.teacher_column=by", "fusion={weighting: uniform}")
    check_message(lines[-1], "warning: data.train[1].teacher_column")


def template(bench: Bench, text: str) -> None:
    """Give the tokenizer of all models a chat template, and make the corpora chats."""
    bench.edit(
        "zoo/scripture/tokenizer_config.json", lambda value: value.update(chat_template=text)
    )
    FILE.write_bytes(rows(*chats(60)))
    Path("zoo/scripture.jsonl").write_bytes(rows(*chats(60)))


def test_a_good_template_passes(bench: Bench) -> None:
    template(bench, tiny.CHAT_TEMPLATE)
    Path("zoo/scripture.jsonl").write_bytes(rows(*texts(60)))
    assert bench.accepted()[0] == "vocabulary: 400 tokens"


def test_57_a_template_that_reaches_into_python(bench: Bench) -> None:
    template(bench, "{{ messages.__class__.__mro__ }}")
    bench.refused_at(":")


def test_57_a_template_without_a_stop_token(bench: Bench) -> None:
    template(bench, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    bench.refused_at(":")


def test_60_less_than_one_step_is_a_warning(bench: Bench) -> None:
    overrides = ("train.per_device_train_batch_size=1024", "train.gradient_accumulation_steps=4")
    (line,) = (line for line in bench.accepted(*overrides) if line.startswith("warning: "))
    assert "one optimizer step takes 4096; every step sees all of them" in line


def test_60_a_part_without_a_document(bench: Bench) -> None:
    bench.refused("data.calibration", "data.calibration_fraction=1e-9")


def test_62_a_byte_order_mark_and_crlf_are_accepted(bench: Bench) -> None:
    before = stable_lines(bench)
    FILE.write_bytes(b"\xef\xbb\xbf" + FILE.read_bytes().replace(b"\n", b"\r\n"))
    assert stable_lines(bench) == before


def stable_lines(bench: Bench) -> list[str]:
    """Lines of `check` that do not depend on the load of the machine."""
    volatile = ("memory: ", "time: ", "disk: ")
    return [line for line in bench.accepted() if not line.startswith(volatile)]


def pairs(length: Callable[[int], int]) -> None:
    """Make both corpora prompts of three letters, with completions of `length(i)` letters."""
    for path, offset in ((FILE, 0), (Path("zoo/scripture.jsonl"), 60)):
        samples = [
            {"prompt": f"{i:03d}", "completion": "y" * length(i)}
            for i in range(offset, offset + 60)
        ]
        path.write_bytes(rows(*samples))


def test_67_samples_longer_than_a_window(bench: Bench) -> None:
    pairs(lambda i: 90 if i == 4 else 4)
    bench.refused("data.train", "data.truncate=error")


def test_67_truncation_is_a_warning(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    pairs(lambda i: 90 if i == 4 else 4)
    assert bench.invoke("check", "run.yaml").exit_code == 0
    (record,) = caplog.records
    check_message(record.getMessage(), "data.train")


def test_68_nothing_to_learn_from(bench: Bench) -> None:
    for path in (FILE, Path("zoo/scripture.jsonl")):
        prompts = [f"{path}{i:03d} " + "xyz" * 30 for i in range(60)]
        path.write_bytes(rows(*({"prompt": prompt, "completion": "y"} for prompt in prompts)))
    bench.refused("data.train")


def test_70_train_rows_in_the_validation_set(bench: Bench) -> None:
    train_row = FILE.read_bytes().splitlines(keepends=True)[4]
    Path("held_out.jsonl").write_bytes(rows(*texts(3, start=900)) + train_row)
    bench.refused("data.validation", "data.validation=[{path: held_out.jsonl}]")


def test_71_not_gzip(bench: Bench) -> None:
    Path("zoo/code.jsonl.gz").write_bytes(GOOD)
    bench.refused("data.train[1]: zoo/code.jsonl.gz", "data.train.1.path=zoo/code.jsonl.gz")


def test_71_gzip_cut_short(bench: Bench) -> None:
    Path("zoo/code.jsonl.gz").write_bytes(gzip.compress(GOOD)[:-9])
    bench.refused("data.train[1]: zoo/code.jsonl.gz", "data.train.1.path=zoo/code.jsonl.gz")


def test_71_not_parquet(bench: Bench) -> None:
    Path("zoo/code.parquet").write_bytes(GOOD)
    # The reasons that pyarrow gives differ between its versions.
    bench.refused(
        "data.train[1]: zoo/code.parquet", "data.train.1.path=zoo/code.parquet", volatile=r"\(.*\)"
    )


def test_71_unknown_extension(bench: Bench) -> None:
    Path("zoo/code.xlsx").write_text("text\na\n")
    bench.refused("data.train[1]: zoo/code.xlsx", "data.train.1.path=zoo/code.xlsx")


def test_71_no_such_file(bench: Bench) -> None:
    bench.refused("data.train[1]: zoo/c0de.jsonl", "data.train.1.path=zoo/c0de.jsonl")


def test_72_an_endless_compressed_line(bench: Bench) -> None:
    # More than the 100 MB up to which the length of a line is counted.
    with gzip.open("zoo/bomb.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(110):
            file.write(b" " * 1_000_000)
    bench.refused("data.train[1]: zoo/bomb.jsonl.gz:1", "data.train.1.path=zoo/bomb.jsonl.gz")
