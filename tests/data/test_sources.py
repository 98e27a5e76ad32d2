"""Document sources: every format, and a refusal for every kind of damage."""

import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from collegium.data.documents import Document
from collegium.data.sources import SourceOptions, SourceSummary, check_sources, read_documents
from collegium.errors import DataError
from refusals import refused

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(path, **options):
    return list(read_documents(SourceOptions(path=str(path), **options), where="data.train[0]"))


def test_exactly_one_of_path_and_hub():
    for wrong in ({}, {"path": "a", "hub": "b"}):
        with pytest.raises(ValidationError, match="exactly one of `path`, `url` and `hub`"):
            SourceOptions(**wrong)


def test_text_file_with_byte_order_mark_and_crlf(tmp_path):
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
    expected = [{"text": "a"}, {"prompt": "q", "completion": "r"}, {"messages": tuple(CHAT)}]
    for number, row in enumerate(rows):
        plain = write(tmp_path, f"d{number}.jsonl", "\ufeff" + lines(row))
        zipped = tmp_path / f"d{number}.jsonl.gz"
        zipped.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
        table = tmp_path / f"d{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), table)
        for path in (plain, zipped, table):
            assert read(path) == [Document(id=f"{path}:1", domain=f"d{number}", **expected[number])]


def test_folder_glob_and_text_column(tmp_path):
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
    with refused(DataError, "data.train[0]: TMP/train.jsonl:1"):
        read(path, teacher_column="bi")
    write(tmp_path, "train.jsonl", lines({"text": "a", "by": 3}))
    with refused(DataError, "data.train[0]: TMP/train.jsonl:1"):
        read(path, teacher_column="by")
    text = write(tmp_path, "a.txt", "hello")
    with refused(DataError, "data.train[0]: TMP/a.txt"):
        read(text, teacher_column="by")


def test_blank_rows_are_skipped_and_limit_counts_documents(tmp_path):
    path = write(tmp_path, "t.jsonl", lines({"text": None}, {"text": " "}, {"text": "a"}) + "\n")
    assert [d.id for d in read(path, limit=1)] == [f"{path}:3"]


CASES: dict[str, tuple[str, str | bytes, str]] = {
    "empty jsonl": ("train.jsonl", "", ""),
    "empty text": ("train.txt", "", ""),
    "blank rows": ("train.jsonl", lines({"text": ""}, {"text": None}), ""),
    "cut string": ("train.jsonl", lines({"text": "a"}) + '{"text": "b', ":2"),
    "cut object": ("train.jsonl", lines({"text": "a"}) + '{"text": "b"', ":2"),
    "cut literal": ("train.jsonl", lines({"text": "a"}) + '{"text": nu', ":2"),
    "cut character": (
        "train.jsonl",
        lines({"text": "a"}).encode() + '{"text": "é'.encode()[:-1],
        ":2",
    ),
    "broken line": ("train.jsonl", '{"text": "a\n' + lines({"text": "b"}), ":1"),
    "latin-1 jsonl": (
        "train.jsonl",
        lines({"text": "a"}).encode() + b'{"text": "caf\xe9 x"}\n',
        ":2",
    ),
    "latin-1 text": ("a.txt", b"ab\ncaf\xe9 x", ":2"),
    "endless number": ("train.jsonl", '{"text": ' + "9" * 5000 + "}\n", ":1"),
    "endless number in an array": ("train.json", '[{"text": ' + "9" * 5000 + "}]", ""),
    "list as row": ("train.jsonl", "[1]\n", ":1"),
    "number as text": ("train.jsonl", lines({"text": 5}), ":1"),
    "list as text": ("train.jsonl", lines({"text": ["a"]}), ":1"),
    "field missing later": ("train.jsonl", lines({"text": "a"}, {"body": "b"}), ":2"),
    "field missing": ("train.jsonl", lines({"body": "b", "id": 1}), ":1"),
    "NUL in jsonl": ("train.jsonl", lines({"text": "a"}, {"text": "ab\0c"}), ":2"),
    "surrogate": ("train.jsonl", '{"text": "abc\\ud800"}\n', ":1"),
    "NUL in text": ("a.txt", "ab\0c", ""),
    "not gzip": ("train.jsonl.gz", '{"text": "a"}\n', ""),
    "cut gzip": (
        "train.jsonl.gz",
        gzip.compress(lines({"text": "a" * 99}).encode(), mtime=0)[:-9],
        "",
    ),
    "not parquet": ("train.parquet", "PAR1 no", ""),
    "extension": ("train.xlsx", "a,b", ""),
    "empty prompt": ("c.jsonl", lines({"prompt": "", "completion": "b"}), ":1"),
    "role": ("chat.jsonl", lines({"messages": [{"role": "robot", "content": "x"}]}), ":1"),
    "null content": ("chat.jsonl", lines({"messages": [{"role": "user", "content": None}]}), ":1"),
    "no content": ("chat.jsonl", lines({"messages": [{"role": "user"}]}), ":1: messages[0]"),
    "text as messages": ("chat.jsonl", lines({"messages": "hi"}), ":1"),
    "text as message": ("chat.jsonl", lines({"messages": ["hi"]}), ":1"),
    "tool calls": (
        "chat.jsonl",
        lines({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}),
        ":1: messages[0]",
    ),
}
"""Name and content of a file, and the line at which it is refused."""


