"""Windows: packing changes only the layout, and the three parts are disjoint."""

import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import tiny
from collegium.data.collate import Collator
from collegium.data.encode import Encoded
from collegium.data.pack import build_datasets
from collegium.data.sources import DataOptions, SourceOptions
from collegium.data.windows import PackedDataset
from collegium.errors import DataError
from collegium.types import IGNORE, Batch, domain_number
from refusals import refused


def make(ids, *, can_split=True, first_target=1):
    ids = np.array(ids, np.int64)
    is_target = np.arange(len(ids)) >= max(1, first_target)
    return Encoded(ids, is_target, ids % 7, can_split)


@st.composite
def corpora(draw):
    """Documents in which all tokens are distinct, so that no shift goes unnoticed."""
    documents, following = [], 10
    for _ in range(draw(st.integers(1, 8))):
        can_split = draw(st.booleans())
        size = draw(st.integers(2, 30 if can_split else 8))
        first = 1 if can_split else draw(st.integers(1, size - 1))
        ids = range(following, following + size)
        documents.append(make(ids, can_split=can_split, first_target=first))
        following += size
    return documents


def trained_pairs(dataset):
    """Multiset of (document, previous token, target) as seen by the training step."""
    batch = Collator()([dataset[i] for i in range(len(dataset))])
    rows = Batch.from_inputs(batch).rows()
    before = batch["input_ids"].flatten()[rows.index]
    return Counter(zip(rows.samples.tolist(), before.tolist(), rows.labels.tolist(), strict=True))


def expected_pairs(encoded):
    return Counter(
        (number, int(document.ids[t - 1]), int(document.ids[t]))
        for number, document in enumerate(encoded)
        for t in range(1, len(document))
        if document.is_target[t]
    )


@settings(max_examples=150, deadline=None)
@given(corpora(), st.integers(8, 20), st.sampled_from([None, 0, 5]))
def test_packing_padding_and_length_do_not_change_what_is_trained(encoded, max_length, seed):
    for packing in (True, False):
        dataset = PackedDataset(encoded, max_length=max_length, packing=packing, order_seed=seed)
        assert trained_pairs(dataset) == expected_pairs(encoded)
        assert dataset.num_target_tokens == sum(int(d.is_target.sum()) for d in encoded)
        assert dataset.num_tokens == sum(map(len, encoded))
        items = [dataset[i] for i in range(len(dataset))]
        assert sum(int(i["num_bytes"].sum()) for i in items) == sum(
            int(d.num_bytes.sum()) for d in encoded
        )


def shifted(item):
    return {**item, "labels": torch.roll(item["labels"], 1)}


def unmasked(item):
    return {**item, "labels": item["input_ids"].clone()}


def one_document(item):
    return {**unmasked(item), "position_ids": torch.arange(len(item["input_ids"]))}


@pytest.mark.parametrize("mutation", [shifted, unmasked, one_document])
def test_pairs_differ_for_wrong_labels(mutation):
    # The comparison of pairs is not vacuous: it detects each of these mutations.
    encoded = [make(range(10, 14)), make(range(20, 25), can_split=False, first_target=2)]
    dataset = PackedDataset(encoded, max_length=12)
    batch = Collator()([mutation(dataset[0])])
    rows = Batch.from_inputs(batch).rows()
    before = batch["input_ids"].flatten()[rows.index]
    pairs = Counter(zip(rows.samples.tolist(), before.tolist(), rows.labels.tolist(), strict=True))
    assert pairs != expected_pairs(encoded)


