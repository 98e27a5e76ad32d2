"""The corpus on disk: equal to naive datasets in memory, for any number of processes."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import tiny
from collegium.data import corpus_folder, pack, pool, shards
from collegium.data.collate import Collator
from collegium.data.corpus_folder import CorpusFolder
from collegium.data.pack import build_datasets, lay_out
from collegium.data.sources import DataOptions, SourceOptions
from collegium.errors import DataError
from collegium.storage import arrays
from reference_corpus import reference_windows
from refusals import refused


def write_sources(folder: Path) -> list[SourceOptions]:
    """Texts, pairs, chats and a folder of text files, with duplicates and teachers."""
    rows = [{"text": f"{tiny.TEXT[i % 4]} Number {i % 30}." * (1 + i % 3)} for i in range(50)]
    # Copies in rows 9 and 51 to 53: as strings, `51` comes before `9`.
    rows.insert(8, {"text": "Twice."})
    rows += [{"text": "Twice."} for _ in range(3)]
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
    monkeypatch.setattr(shards, "SHARD_DOCUMENTS", 37)
    monkeypatch.setattr(arrays, "ROWS_PER_FILE", 50)
    monkeypatch.setattr(pack, "KEPT_TOKENS", 0)
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
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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


def contents(folder: Path) -> dict[str, bytes]:
    """Content of each file but for the times in `verified.json`."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "verified.json")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def options(sources) -> DataOptions:
    return DataOptions(train=sources, max_length=32)


def test_the_files_do_not_depend_on_the_number_of_processes(options, small_files, tmp_path):
    for processes in (1, 2):
        stored_datasets(options, tmp_path / str(processes), processes)
    one, two = (contents(tmp_path / number) for number in "12")
    assert len([name for name in one if "shard" in name]) >= 9
    assert one == two


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SystemExit()])
def test_an_interrupted_build_resumes(options, small_files, tmp_path, monkeypatch, error):
    """A full disk, or the end of the process: finished shards are kept, and the bytes are equal."""
    store(options, tmp_path / "whole").build(processes=1)
    write, written = shards.write_shard, []

    def failing(folder, number, *args):
        if number == 2 and written.count(2) == 0:
            written.append(2)
            (folder / ".shard-00002-tokens.npy.tmp").write_bytes(b"half")
            raise error
        written.append(number)
        return write(folder, number, *args)

    monkeypatch.setattr(pool, "write_shard", failing)
    if isinstance(error, OSError):
        with refused(DataError, "TMP/cut/DIGEST: cannot be written"):
            store(options, tmp_path / "cut").build(processes=1)
    else:
        with pytest.raises(SystemExit):
            store(options, tmp_path / "cut").build(processes=1)
    store(options, tmp_path / "cut").build(processes=1)
    assert written[:3] == [0, 1, 2]
    assert sorted(written) == sorted([2, *range(len(set(written)))])
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_damaged_shard_is_named_and_written_again(
    options, small_files, tmp_path, monkeypatch, capsys
):
    store(options, tmp_path).build(processes=1)
    before, encoded = contents(tmp_path), []
    monkeypatch.setattr(
        pool, "encode_shard", lambda *args: encoded.append(1) or shards.encode_shard(*args)
    )
    folder = store(options, tmp_path).folder
    for number, damage in enumerate((flipped, lambda file: os.truncate(file, 99), Path.unlink), 1):
        damage(folder / "shard-00001-tokens.npy")
        one = store(options, tmp_path)
        assert one.manifest() is None
        assert str(folder / "shard-00001-tokens.npy") in capsys.readouterr().err.replace("\n", "")
        one.build(processes=1)
        assert len(encoded) == number
        assert contents(tmp_path) == before


def test_a_file_that_shrinks_while_it_is_read_is_named(options, small_files, tmp_path):
    dataset = stored_datasets(options, tmp_path)["train"]
    folder = store(options, tmp_path).folder
    for file in folder.glob("shard-*-tokens.npy"):
        os.truncate(file, 200)
    with refused(DataError, "TMP/DIGEST/shard-"):
        for number in range(len(dataset)):
            dataset[number]


def test_a_changed_source_makes_another_corpus(tmp_path):
    source = tmp_path / "texts.jsonl"
    write(source, [{"text": f"Number {i}."} for i in range(80)])
    options = DataOptions(train=[SourceOptions(path=str(source))], max_length=32)
    first = store(options, tmp_path / "corpora")
    first.build()
    assert first.manifest() is not None
    assert store(options, tmp_path / "corpora").manifest() is not None
    write(source, [{"text": f"Number {i}!"} for i in range(80)])
    second = store(options, tmp_path / "corpora")
    assert second.manifest() is None
    assert second.folder != first.folder
    assert str(second.changed_sources()).startswith(str(source))


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "texts.jsonl"
    write(source, [{"text": f"Number {i}."} for i in range(80)])
    options = DataOptions(train=[SourceOptions(path=str(source))], max_length=32)
    one = store(options, tmp_path / "corpora")
    one.identity()
    write(source, [{"text": f"Other number {i}."} for i in range(80)])
    with refused(DataError, "data: TMP/texts.jsonl: changed"):
        one.build()
    assert not (one.folder / "manifest.json").exists()


def test_a_corpus_of_another_version_is_refused(options, tmp_path):
    one = store(options, tmp_path)
    one.build()
    manifest = one.folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2', 1))
    with refused(DataError, "TMP/DIGEST/manifest.json"):
        store(options, tmp_path).manifest()


