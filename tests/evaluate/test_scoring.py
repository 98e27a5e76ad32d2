"""Metrics against naive float64 loops, and their invariance to layout and block size."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from collegium.data.windows import PackedDataset
from collegium.distributions import Answer
from collegium.errors import CollegiumError, DataError, ModelError
from collegium.evaluate import scoring
from collegium.evaluate.metrics import Metrics, ScoredTokens
from collegium.evaluate.scoring import FUSED, Windows, score_models
from collegium.fusion import buffered
from collegium.fusion.fuse import Fusion
from collegium.fusion.rules import PrefixLikelihood, Uniform
from collegium.preflight.measure import run_preflight
from collegium.teachers.local import LocalTeacher
from collegium.types import Batch, Rows
from evaluation_cases import TEXTS, BigramTeacher, bigram_logits, id_dataset, text_dataset
from refusals import refused

VOCAB = len(tiny.tiny_tokenizer())


def local(name: str, seed: int, dtype: torch.dtype = torch.float64) -> LocalTeacher:
    model = tiny.tiny_model(VOCAB, seed=seed, initializer_range=0.4).to(dtype)
    return LocalTeacher(name, model, vocab_size=VOCAB)


def document_probabilities(teacher: LocalTeacher, ids: list[int]) -> np.ndarray:
    """Return (L - 1, V) next-token probabilities of a document scored without others."""
    with torch.no_grad():
        logits = teacher.model(input_ids=torch.tensor([ids])).logits[0, :-1]
    return logits.double().softmax(-1).numpy()


def naive_ece(confidence: list[float], correct: list[bool]) -> float:
    order = np.argsort(confidence, kind="stable")
    edges = np.linspace(0, len(order), min(15, len(order)) + 1).round().astype(int)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        chosen = order[low:high]
        gap = np.mean([correct[i] for i in chosen]) - np.mean([confidence[i] for i in chosen])
        total += len(chosen) / len(order) * abs(gap)
    return total


def naive_figures(student: LocalTeacher, teachers: list[LocalTeacher]) -> dict[str, float]:
    """Compute all metrics with loops over documents, for uniform weights and a linear pool."""
    sums = {"nll": 0.0, "entropy": 0.0, "kl": 0.0, "fused": 0, "first": 0, "top1": 0, "bytes": 0}
    sums["acceptance"] = 0.0
    confidence, correct = [], []
    for texts in TEXTS.values():
        for text in texts:
            # The EOS token after each text has no bytes.
            ids = tiny.tiny_tokenizer()(text)["input_ids"] + [tiny.tiny_tokenizer().eos_token_id]
            first = tiny.tiny_tokenizer().decode(ids[:1])
            sums["bytes"] += len(text.encode()) - len(first.encode())
            q = document_probabilities(student, ids)
            outputs = [document_probabilities(teacher, ids) for teacher in teachers]
            for t, label in enumerate(ids[1:]):
                p = sum(output[t] for output in outputs) / len(outputs)
                sums["nll"] -= math.log(q[t, label])
                sums["entropy"] -= sum(x * math.log(x) for x in q[t])
                sums["kl"] += sum(a * math.log(a / b) for a, b in zip(p, q[t], strict=True))
                sums["fused"] += int(p.argmax() == q[t].argmax())
                # Naively: each token v is drafted with Q_v, and kept with min(1, P_v / Q_v).
                pairs = zip(outputs[0][t], q[t], strict=True)
                sums["acceptance"] += sum(b * min(1.0, a / b) for a, b in pairs)
                sums["first"] += int(outputs[0][t].argmax() == q[t].argmax())
                correct.append(bool(q[t].argmax() == label))
                confidence.append(float(q[t].max()))
    size = len(correct)
    nll = sums["nll"] / size
    return {
        "nll": nll,
        "perplexity": math.exp(nll),
        "bits_per_byte": sums["nll"] / math.log(2) / sums["bytes"],
        "entropy": sums["entropy"] / size,
        "overconfidence": nll - sums["entropy"] / size,
        "ece": naive_ece(confidence, correct),
        "top1": sum(correct) / size,
        "kl_to_fused": sums["kl"] / size,
        "agreement_fused": sums["fused"] / size,
        # Agreement with the first teacher.
        "agreement": sums["first"] / size,
        "acceptance": sums["acceptance"] / size,
        "num_tokens": size,
    }


def test_figures_equal_naive_loops() -> None:
    student, teachers = local("student", 0), [local("a", 1), local("b", 2)]
    expected = naive_figures(student, teachers)
    fusion, data = Fusion(weighting=Uniform()), text_dataset(packing=False)
    scored = score_models([student], teachers, fusion, Windows.spread(data, 2))["student"]
    figures = scored.scores().to_json()
    figures["agreement"] = figures["agreement"]["a"]  # type: ignore[index]
    acceptance: Any = figures["acceptance"]
    assert list(acceptance) == ["a", "b"]
    low, high = acceptance["a"]["interval"]
    figures["acceptance"] = acceptance["a"]["value"]
    assert low < figures["acceptance"] < high
    for key, value in expected.items():
        assert figures[key] == pytest.approx(value, rel=2e-5, abs=1e-6), key


def test_acceptance_of_one_model_by_itself_and_by_a_disjoint_one() -> None:
    """A model accepts all of its own drafts, and none outside its support. Both are symmetric."""
    logp_nV = (3 * torch.randn(6, 10)).log_softmax(1)
    other_nV = (3 * torch.randn(6, 10)).log_softmax(1)
    torch.testing.assert_close(scoring.acceptance(logp_nV, logp_nV), torch.ones(6))
    total_n = (logp_nV.exp() - other_nV.exp()).abs().sum(1) / 2
    torch.testing.assert_close(scoring.acceptance(logp_nV, other_nV), 1 - total_n)
    halves = torch.zeros(2, 10).index_fill(1, torch.arange(5), -torch.inf).log_softmax(1)
    assert scoring.acceptance(halves, halves.flip(1)).tolist() == [0.0, 0.0]


def test_only_models_that_are_no_teachers_are_drafts() -> None:
    teachers = [local("a", 1), local("b", 2)]
    scored = score_models(teachers, teachers, Fusion(), Windows.spread(text_dataset(), 2))
    assert not any(one.scores().acceptance for one in scored.values())


def test_the_calibration_error_has_fifteen_bins_of_equal_mass() -> None:
    """Accuracy alternates below and above confidence by fifteenths, so fewer bins see less."""
    size = 15 * 8
    confidence_N = np.linspace(0.2, 0.8, size).astype(np.float32)
    fifteenth_N = np.arange(size) // 8
    scored = metrics_of([1.0] * size, [0] * size)
    scored = replace(
        scored, confidence_N=confidence_N, is_correct_N=fifteenth_N % 2 == 0, entropy_N=confidence_N
    )
    expected = naive_ece(confidence_N.tolist(), (fifteenth_N % 2 == 0).tolist())
    assert scored.ece == pytest.approx(expected, rel=1e-6)
    assert scored.ece == pytest.approx(
        np.abs((fifteenth_N % 2 == 0) - confidence_N).mean(), rel=1e-6
    )
    bins = scored.scores().to_json()["reliability"]
    assert bins["count"] == [8] * 15  # type: ignore[index]
    assert scored.scores().to_json()["entropy_bins"]["count"] == [8] * 15  # type: ignore[index]


def test_fused_target_agrees_with_itself() -> None:
    teachers = [local("a", 1), local("b", 2)]
    scored = score_models(teachers, teachers, Fusion(), Windows.spread(text_dataset(), 2))
    assert list(scored) == ["a", "b", FUSED]
    fused = scored[FUSED].scores().to_json()
    assert fused["kl_to_fused"] == 0.0
    assert fused["agreement_fused"] == 1.0
    agreement: Any = fused["agreement"]
    assert agreement["a"] == scored["a"].scores().to_json()["agreement_fused"]
    assert scored["a"].scores().to_json()["agreement"]["a"] == 1.0  # type: ignore[index]
    assert scored["a"].scores().to_json()["agreement"]["b"] < 1.0  # type: ignore[index]


def test_a_single_teacher_is_its_fused_target() -> None:
    teacher = local("a", 1)
    scored = score_models([teacher], [teacher], Fusion(), Windows.spread(text_dataset(), 2))
    figures = scored["a"].scores().to_json()
    assert figures["kl_to_fused"] == pytest.approx(0.0, abs=1e-7)
    assert figures["agreement_fused"] == 1.0
    assert figures["nll"] == pytest.approx(scored[FUSED].nll, rel=1e-6)


def assert_same(first: dict[str, Metrics], other: dict[str, Metrics]) -> None:
    assert list(first) == list(other)
    for name in first:
        a, b = first[name].scores().to_json(), other[name].scores().to_json()
        for key in ("nll", "bits_per_byte", "entropy", "ece", "top1", "kl_to_fused"):
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-6), (name, key)
        assert a["num_tokens"] == b["num_tokens"]
        assert a["num_bytes"] == b["num_bytes"]
        assert a["agreement"] == b["agreement"]


@pytest.mark.parametrize(
    ("packing", "batch_size", "is_cut"), [(False, 2, False), (True, 1, False), (True, 4, True)]
)
def test_layout_and_block_size_do_not_matter(
    packing: bool, batch_size: int, is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, fusion = [local("a", 1), local("b", 2)], Fusion(weighting=PrefixLikelihood(eta=0.5))
    base = score_models(models, models, fusion, Windows.spread(text_dataset(max_length=64), 2))
    data = text_dataset(packing=packing, max_length=64)
    if is_cut:
        # Down to strips of one row.
        monkeypatch.setattr(buffered, "BUFFER_BYTES", 1)
        monkeypatch.setattr(buffered, "CPU_STRIP_BYTES", 1)
    other = score_models(models, models, fusion, Windows.spread(data, batch_size))
    assert_same(base, other)


def test_each_scorer_runs_once_per_batch() -> None:
    dataset = id_dataset([[1, 2, 3, 4]] * 4, ["x"] * 4, max_length=8)
    teacher = BigramTeacher("a", bigram_logits(vocab_size=8, step=1, sharpness=2.0))
    score_models([teacher], [teacher], Fusion(), Windows.spread(dataset, 1))
    # Four documents of four tokens fill two windows of eight.
    assert teacher.num_calls == len(dataset) == 2


def test_batches_are_freed_after_scoring() -> None:
    """Only columns on the CPU are kept: batches on the accelerator would be a leak."""
    live: list[weakref.ref] = []
    max_live = 0

    class Watching(BigramTeacher):
        def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> Answer:
            nonlocal max_live
            live.append(weakref.ref(batch.input_ids))
            max_live = max(max_live, sum(ref() is not None for ref in live))
            return super().score(batch, rows, taps)

    dataset = id_dataset([[1, 2, 3, 4]] * 12, ["x"] * 12, max_length=8)
    teacher = Watching("a", bigram_logits(vocab_size=8, step=1, sharpness=2.0))
    score_models([teacher], [teacher], Fusion(), Windows.spread(dataset, 1))
    run_preflight([teacher], dataset, batch_size=1)
    assert len(live) >= 2 * len(dataset)
    assert max_live <= 2, "only the previous batch may still be alive"


def test_an_unavailable_accelerator_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA build of torch names CUDA as its accelerator even on machines without one."""

    def current(check_available: bool = False) -> torch.device | None:
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    batch, rows, _ = next(Windows.spread(id_dataset([[1, 2, 3]], ["x"]), 1).batches())
    assert batch.input_ids.device.type == rows.index.device.type
    assert torch.cuda.is_available() or rows.index.device.type != "cuda"