@pytest.mark.parametrize("case", CASES)
def test_refusals(tmp_path, case):
    name, content, line = CASES[case]
    path = write(tmp_path, name, content)
    # The reasons that pyarrow gives differ between its versions.
    volatile = r"\(.*\)" if name.endswith(".parquet") else ""
    with refused(DataError, f"data.train[0]: TMP/{name}{line}", volatile=volatile):
        read(path)


def test_deep_nesting_is_refused_without_a_crash(tmp_path):
    path = write(tmp_path, "a.jsonl", "[" * 100_000 + "]" * 100_000 + "\n")
    # Python versions differ in the depth that their JSON parser accepts.
    with pytest.raises(DataError, match=r"a\.jsonl:1: "):
        read(path)


def test_long_line(tmp_path):
    row = lines({"text": "a" * 3_000_000})
    path = write(tmp_path, "train.jsonl", lines({"text": "ok"}) + row)
    with refused(DataError, "data.train[0]: TMP/train.jsonl:2"):
        read(path, max_line_bytes=2_000_000)
    assert len(read(path, max_line_bytes=len(row) - 1)) == 2


def test_an_endless_compressed_line_is_not_read_in_full(tmp_path, monkeypatch):
    # One line of 30 MB, which compresses well.
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(30):
            file.write(b" " * 1_000_000)
    monkeypatch.setattr("collegium.data.readers._MAX_COUNTED_BYTES", 12_000_000)
    with refused(DataError, "data.train[0]: TMP/bomb.jsonl.gz:1"):
        read(path)


def test_a_missing_file_is_refused_with_the_files_beside_it(tmp_path, monkeypatch):
    write(tmp_path, "train.jsonl", "")
    (tmp_path / "old").mkdir()
    with refused(DataError, "data.train[0]: TMP/trian.jsonl"):
        read(tmp_path / "trian.jsonl")
    with refused(DataError, "data.train[0]: TMP/deep/er/*.txt"):
        read(tmp_path / "deep" / "er" / "*.txt")
    with refused(DataError, "data.train[0]: TMP/old"):
        read(tmp_path / "old")
    # The message lists the working directory if no parent of the path exists.
    monkeypatch.chdir(tmp_path)
    for odd in ("~nosuchuser/a", "x" * 5000, "a\0b"):
        with refused(DataError, "data.train[0]: ", volatile=r"x{5000}|\0"):
            read(odd)


def test_check_sources_reads_only_the_first_rows_of_every_file(tmp_path):
    good = lines(*[{"text": "a"}] * 5)
    write(tmp_path, "a.jsonl", good + "broken\n")
    check_sources([SourceOptions(path=str(tmp_path))], where="data.train")
    write(tmp_path, "b.parquet", "broken\n")
    with refused(DataError, "data.train[0]: TMP/b.parquet", volatile=r"\(.*\)"):
        check_sources([SourceOptions(path=str(tmp_path))], where="data.train")


