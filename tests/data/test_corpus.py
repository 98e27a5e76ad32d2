"""The corpus on disk: equal to naive datasets in memory, for any number of processes."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from collegium.data import pack, pool, shards
from collegium.data.corpus_folder import CorpusFolder
from collegium.data.pack import build_datasets, lay_out
from collegium.data.sources import DataOptions, SourceOptions
from collegium.storage import arrays
from reference_corpus import reference_windows


def write_sources(folder: Path) -> list[SourceOptions]:
    """Texts, pairs, chats and a folder of text files, with duplicates and teachers."""
    rows = [{"text": f"{tiny.TEXT[i % 4]} Number {i % 30}." * (1 + i % 3)} for i in range(50)]
    rows += [{"text": "Twice."}] * 3
    for number, row in enumerate(rows):
        row["teacher"] = ["law", None, "code"][number % 3]
    write(folder / "texts.jsonl", rows)
    pairs = [{"prompt": f"{i:03d}", "completion": "y" * (1 + 9 * (i % 9))} for i in range(40)]
    write(folder / "pairs.jsonl", pairs)
    turns = ["user", "assistant", "user", "assistant"]
    chats = [
        {"messages": [{"role": r, "content": f"{r} {i} {n}"} for n, r in enumerate(turns)]}
        for i in range(25)
    ]
    write(folder / "chats.jsonl", chats)
    (folder / "notes").mkdir()
    for number in range(12):
        (folder / "notes" / f"a{number}:{number}.txt").write_text(f"é数 {number} " * number + "x")
    return [
        SourceOptions(path=str(folder / "texts.jsonl"), teacher_column="teacher"),
        SourceOptions(path=str(folder / "pairs.jsonl")),
        SourceOptions(path=str(folder / "chats.jsonl"), domain="talk"),
        SourceOptions(path=str(folder / "notes")),
    ]


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


TEACHERS = ("law", "code")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[SourceOptions]:
    return write_sources(tmp_path_factory.mktemp("sources"))


def tokenizer():
    return tiny.tiny_tokenizer(400, chat=True)


def store(options: DataOptions, root: Path) -> CorpusFolder:
    return CorpusFolder(options, tokenizer(), root, where="data", teachers=TEACHERS)


def stored_datasets(options: DataOptions, root: Path, processes: int = 1):
    one = store(options, root)
    one.build(processes=processes)
    return lay_out(one.open(), options, tokenizer(), where="data", teachers=TEACHERS)


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards, several files of each array, and layouts on disk, of a small corpus."""
    monkeypatch.setattr(shards, "SHARD_DOCUMENTS", 17)
    monkeypatch.setattr(arrays, "ROWS_PER_FILE", 7)
    monkeypatch.setattr(pack, "KEPT_DOCUMENTS", 0)
    monkeypatch.setattr(pool, "SERIAL_SHARDS", 0)


def check_equal(datasets, options: DataOptions) -> None:
    for part, dataset in datasets.items():
        windows, digest, names, stops = reference_windows(options, tokenizer(), part)
        assert [
            {k: v.tolist() for k, v in dataset[i].items()} for i in range(len(dataset))
        ] == windows
        assert (dataset.fingerprint, list(dataset.sample_names)) == (digest, names)
        assert dataset.stops == stops


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(0, 3),
    st.integers(24, 80),
    st.booleans(),
    st.sampled_from([None, 2, 300, 10**6]),
    st.sampled_from(["right", "left", "drop"]),
    st.booleans(),
)
def test_both_forms_equal_the_naive_one(
    sources, tmp_path_factory, small_files, seed, max_length, packing, limit, truncate, has_own
):
    options = DataOptions(
        train=sources[1:] if has_own else sources,
        validation=sources[:1] if has_own else [],
        max_length=max_length,
        packing=packing,
        split_seed=seed,
        truncate=truncate,
        calibration_fraction=0.2,
        validation_fraction=0.2,
        max_train_tokens=limit,
    )
    check_equal(build_datasets(options, tokenizer(), where="data", teachers=TEACHERS), options)
    root = tmp_path_factory.mktemp("corpora")
    check_equal(stored_datasets(options, root), options)
    # The layout that is kept, opened.
    check_equal(
        lay_out(store(options, root).open(), options, tokenizer(), where="data", teachers=TEACHERS),
        options,
    )