@pytest.mark.parametrize(
    "change",
    [{"max_length": 31}, {"truncate": "left"}, {"special_tokens": "text"}, {"date": "2024-01-01"}],
)
def test_options_of_tokens_name_the_folder_and_others_do_not(options, tmp_path, change):
    values = {"train": options.train, "max_length": 32}
    same = {"split_seed": 3, "packing": False, "max_train_tokens": 50, "validation_fraction": 0.3}
    folder = store(options, tmp_path).folder
    assert store(DataOptions(**values, **same), tmp_path).folder == folder
    assert store(DataOptions(**{**values, **change}), tmp_path).folder != folder


def test_a_large_corpus_is_not_encoded_in_memory(options, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_folder, "SMALL_BYTES", 0)
    one = store(options, tmp_path)
    assert not one.is_readable()
    with refused(DataError, "data: the corpus is not built"):
        one.open()
    one.build()
    assert one.is_readable()
    assert not tmp_path.joinpath("sources.json").exists()


def test_records_of_arrays_survive_chunks_and_wide_values(tmp_path):
    rows = np.zeros(7, shards.TOKEN)
    rows["id"] = [0, 1, 2**16, 3, 2**31, 5, 6]
    rows["num_bytes"] = [0, 255, 256, 2**16, 1, 0, 3]
    rows["is_target"][::2] = True
    writer = arrays.ArrayWriter(shards.TOKEN, tmp_path, "tokens")
    for row in range(7):
        writer.append(rows[row : row + 1])
    stored = writer.finish()
    for start in range(8):
        for stop in range(8):
            assert stored[start:stop].tolist() == rows[start:stop].tolist()
    shard = shards.Shard(rows, np.zeros(0, shards.ROW), shards.ShardStrings())
    shutil.rmtree(tmp_path)
    info = shards.write_shard(tmp_path, 0, shard, "")
    read = np.load(tmp_path / "shard-00000-tokens.npy")
    assert read.dtype == info.token_dtype
    assert read.astype(shards.TOKEN).tolist() == rows.tolist()


def test_a_renumbered_dataset_keeps_its_fingerprint_on_disk(options, small_files, tmp_path):
    dataset = stored_datasets(options, tmp_path)["train"]
    size = max(dataset.token_ids()) + 1
    new_ids = np.arange(size)[::-1].copy()
    changed = dataset.renumbered(new_ids)
    tokens = changed[0]["input_ids"]
    assert tokens.tolist() == new_ids[dataset[0]["input_ids"]].tolist()
    assert changed.token_ids() == {*new_ids[[*dataset.token_ids()]].tolist()}
    assert changed.fingerprint != dataset.fingerprint
    (file,) = dataset.layout.folder.glob("fingerprint-*.txt")
    assert file.read_text().strip() == changed.fingerprint
    # Read from there, as long as the tokens are renumbered in the same way.
    file.write_text("from disk\n")
    assert dataset.renumbered(new_ids).fingerprint == "from disk"
    assert dataset.renumbered(np.arange(size)).fingerprint == dataset.fingerprint


def test_renumbered_splits_keep_fingerprints_apart(options, small_files, tmp_path):
    """They share a folder, and come in any order."""
    splits = stored_datasets(options, tmp_path)
    new_ids = np.arange(1 + max(max(one.token_ids()) for one in splits.values()))[::-1].copy()
    first = {part: one.renumbered(new_ids).fingerprint for part, one in splits.items()}
    again = {part: splits[part].renumbered(new_ids).fingerprint for part in reversed(splits)}
    assert len({*first.values()}) == len(splits) == 3
    assert again == first


def test_a_damaged_layout_is_named_and_made_again(options, small_files, tmp_path, capsys):
    expected = [one.fingerprint for one in stored_datasets(options, tmp_path).values()]
    (folder,) = store(options, tmp_path).folder.glob("layout-*")
    before = contents(folder)
    files = [folder / "layout.json", *sorted(folder.glob("train-*.npy"))]
    for file in (files[0], files[1], files[-1]):
        flipped(file)
        opened = lay_out(
            store(options, tmp_path).open(), options, tokenizer(), where="data", teachers=TEACHERS
        )
        assert [one.fingerprint for one in opened.values()] == expected
        assert str(file) in capsys.readouterr().err.replace("\n", "")
        assert contents(folder) == before


def test_a_teacher_that_the_run_lacks_is_refused_before_and_after(options, small_files, tmp_path):
    stored_datasets(options, tmp_path)
    corpus = store(options, tmp_path).open()
    for _ in range(2):
        with refused(DataError, "data.train[0]: TMP/texts.jsonl:"):
            lay_out(corpus, options, tokenizer(), where="data", teachers=["law"])
    with refused(DataError, "data.train[0]: TMP/texts.jsonl:"):
        build_datasets(options, tokenizer(), where="data", teachers=["law"])


def test_workers_of_a_data_loader_read_the_same_windows(options, small_files, tmp_path):
    dataset = stored_datasets(options, tmp_path)["train"]
    dataset[0]  # opens files before the workers are forked

    def batches(num_workers):
        loader = DataLoader(dataset, 4, collate_fn=Collator(), num_workers=num_workers)
        return [{name: t.tolist() for name, t in batch.items()} for batch in loader]

    assert batches(2) == batches(0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[1]["labels"].tolist() == dataset[1]["labels"].tolist()
    assert list(copy.sample_names) == list(dataset.sample_names)


def test_digests_of_large_sources_are_remembered(options, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_folder, "MEMO_BYTES", 0)
    store(options, tmp_path).build()
    identity = store(options, tmp_path).identity()
    monkeypatch.setattr(corpus_folder, "sha256_of", lambda path: pytest.fail(f"{path} is read"))
    assert store(options, tmp_path).identity() == identity
    (tmp_path / "sources.json").write_text("{")
    monkeypatch.undo()
    assert store(options, tmp_path).identity() == identity