@settings(max_examples=150, deadline=None)
@given(corpora(), st.integers(8, 20))
def test_invariants_of_a_window(encoded, max_length):
    dataset = PackedDataset(encoded, max_length=max_length, pad_token_id=3)
    for number in range(len(dataset)):
        item = dataset[number]
        assert {values.shape for values in item.values()} == {(max_length,)}
        assert {values.dtype for values in item.values()} == {torch.int64}
        starts = (item["position_ids"] == 0).nonzero()[:, 0].tolist()
        assert starts[0] == 0
        for start, stop in zip(starts, [*starts[1:], max_length], strict=True):
            positions = item["position_ids"][start:stop]
            assert positions.tolist() == list(range(stop - start))
            assert len(set(item["sample_ids"][start:stop].tolist())) == 1
            assert item["labels"][start] == IGNORE
            if item["sample_ids"][start] < 0:
                assert stop == max_length
                assert (item["labels"][start:] == IGNORE).all()
                assert (item["input_ids"][start:] == 3).all()
            else:
                assert stop - start >= 2
        is_target = item["labels"] != IGNORE
        assert (item["labels"][is_target] == item["input_ids"][is_target]).all()


def test_texts_fill_windows_exactly_and_chats_stay_whole():
    texts = [make(range(10, 31)), make(range(40, 49))]
    dataset = PackedDataset(texts, max_length=8)
    columns = [dataset[i]["sample_ids"].tolist() for i in range(len(dataset))]
    assert columns == [[0] * 8, [0] * 8, [0] * 7 + [-1], [1] * 8, [1] * 2 + [-1] * 6]
    # The continuation repeats the last token as context.
    assert dataset[1]["input_ids"][0] == dataset[0]["input_ids"][-1]
    chats = [make(range(10, 15), can_split=False), make(range(20, 25), can_split=False)]
    dataset = PackedDataset(chats, max_length=8)
    assert [dataset[i]["sample_ids"].tolist() for i in range(2)] == [
        [0] * 5 + [-1] * 3,
        [1] * 5 + [-1] * 3,
    ]
    with refused(ValueError, "document 0"):
        PackedDataset(chats, max_length=4)


def test_order_of_windows_follows_the_seed_and_the_fingerprint_the_content():
    encoded = [make(range(10, 200))]

    def build(**options):
        return PackedDataset(encoded, max_length=8, **options)

    assert build(order_seed=1).fingerprint == build(order_seed=1).fingerprint
    prints = {build(**o).fingerprint for o in ({}, {"order_seed": 1}, {"order_seed": 2})}
    assert len(prints) == 3
    assert build(domains=["x"]).fingerprint != build(domains=["y"]).fingerprint
    changed = Encoded(encoded[0].ids, encoded[0].is_target.copy(), encoded[0].num_bytes, True)
    changed.is_target[50] = False
    assert PackedDataset([changed], max_length=8).fingerprint != build().fingerprint


def test_index_out_of_range():
    dataset = PackedDataset([make(range(10, 20))], max_length=10)
    assert dataset[-1]["input_ids"].tolist() == dataset[0]["input_ids"].tolist()
    with pytest.raises(IndexError):
        dataset[1]


def corpus(folder, name, texts):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceOptions(path=str(path))


def two_domains(folder):
    return [
        corpus(folder, "long", [f"{tiny.TEXT[0]} Number {i}. {tiny.TEXT[1]}" for i in range(60)]),
        corpus(folder, "short", [f"Short one, {i}." for i in range(200)]),
    ]


def texts_of(dataset):
    tokenizer = tiny.tiny_tokenizer()
    ids = {}
    for i in range(len(dataset)):
        item = dataset[i]
        for sample, token in zip(
            item["sample_ids"].tolist(), item["input_ids"].tolist(), strict=True
        ):
            ids.setdefault(sample, []).append(token)
    ids.pop(-1, None)
    return {tokenizer.decode(tokens) for tokens in ids.values()}