def test_hub_rows_and_failure(monkeypatch):
    call = {}

    def load(path, name, *, split, revision, streaming):
        call.update(path=path, name=name, split=split, revision=revision, streaming=streaming)
        if path == "who/gone":
            raise FileNotFoundError("Dataset who/gone is not there\nmore")
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = SourceOptions(hub="who/what", split="dev", revision="abc", streaming=True)
    documents = list(read_documents(options, where="data.train[0]"))
    assert [(d.id, d.domain) for d in documents] == [("who/what:1", "what"), ("who/what:2", "what")]
    assert call == {
        "path": "who/what",
        "name": None,
        "split": "dev",
        "revision": "abc",
        "streaming": True,
    }
    with refused(DataError, "data.train[0]: who/gone"):
        list(read_documents(SourceOptions(hub="who/gone"), where="data.train[0]"))


def test_content_hash_depends_only_on_content():
    def content_hash(**content):
        return Document(id="a", domain="d", **content).content_hash()

    assert content_hash(text="x") == Document(id="b", domain="e", text="x").content_hash()
    kinds = [
        content_hash(text="x"),
        content_hash(text="y"),
        content_hash(prompt="x", completion="y"),
        content_hash(prompt="xy", completion=""),
        content_hash(messages=({"role": "user", "content": "x"},)),
        content_hash(messages=({"role": "assistant", "content": "x"},)),
    ]
    assert len(set(kinds)) == len(kinds)


def test_formats_and_compressions(tmp_path):
    rows = [{"text": "a, b"}, {"text": 'c "d"\ne'}]
    table = 'text\n"a, b"\n"c ""d""\ne"\n'
    packed = pyarrow.Codec("zstd")
    files = {
        "a.json": json.dumps(rows),
        "nested.json": json.dumps({"version": 1, "data": rows}),
        "lines.json": lines(*rows),
        "a.csv": table,
        "a.tsv": table.replace(",", "\t").replace("a\t", "a,"),
        "a.jsonl.gz": gzip.compress(lines(*rows).encode(), mtime=0),
        "a.json.gz": gzip.compress(json.dumps(rows).encode(), mtime=0),
        "a.jsonl.zst": packed.compress(lines(*rows).encode(), asbytes=True),
        "utf16.jsonl": lines(*rows).encode("utf-16"),
        "utf16.csv": table.encode("utf-16"),
    }
    for name, content in files.items():
        assert [d.text for d in read(write(tmp_path, name, content))] == ["a, b", 'c "d"\ne'], name


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be kind"}
CHATS = {
    "alpaca": ({"instruction": "hi", "input": "", "output": "yo"}, (USER, ANSWER)),
    "alpaca with input": (
        {"instruction": "add", "input": "1 2", "output": "3", "system": "be kind"},
        (SYSTEM, {"role": "user", "content": "add\n\n1 2"}, {**ANSWER, "content": "3"}),
    ),
    "dolly": (
        {"instruction": "hi", "context": "", "response": "yo", "category": "chat"},
        (USER, ANSWER),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        (USER, ANSWER),
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ANSWER]},
        (USER, ANSWER),
    ),
    "nulls of a table": (
        {"messages": [{**USER, "name": None, "tool_calls": None}, {**ANSWER, "weight": None}]},
        (USER, ANSWER),
    ),
    "reasoning": (
        {"messages": [USER, {**ANSWER, "reasoning_content": "hm"}]},
        (USER, {**ANSWER, "reasoning_content": "hm"}),
    ),
    "tool call": (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "42"},
                ANSWER,
            ]
        },
        (
            USER,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "type": "function",
                        "id": "1",
                        "function": {"name": "f", "arguments": {"a": 1}},
                    }
                ],
            },
            {"role": "tool", "content": "42", "tool_call_id": "1"},
            ANSWER,
        ),
    ),
}


@pytest.mark.parametrize("case", CHATS)
def test_formats_of_chats(tmp_path, case):
    row, messages = CHATS[case]
    (document,) = read(write(tmp_path, "a.jsonl", lines(row)))
    assert document.messages == messages


