"""Reading documents: every format, and the exact words of every refusal."""

import gzip
import json
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from collegium.data.sources import Document, SourceOptions, check_sources, read_documents
from collegium.errors import DataError

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path, **options):
    return list(read_documents(SourceOptions(path=str(path), **options), where="data.train[0]"))


def message(path, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return str(caught.value)


def test_exactly_one_of_path_and_hub():
    for wrong in ({}, {"path": "a", "hub": "b"}):
        with pytest.raises(ValidationError, match="exactly one of `path` and `hub`"):
            SourceOptions(**wrong)


def test_text_file_with_mark_and_crlf(tmp_path):
    path = write(tmp_path, "novel.txt", b"\xef\xbb\xbfone\r\ntwo\r\n\r\nthree\r\n")
    (whole,) = read(path)
    assert (whole.text, whole.domain, whole.id) == ("one\ntwo\n\nthree\n", "novel", str(path))
    assert [(d.text, d.id) for d in read(path, split_on="blank_line")] == [
        ("one\ntwo", f"{path}:1"),
        ("three\n", f"{path}:4"),
    ]
    assert [(d.text, d.id) for d in read(path, split_on="line", domain="x", limit=3)] == [
        ("one", f"{path}:1"),
        ("two", f"{path}:2"),
        ("three", f"{path}:4"),
    ]


def test_three_kinds_of_rows_in_three_formats(tmp_path):
    rows = [
        {"text": "a"},
        {"prompt": "q", "completion": "r"},
        {"messages": CHAT, "text": "not this"},
    ]
    expected = [
        {"text": "a"},
        {"prompt": "q", "completion": "r"},
        {"messages": tuple(CHAT)},
    ]
    for number, row in enumerate(rows):
        plain = write(tmp_path, f"d{number}.jsonl", "\ufeff" + lines(row))
        zipped = tmp_path / f"d{number}.jsonl.gz"
        zipped.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        table = tmp_path / f"d{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), table)
        for path in (plain, zipped, table):
            assert read(path) == [Document(id=f"{path}:1", domain=f"d{number}", **expected[number])]


def test_folder_glob_and_own_column(tmp_path):
    write(tmp_path, "b.jsonl", lines({"body": "2"}))
    write(tmp_path, "a.jsonl", lines({"body": "1"}))
    write(tmp_path, "README", "x")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        documents = read(path, text_column="body")
        assert [d.text for d in documents] == ["1", "2"]
        assert {d.domain for d in documents} == {tmp_path.name}


def test_a_row_may_name_its_teacher(tmp_path):
    rows = [
        {"text": "a", "by": "law"},
        {"text": "b", "by": None},
        {"text": " ", "by": "law"},
        {"text": "c", "by": ""},
    ]
    path = write(tmp_path, "train.jsonl", lines(*rows))
    assert [d.teacher for d in read(path, teacher_column="by")] == ["law", None, ""]
    assert [d.teacher for d in read(path)] == [None] * 3
    chats = write(tmp_path, "chat.jsonl", lines({"messages": CHAT, "by": "law"}))
    assert [d.teacher for d in read(chats, teacher_column="by")] == ["law"]
    text = message(path, teacher_column="bi")
    assert "train.jsonl:1: field `bi` is missing (has: text, by)" in text
    write(tmp_path, "train.jsonl", lines({"text": "a", "by": 3}))
    assert "train.jsonl:1: `by` is a number (3); must be text" in message(path, teacher_column="by")
    text = message(write(tmp_path, "a.txt", "hello"), teacher_column="by")
    assert "a.txt: `teacher_column` given for a text file; must be rows of named fields" in text


def test_blank_rows_are_left_out_and_limit_counts_documents(tmp_path):
    path = write(tmp_path, "t.jsonl", lines({"text": None}, {"text": " "}, {"text": "a"}) + "\n")
    assert [d.id for d in read(path, limit=1)] == [f"{path}:3"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train.jsonl", "", "train.jsonl: 0 rows; must hold"),
        ("train.txt", "", "train.txt: 0 rows; must hold"),
        (
            "train.jsonl",
            lines({"text": ""}, {"text": None}),
            "train.jsonl: 2 of 2 rows have an empty `text`",
        ),
        (
            "train.jsonl",
            lines({"text": "a"}) + '{"text": "b',
            "train.jsonl:2: ends inside a record; was the copy cut short?",
        ),
        ("train.jsonl", lines({"text": "a"}) + '{"text": "b"', "train.jsonl:2: ends inside a rec"),
        ("train.jsonl", lines({"text": "a"}) + '{"text": nu', "train.jsonl:2: ends inside a rec"),
        (
            "train.jsonl",
            lines({"text": "a"}).encode() + '{"text": "é'.encode()[:-1],
            "train.jsonl:2: ends inside a record",
        ),
        (
            "train.jsonl",
            '{"text": "a\n' + lines({"text": "b"}),
            "train.jsonl:1: not JSON at column",
        ),
        (
            "train.jsonl",
            lines({"text": "a"}).encode() + b'{"text": "caf\xe9 x"}\n',
            "train.jsonl:2: byte 0xE9 at offset 27 is not UTF-8; looks like latin-1; "
            "convert it with `iconv -f latin1 -t utf8`",
        ),
        ("a.txt", b"ab\ncaf\xe9 x", "a.txt:2: byte 0xE9 at offset 6 is not UTF-8"),
        ("train.jsonl", "[1]\n", "train.jsonl:1: record is a list; must be an object"),
        ("train.jsonl", lines({"text": 5}), "train.jsonl:1: `text` is a number (5); must be text"),
        ("train.jsonl", lines({"text": ["a"]}), "train.jsonl:1: `text` is a list; must be text"),
        (
            "train.jsonl",
            lines({"text": "a"}, {"body": "b"}),
            "train.jsonl:2: field `text` is missing (has: body)",
        ),
        (
            "train.jsonl",
            lines({"body": "b", "id": 1}),
            "train.jsonl:1: field `text` is missing (has: body, id); must have `messages`",
        ),
        (
            "train.jsonl",
            lines({"text": "a"}, {"text": "ab\0c"}),
            "train.jsonl:2: NUL character at column 3 of `text`; remove it",
        ),
        (
            "train.jsonl",
            '{"text": "abc\\ud800"}\n',
            "train.jsonl:1: lone surrogate U+D800 at column 4 of `text`",
        ),
        ("a.txt", "ab\0c", "a.txt: NUL character at column 3 of the text"),
        (
            "train.jsonl.gz",
            '{"text": "a"}\n',
            'train.jsonl.gz: does not start with the gzip magic (found `{"t`)',
        ),
        (
            "train.jsonl.gz",
            gzip.compress(lines({"text": "a" * 99}).encode(), mtime=0)[:-9],
            "train.jsonl.gz: ends inside the gzip stream; was the copy cut short?",
        ),
        ("train.parquet", "PAR1 no", "train.parquet: not a whole parquet file"),
        ("train.csv", "a,b", "train.csv: unknown ending `.csv`; must be one of .txt"),
        ("c.jsonl", lines({"prompt": "", "completion": "b"}), "c.jsonl:1: `prompt` is empty"),
        (
            "chat.jsonl",
            lines({"messages": [*CHAT, {"role": "assistant", "content": "x"}]}),
            "chat.jsonl:1: two `assistant` turns in a row",
        ),
        (
            "chat.jsonl",
            lines({"messages": [{"role": "robot", "content": "x"}]}),
            "chat.jsonl:1: unknown role `robot`; must be one of system",
        ),
        (
            "chat.jsonl",
            lines({"messages": [{"role": "user", "content": None}]}),
            "chat.jsonl:1: content of messages[0] is null; must be text",
        ),
        (
            "chat.jsonl",
            lines({"messages": [{"role": "user"}]}),
            "chat.jsonl:1: messages[0]: field `content` is missing (has: role)",
        ),
        ("chat.jsonl", lines({"messages": "hi"}), "chat.jsonl:1: `messages` is text; must be a"),
        ("chat.jsonl", lines({"messages": ["hi"]}), "chat.jsonl:1: `messages[0]` is text; must be"),
        (
            "chat.jsonl",
            lines({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}),
            "chat.jsonl:1: messages[0] has `tool_calls`; must be role and content only",
        ),
    ],
)
def test_refusals(tmp_path, name, content, expected):
    text = message(write(tmp_path, name, content))
    assert text.startswith(f"data.train[0]: {tmp_path}")
    assert expected in text