def test_parts_are_disjoint_deterministic_and_whole(tmp_path):
    options = DataOptions(train=two_domains(tmp_path), max_length=64, packing=False)
    parts = build_datasets(options, tiny.tiny_tokenizer(), where="data")
    assert list(parts) == ["train", "calibration", "validation"]
    texts = [texts_of(part) for part in parts.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 260
    again = build_datasets(options, tiny.tiny_tokenizer(), where="data")
    assert [p.fingerprint for p in parts.values()] == [p.fingerprint for p in again.values()]
    train = parts["train"]
    assert train.domains == ["long", "short"]
    assert [train.domains[i] for i in train.sample_domains] == [
        name.split("/")[-1].split(".")[0] for name in train.sample_names
    ]
    other = DataOptions(train=two_domains(tmp_path), max_length=64, packing=False, split_seed=1)
    moved = build_datasets(other, tiny.tiny_tokenizer(), where="data")
    assert texts_of(moved["validation"]) != texts[2]


def test_a_prefix_is_a_fair_mixture(tmp_path):
    options = DataOptions(train=two_domains(tmp_path), max_length=32)
    train = build_datasets(options, tiny.tiny_tokenizer(), where="data")["train"]
    shares = []
    for windows in (range(len(train) // 3), range(len(train))):
        samples = torch.cat([train[i]["sample_ids"] for i in windows])
        shares.append(train.sample_domains[samples[samples >= 0]].mean())
    assert shares[0] == pytest.approx(shares[1], abs=0.12)


def test_token_limits_are_kept_and_shared_evenly(tmp_path):
    options = DataOptions(
        train=two_domains(tmp_path),
        max_length=32,
        max_train_tokens=1200,
        max_calibration_tokens=100,
        max_validation_tokens=100,
    )
    parts = build_datasets(options, tiny.tiny_tokenizer(), where="data")
    limits = {"train": 1200, "calibration": 100, "validation": 100}
    assert all(limits[name] - 1 <= part.num_tokens <= limits[name] for name, part in parts.items())
    train = parts["train"]
    items = [train[i] for i in range(len(train))]
    samples = torch.cat([i["sample_ids"][i["sample_ids"] >= 0] for i in items]).numpy()
    by_domain = np.bincount(train.sample_domains[samples])
    assert abs(by_domain[0] - by_domain[1]) < 120
    # A limit above the size of the corpus changes nothing.
    wide = DataOptions(train=options.train, max_length=32, max_train_tokens=10**6)
    free = DataOptions(train=options.train, max_length=32)
    prints = [
        build_datasets(o, tiny.tiny_tokenizer(), where="data")["train"].fingerprint
        for o in (wide, free)
    ]
    assert prints[0] == prints[1]


def test_sources_of_a_part_must_not_occur_in_train(tmp_path):
    train = two_domains(tmp_path)
    validation = corpus(tmp_path, "val", ["Held out."] * 2 + ["Short one, 3.", "Short one, 4."])
    options = DataOptions(train=train, validation=[validation], max_length=32)
    with refused(DataError, "data.validation"):
        build_datasets(options, tiny.tiny_tokenizer(), where="data")
    held_out = corpus(tmp_path, "fresh", ["Held out."])
    options = DataOptions(train=train, validation=[held_out], calibration=[held_out], max_length=32)
    with refused(DataError, "data.validation"):
        build_datasets(options, tiny.tiny_tokenizer(), where="data")
    options = DataOptions(train=train, validation=[held_out], max_length=32)
    parts = build_datasets(options, tiny.tiny_tokenizer(), where="data")
    assert list(parts["validation"].sample_names) == [f"{tmp_path / 'fresh.jsonl'}:1"]


def test_an_empty_part_is_refused_with_a_remedy(tmp_path):
    options = DataOptions(train=[corpus(tmp_path, "one", ["only this"])], max_length=32)
    with refused(DataError, "data."):
        build_datasets(options, tiny.tiny_tokenizer(), where="data")


def test_too_long_and_untrained_rows(tmp_path, caplog):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i:03d}", "completion": "y" * (3 + 40 * (i % 2))} for i in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = [SourceOptions(path=str(path))]

    def build(**options):
        chosen = DataOptions(train=source, max_length=20, **options)
        return build_datasets(chosen, tiny.tiny_tokenizer(), where="data")

    with refused(DataError, "data.train"):
        build(truncate="error")
    dropped = build(truncate="drop")["train"]
    assert "; dropped" in caplog.text
    assert all(int(name.rsplit(":", 1)[1]) % 2 for name in dropped.sample_names)
    assert len(build(truncate="left")["train"].sample_names) > len(dropped.sample_names)
    source = [SourceOptions(path=str(path))]
    path.write_text(
        "".join(json.dumps({**r, "prompt": "x" * 30 + r["prompt"]}) + "\n" for r in rows)
    )
    with refused(DataError, "data."):
        build()
    with refused(DataError, "data."):
        build(truncate="drop")


def test_options_are_checked():
    source = [{"path": "a.txt"}]
    for wrong in (
        {"train": []},
        {"train": source, "max_length": 1},
        {"train": source, "validation_fraction": 0.6, "calibration_fraction": 0.5},
        {"train": source, "trunkate": "left"},
        {"train": [{"path": "a", "hub": "b"}]},
    ):
        with pytest.raises(ValidationError):
            DataOptions(**wrong)
    options = DataOptions(train=source)  # type: ignore[arg-type]
    assert options.train[0] == SourceOptions(path="a.txt")


def test_collator_pads_ragged_rows_as_one_more_document():
    encoded = [make(range(10, 15)), make(range(20, 23))]
    dataset = PackedDataset(encoded, max_length=8, packing=False)
    # Workers of a data loader may receive the collator by pickle.
    collate = pickle.loads(pickle.dumps(Collator(pad_token_id=7)))
    batch = collate([dataset[0], dataset[1]])
    assert batch["input_ids"][1].tolist() == [20, 21, 22, 7, 7]
    assert batch["labels"][1].tolist() == [IGNORE, 21, 22, IGNORE, IGNORE]
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 0, 1]
    assert batch["sample_ids"][1].tolist() == [1, 1, 1, -1, -1]
    assert batch["num_bytes"].shape == (2, 5)


def test_collator_takes_ordinary_items():
    items = [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
        {"input_ids": [0, 0, 8, 9], "labels": [0, 0, 8, 9], "attention_mask": [0, 0, 1, 1]},
        {
            "input_ids": [0, 8, 9, 9, 1],
            "labels": [0, 8, 9, 9, 1],
            "attention_mask": [0, 1, 1, 1, 0],
            "position_ids": [0, 1, 2, 0, 4],
        },
    ]
    # No mask, left padding, and padding on both sides of positions that restart.
    batch = Collator()(items)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0]]
    assert batch["sample_ids"].tolist() == [
        [0, 0, 0, -1, -1],
        [-1, -1, 1, 1, -1],
        [-1, 2, 2, 2, -1],
    ]
    _ = IGNORE
    assert batch["labels"].tolist() == [[_, 6, 7, _, _], [_, _, _, 9, _], [_, _, 9, _, _]]
    assert "num_bytes" not in batch
    assert Batch.from_inputs(batch).rows().labels.tolist() == [6, 7, 9, 9]