def test_turns_of_a_prompt_or_marked_as_context_are_no_targets(tmp_path):
    rows = [
        {"messages": [USER, {**ANSWER, flag: value}, USER, ANSWER]}
        for flag, value in (("weight", 0), ("train", False), ("loss_mask", 0), ("trainable", False))
    ]
    rows.append({"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER]})
    documents = read(write(tmp_path, "a.jsonl", lines(*rows[:4])))
    assert [d.context for d in documents] == [frozenset({1})] * 4
    (document,) = read(write(tmp_path, "b.jsonl", lines(rows[4])))
    assert (document.context, len(document.messages)) == (frozenset({2}), 5)
    assert document.content_hash() != documents[0].content_hash()


def test_variables_of_the_template(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"messages": CHAT, "tools": json.dumps(tools), "chat_template_kwargs": {"deep": True}}
    (document,) = read(write(tmp_path, "a.jsonl", lines(row)))
    assert document.template == {"deep": True, "tools": tools}


def chat_of(**answer):
    return {"messages": [USER, {**ANSWER, **answer}]}


REFUSED = {
    "weight between": chat_of(weight=0.5),
    "unknown key": chat_of(citations=["x"]),
    "target of a user": {"messages": [{**USER, "train": True}, ANSWER]},
    "image part": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
    "images of a row": {"messages": CHAT, "images": ["a.png"]},
    "reasoning of a row": {"prompt": "a", "completion": "b", "reasoning_content": "c"},
    "weight of a row": {"text": "a", "weight": 0.5},
    "tools of a text": {"text": "a", "tools": [{"name": "f"}]},
    "tools without objects": {"messages": CHAT, "tools": ["f"]},
    "history": {"instruction": "a", "output": "b", "history": [["c", "d"]]},
    "role of sharegpt": {"conversations": [{"from": "robot", "value": "x"}]},
}


@pytest.mark.parametrize("case", REFUSED)
def test_values_without_effect_are_refused_by_name(tmp_path, case):
    path = write(tmp_path, "a.jsonl", lines(REFUSED[case]))
    with refused(DataError, "data.train[0]: TMP/a.jsonl:1"):
        read(path)


def test_all_refused_rows_are_counted_and_the_first_named(tmp_path):
    rows = [{"text": "ok"}, {"text": 1}, {"text": 2}, {"text": "ok"}, {"text": 3}, {"text": 4}]
    path = write(tmp_path, "a.jsonl", lines(*rows) + "{broken\n")
    with refused(DataError, "data.train[0]: TMP/a.jsonl:2"):
        read(path)


def test_encodings_are_named_but_none_is_advised(tmp_path):
    for name, word in (("gb18030", "北京"), ("shift_jis", "東京"), ("cp1251", "Столица")):
        path = write(tmp_path, "a.jsonl", ('{"text": "' + word * 40 + '"}\n').encode(name))
        with pytest.raises(DataError, match=name) as caught:
            read(path)
        assert "iconv" not in str(caught.value)


def test_a_cloned_dataset_folder_gives_its_split(tmp_path):
    folder = tmp_path / "hens"
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        file = folder / "data" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(lines({"text": name}))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "LICENSE.txt").write_text("MIT")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "x.jsonl").write_text(lines({"text": "stale"}))
    (folder / "more.json").write_text("[]")
    (folder / "make.py").write_text("")
    summary = SourceSummary("data.train[0]")
    options = SourceOptions(path=str(folder))
    (document,) = read_documents(options, where="data.train[0]", summary=summary)
    assert document.text == "train-00000-of-00001"
    assert summary.skipped == {
        ".ipynb_checkpoints/x.jsonl": "hidden",
        "LICENSE.txt": "documentation",
        "README.md": "documentation",
        "make.py": "unknown format",
        "data/test-00000-of-00001.jsonl": "split test",
        "more.json": "no split in its name",
    }
    assert [d.text for d in read(folder, split="test")] == ["test-00000-of-00001"]
    with refused(DataError, "data.train[0]: TMP/hens"):
        read(folder, split="validation")


def test_a_saved_dataset_folder(tmp_path):
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=rows, dev=rows.select([1])).save_to_disk(str(tmp_path / "two"))
    assert [d.text for d in read(tmp_path / "one")] == ["a", "b"]
    assert [d.text for d in read(tmp_path / "two", split="dev")] == ["b"]
    with refused(DataError, "data.train[0].split"):
        read(tmp_path / "two", split="test")
    options = SourceOptions(hub=str(tmp_path / "one"))
    assert len(list(read_documents(options, where="data.train[0]"))) == 2