def test_deep_nesting_is_refused_without_a_crash(tmp_path):
    path = write(tmp_path, "a.jsonl", "[" * 100_000 + "]" * 100_000 + "\n")
    assert re.search(r"a\.jsonl:1: (nested too deeply|record is a list)", message(path))


def test_long_line(tmp_path):
    row = lines({"text": "a" * 3_000_000})
    path = write(tmp_path, "train.jsonl", lines({"text": "ok"}) + row)
    expected = "train.jsonl:2: line of 3.0 MB; must be at most 2.0 MB; raise `max_line_bytes`"
    assert expected in message(path, max_line_bytes=2_000_000)
    assert len(read(path, max_line_bytes=len(row) - 1)) == 2


def test_a_compressed_line_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(30):
            file.write(b" " * 1_000_000)
    monkeypatch.setattr("collegium.data.readers._MAX_COUNTED", 12_000_000)
    expected = "bomb.jsonl.gz:1: line of more than 12.2 MB; must be at most 8.0 MB; raise"
    assert expected in message(path)


def test_missing_file_names_what_is_there(tmp_path):
    write(tmp_path, "train.jsonl", "")
    (tmp_path / "old").mkdir()
    text = message(tmp_path / "trian.jsonl")
    assert f"trian.jsonl: no such file; {tmp_path} holds: old/, train.jsonl" in text
    assert f"no such file; {tmp_path} holds" in message(tmp_path / "deep" / "er" / "*.txt")
    assert "old: no .txt" in message(tmp_path / "old")
    for odd in ("~nosuchuser/a", "a" * 5000, "a\0b"):
        assert "no such file" in message(odd)