def test_collator_padding_continues_the_padding_of_the_row():
    short = {"input_ids": [5, 6, 0], "labels": [5, 6, 0], "attention_mask": [1, 1, 0]}
    long = {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5]}
    assert Collator()([short, long])["position_ids"][0].tolist() == [0, 1, 0, 1, 2]


def test_collator_refuses_incomplete_items():
    with refused(DataError, "batch item 0: `labels`"):
        Collator()([{"input_ids": [1]}])
    with refused(DataError, "batch item 0: `labels`"):
        Collator()([{"input_ids": [1], "labels": [1, 2]}])


@pytest.mark.parametrize("packing", [True, False])
def test_the_domain_of_a_document_travels_with_its_tokens(packing: bool) -> None:
    domains = ["law", "code", "law"]
    encoded = [
        Encoded(
            np.arange(3, 3 + size), np.ones(size, bool), np.ones(size, np.int64), can_split=True
        )
        for size in (5, 9, 4)
    ]
    dataset = PackedDataset(encoded, max_length=6, packing=packing, domains=domains)
    batch = Collator()([dataset[i] for i in range(len(dataset))])
    expected = torch.tensor([*map(domain_number, domains), 0])[batch["sample_ids"]]
    assert torch.equal(batch["domain_ids"], expected)
    rows = Batch.from_inputs(batch).rows()
    assert rows.domains is not None
    assert {domain_number(domains[s]) for s in rows.samples.tolist()} == set(rows.domains.tolist())
    plain = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}]
    assert Batch.from_inputs(Collator()(plain)).rows().domains is None