def test_domains_add_up() -> None:
    scored = score_models([local("a", 1)], [], None, Windows.spread(text_dataset(), 2))["a"]
    figures = scored.scores().to_json()
    domains = figures["domains"]
    assert list(domains) == ["code", "prose"]  # type: ignore[call-overload]
    rows = list(domains.values())  # type: ignore[attr-defined]
    assert sum(row["num_tokens"] for row in rows) == figures["num_tokens"]
    total = sum(row["nll"] * row["num_tokens"] for row in rows)
    assert total == pytest.approx(scored.nll * len(scored.targets))
    is_prose_N = scored.targets.samples_N < len(TEXTS["prose"])
    assert rows[1]["num_tokens"] == is_prose_N.sum()
    assert rows[1]["nll"] == pytest.approx(float(scored.nll_N[is_prose_N].mean()))
    assert figures["kl_to_fused"] is None
    assert figures["agreement"] == {}


def test_max_tokens_reads_a_part() -> None:
    dataset = id_dataset([[1, 2, 3, 4] * 4] * 20, ["x"] * 20, max_length=16)
    teacher = BigramTeacher("a", bigram_logits(vocab_size=8, step=1, sharpness=2.0))
    scored = score_models([teacher], [], None, Windows.spread(dataset, 3, 60))["a"]
    # A window has 15 targets, so 60 tokens are 4 of the 20 windows.
    assert len(scored.targets) == 60
    assert sorted(set(scored.targets.samples_N)) == [0, 5, 10, 15]


def test_duplicate_model_names() -> None:
    models = [local("a", 1), local("a", 2)]
    with refused(CollegiumError, "score_models"):
        score_models(models, [], None, Windows.spread(text_dataset(), 2))


def test_nothing_to_score() -> None:
    empty: PackedDataset = id_dataset([[1]], ["x"])
    with refused(DataError, "evaluation"):
        score_models([local("a", 1)], [], None, Windows.spread(empty, 2))


def test_a_model_with_nan_is_named() -> None:
    broken = BigramTeacher("broken", torch.full((8, 8), math.nan))
    with refused(ModelError, "model `broken`"):
        score_models([broken], [], None, Windows.spread(id_dataset([[1, 2, 3]], ["x"]), 1))


def metrics_of(nll: list[float], samples: list[int]) -> Metrics:
    size = len(nll)
    targets = ScoredTokens(np.array(samples), np.zeros(size, int), np.ones(size, int), ("x",))
    ones = np.ones(size, np.float32)
    values = np.array(nll, np.float32)
    return Metrics(
        targets=targets, nll_N=values, entropy_N=ones, confidence_N=ones, is_correct_N=ones > 0
    )