def test_check_sources_looks_at_the_first_rows_of_every_file_only(tmp_path):
    good = lines(*[{"text": "a"}] * 5)
    write(tmp_path, "a.jsonl", good + "broken\n")
    check_sources([SourceOptions(path=str(tmp_path))], where="data.train")
    write(tmp_path, "b.jsonl", "broken\n")
    with pytest.raises(DataError, match=r"^data\.train\[0\]: .*b\.jsonl:1: not JSON at column 1"):
        check_sources([SourceOptions(path=str(tmp_path))], where="data.train")
    (tmp_path / "b.jsonl").write_text("")
    empty = SourceOptions(path=str(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match="0 rows"):
        check_sources([empty], where="data.train")


def test_hub_rows_and_failure(monkeypatch):
    asked = {}

    def load(path, name, *, split, revision, streaming):
        asked.update(path=path, name=name, split=split, revision=revision, streaming=streaming)
        if path == "who/gone":
            raise FileNotFoundError("Dataset who/gone is not there\nmore")
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = SourceOptions(hub="who/what", split="dev", revision="abc", streaming=True)
    documents = list(read_documents(options, where="data.train[0]"))
    assert [(d.id, d.domain) for d in documents] == [
        ("who/what:1", "what"),
        ("who/what:2", "what"),
    ]
    assert asked == {
        "path": "who/what",
        "name": None,
        "split": "dev",
        "revision": "abc",
        "streaming": True,
    }
    with pytest.raises(DataError, match=r"who/gone: cannot be loaded \(FileNotFoundError: Dataset"):
        list(read_documents(SourceOptions(hub="who/gone"), where="data.train[0]"))


def test_content_hash_depends_on_content_alone():
    def one(**content):
        return Document(id="a", domain="d", **content).content_hash()

    assert one(text="x") == Document(id="b", domain="e", text="x").content_hash()
    kinds = [
        one(text="x"),
        one(text="y"),
        one(prompt="x", completion="y"),
        one(prompt="xy", completion=""),
        one(messages=({"role": "user", "content": "x"},)),
        one(messages=({"role": "assistant", "content": "x"},)),
    ]
    assert len(set(kinds)) == len(kinds)
