"""Routing: the teacher of a row, only that teacher's head, its distribution bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from collegium.config.recipe import decode_fusion
from collegium.distributions import Answer, DenseRows
from collegium.errors import DataError, RecipeError
from collegium.fusion.conflict import TargetCorrection, TruthFallback
from collegium.fusion.fitted import Route
from collegium.fusion.fuse import Fusion, fuse
from collegium.fusion.options import describe, to_recipe
from collegium.fusion.rules import BestSingle, Uniform
from collegium.fusion.weighting import RowStats
from collegium.types import Rows, teacher_number
from fusion_cases import (
    NAMES,
    CountedRows,
    calibration_data,
    domains_of,
    fused,
    make_rows,
    make_teachers,
    stats_of,
)
from refusals import refused

K, V = 3, 6
ROUTE = Route(default="law", domains={"clinic": "medicine", "novel": "prose"})
DOCUMENTS = st.lists(st.integers(1, 5), min_size=1, max_size=6).map(
    lambda lengths: [d for d, length in enumerate(lengths) for _ in range(length)]
)
COLUMN = st.lists(st.sampled_from([None, *NAMES]), min_size=6, max_size=6)
quick = settings(max_examples=40, deadline=None)


def _zoo(documents: list[int], column: list[str | None] | None = None) -> tuple[Tensor, Rows]:
    """Logits (K, N, V) and rows; `column` holds the teacher of each document."""
    generator = torch.Generator().manual_seed(len(documents))
    logits_KNV = 3 * torch.randn(K, len(documents), V, generator=generator)
    labels = torch.randint(V, (len(documents),), generator=generator)
    rows = make_rows(labels, documents)
    if column is None:
        return logits_KNV, rows
    names = [column[number] for number in documents]
    numbers = torch.tensor([0 if name is None else teacher_number(name) for name in names])
    return logits_KNV, replace(rows, teachers=numbers)


def _expected(documents: list[int], column: list[str | None]) -> list[str]:
    """Teacher of each row: from the column, else the domain, else the default."""
    return [
        column[number] or ROUTE.domains.get(domain, ROUTE.default)
        for number, domain in zip(documents, domains_of(documents), strict=True)
    ]


@quick
@given(documents=DOCUMENTS, column=COLUMN, size=st.integers(1, 7))
def test_every_row_reproduces_its_teacher_bit_for_bit(documents, column, size):
    logits_KNV, rows = _zoo(documents, column)
    block = fused(Fusion(weighting=ROUTE), make_teachers(logits_KNV), rows, size)
    for t, name in enumerate(_expected(documents, column)):
        k = NAMES.index(name)
        assert torch.equal(block.logp()[t], logits_KNV[k, t].log_softmax(-1))
        assert block.weights_Kn[:, t].tolist() == [float(other == k) for other in range(K)]
        assert block.stats.entropy_KN[:, t].isnan().tolist() == [other != k for other in range(K)]
    assert block.disagreement_n().max() < 1e-6


@quick
@given(documents=DOCUMENTS, name=st.sampled_from(NAMES), size=st.integers(1, 7))
def test_all_rows_to_one_teacher_equals_best_single(documents, name, size):
    logits_KNV, rows = _zoo(documents, [name] * 6)
    teachers = make_teachers(logits_KNV)
    options = {"temperatures": {name: 1.7}, "pooled_temperature": 0.8}
    by_column = Fusion(weighting=ROUTE, **options)
    by_default = Fusion(weighting=Route(default=name), **options)
    single = fused(Fusion(weighting=BestSingle(teacher=name), **options), teachers, rows, size)
    for fusion, routed in ((by_column, rows), (by_default, replace(rows, teachers=None))):
        block = fused(fusion, teachers, routed, size)
        # Routing divides by the temperature, pooling multiplies by its inverse.
        torch.testing.assert_close(block.logp(), single.logp(), rtol=1e-6, atol=1e-6)
        assert torch.equal(block.weights_Kn, single.weights_Kn)


@quick
@given(documents=DOCUMENTS, column=COLUMN, cut=st.integers(1, 20))
def test_split_of_the_rows_changes_nothing(documents, column, cut):
    logits_KNV, rows = _zoo(documents, column)
    whole = fused(Fusion(weighting=ROUTE), make_teachers(logits_KNV), rows).logp()
    at = min(cut, len(rows))
    parts = [
        fused(Fusion(weighting=ROUTE), make_teachers(logits_KNV[:, part]), rows.part(part)).logp()
        for part in (slice(0, at), slice(at, len(rows)))
        if len(rows.labels[part])
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_only_the_head_of_the_routed_teacher_is_applied():
    logits_KNV, rows = _zoo([0] * 4 + [1] * 4 + [4] * 3)
    counted = [CountedRows(logits_NV) for logits_NV in logits_KNV]
    teachers = [Answer(name, scores) for name, scores in zip(NAMES, counted, strict=True)]
    fused(Fusion(weighting=ROUTE), teachers, rows, 4)
    # Blocks of each teacher's own rows.
    assert [scores.blocks for scores in counted] == [[(0, 4)], [(0, 4), (4, 7)], []]


@quick
@given(documents=DOCUMENTS, column=COLUMN, size=st.integers(1, 7))
def test_answers_for_only_the_routed_rows_suffice(documents, column, size):
    logits_KNV, rows = _zoo(documents, column)
    fusion = Fusion(weighting=ROUTE, temperatures={"law": 0.7})
    whole = fused(fusion, make_teachers(logits_KNV), rows, size)
    partial = [
        Answer(name, DenseRows(logits_KNV[k, row_m]), rows=row_m)
        for k, (name, row_m) in enumerate(zip(NAMES, ROUTE.shares(rows, NAMES), strict=True))
    ]
    assert torch.equal(fused(fusion, partial, rows, size).logp(), whole.logp())


def test_answers_for_other_rows_are_refused():
    logits_KNV, rows = _zoo([0, 0, 1])
    other = [
        Answer(name, DenseRows(logits_NV), rows=torch.tensor([2]))
        for name, logits_NV in zip(NAMES, logits_KNV, strict=True)
    ]
    with refused(ValueError, "teacher `law`: "):
        fuse(Fusion(weighting=ROUTE), other, rows)
    with refused(DataError, "teachers: "):
        fuse(Fusion(weighting=Uniform()), other, rows)


def test_unknown_teachers_are_refused():
    logits_KNV, rows = _zoo([0, 0, 1], ["pros", None, None, None, None, None])
    with refused(DataError, "teacher_ids: "):
        fuse(Fusion(weighting=ROUTE), make_teachers(logits_KNV), rows)
    with refused(RecipeError, "fusion.weighting.domains.clinic: got `med`"):
        route = Route(default="law", domains={"clinic": "med"})
        fuse(Fusion(weighting=route), make_teachers(logits_KNV), rows)
    with pytest.raises(ValidationError) as caught:
        Route(domains={"clinic": "law"})  # type: ignore[call-arg]
    assert caught.value.errors()[0]["loc"] == ("default",)


def test_column_takes_precedence_over_domain_and_domain_over_default():
    _, rows = _zoo([0, 1, 2, 4], ["prose", "law", None, None, None, None])
    shares = [row_m.tolist() for row_m in ROUTE.shares(rows, NAMES)]
    assert shares == [[1], [3], [0, 2]]
    without = replace(rows, domains=None, teachers=None)
    assert [len(row_m) for row_m in ROUTE.shares(without, NAMES)] == [4, 0, 0]


def test_single_teacher_has_no_disagreement_but_can_be_corrected():
    logits_KNV, rows = _zoo([0] * 3 + [1] * 4)
    teachers = make_teachers(logits_KNV)
    block = fused(Fusion(weighting=ROUTE, conflict=TruthFallback()), teachers, rows)
    assert block.conflict is not None
    assert block.conflict.disagreement_n.tolist() == [0.0] * 7
    assert block.conflict.kd_factor_n is not None
    assert block.conflict.kd_factor_n.tolist() == [1.0] * 7
    corrected = fused(Fusion(weighting=ROUTE, conflict=TargetCorrection()), teachers, rows)
    assert corrected.logp().argmax(-1).tolist() == rows.labels.tolist()


def test_fit_routes_each_domain_to_its_best_teacher():
    _, rows = _zoo([0] * 2 + [1] * 3)
    logp_KN = -torch.tensor(
        [[1.0, 1.0, 5.0, 5.0, 5.0], [4.0, 4.0, 2.0, 2.0, 9.0], [9.0, 9.0, 6.0, 6.0, 0.0]]
    )
    stats = RowStats(logp_KN, logp_KN, logp_KN)
    data = calibration_data(stats, rows, domains=["court", "clinic", "novel"])
    fitted = Route.fit(data)
    assert fitted == Route(default="law", domains={"court": "law", "clinic": "prose"})
    with refused(ValueError, "calibration: "):
        Route.fit(replace(data, rows=replace(rows, domains=None)))


def test_weights_from_scalars_equal_those_of_the_target():
    logits_KNV, rows = _zoo([0] * 3 + [1] * 4 + [2], ["law", "prose", None, None, None, None])
    teachers = make_teachers(logits_KNV)
    scores_KN = ROUTE.log_scores(stats_of(teachers, rows), rows, NAMES)
    block = fused(Fusion(weighting=ROUTE), teachers, rows)
    assert torch.equal(scores_KN.softmax(0).float(), block.weights_Kn)


def test_description_and_recipe_round_trip():
    fusion = Fusion(weighting=ROUTE)
    assert describe(fusion) == "route, linear"
    assert decode_fusion(to_recipe(fusion)) == fusion
