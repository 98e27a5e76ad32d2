"""Codec: unbiased draws, an exact tail, and no dependence on batching."""

import numpy as np
import pytest
import torch

from collegium.cache.codecs.targets import SCALARS, STEP, TargetCodec, draw, id_dtype, row_keys
from collegium.cache.options import Samples, TopK
from refusals import refused

V = 60


def _logp(num_rows: int, vocab_size: int = V, *, scale: float = 2.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(scale * torch.randn(num_rows, vocab_size, generator=generator), -1)


def _keys(num_rows: int, seed: int = 3) -> np.ndarray:
    return row_keys(seed, np.full(num_rows, 7, np.uint64), np.arange(num_rows))


def _scalars(num_rows: int) -> dict[str, torch.Tensor]:
    return {name: torch.full((num_rows,), float(i)) for i, name in enumerate(SCALARS)}


def _encode(targets, logp, keys=None):
    keys = _keys(len(logp)) if keys is None else keys
    return _codec(targets, logp.shape[1]).encode(logp, keys, _scalars(len(logp)))


def _codec(targets, vocab_size: int = V) -> TargetCodec:
    return TargetCodec("fused", targets, vocab_size)


def test_draws_are_unbiased() -> None:
    """Chi-square of 400,000 stored draws against the distribution."""
    num_rows, num_draws = 8000, 50
    logp_V = _logp(1)[0]
    encoded = _encode(Samples(draws=num_draws), logp_V.repeat(num_rows, 1))
    counts = np.bincount(encoded["ids"], weights=encoded["counts"], minlength=V)
    expected = logp_V.double().exp().numpy() * num_rows * num_draws
    chi_square = ((counts - expected) ** 2 / expected).sum()
    # 59 degrees of freedom: mean 59, standard deviation 10.9.
    assert 30 < chi_square < 100
    assert counts.sum() == num_rows * num_draws


def test_draws_of_a_row_are_independent() -> None:
    """The variance of a count over rows is N p (1 - p): neither stratified nor correlated."""
    num_rows, num_draws = 20_000, 20
    drawn = draw(torch.log(torch.tensor([[0.3, 0.7]])).repeat(num_rows, 1), _keys(num_rows), 20)
    counts = (drawn == 0).sum(1).double()
    assert counts.mean().item() == pytest.approx(num_draws * 0.3, abs=0.06)
    assert counts.var().item() == pytest.approx(num_draws * 0.21, rel=0.05)
    neighbors = torch.corrcoef(torch.stack([counts[:-1], counts[1:]]))[0, 1]
    assert abs(neighbors.item()) < 0.03


def test_draws_depend_only_on_seed_document_and_offset() -> None:
    logp = _logp(1).repeat(6, 1)
    documents = np.array([1, 1, 2, 2, 1, 1], np.uint64)
    offsets = np.array([4, 5, 4, 5, 4, 5])
    drawn = draw(logp, row_keys(0, documents, offsets), 40)
    assert torch.equal(drawn[:2], drawn[4:])
    assert len({tuple(row.tolist()) for row in drawn}) == 4
    assert not torch.equal(drawn, draw(logp, row_keys(1, documents, offsets), 40))
    single = draw(logp[:1], row_keys(0, documents[:1], offsets[:1]), 40)
    assert torch.equal(single[0], drawn[0]), "the other rows of a block must not matter"


def test_draws_invert_the_cdf_in_float64() -> None:
    """In float32 the sums of a large vocabulary would move draws to other tokens."""
    logp = _logp(4, 50_000, scale=0.1)
    prob = logp.double().exp().numpy()
    numbers = np.array([_unit_numbers(int(key), 4000) for key in _keys(4)])
    for row in range(4):
        cdf = np.cumsum(prob[row])
        expected = np.searchsorted(cdf, numbers[row] * cdf[-1], side="right")
        assert draw(logp, _keys(4), 4000)[row].tolist() == expected.tolist()


def _unit_numbers(key: int, count: int) -> list[float]:
    """SplitMix64 in Python integers: the numbers are part of the format."""
    numbers, mask = [], 2**64 - 1
    for step in range(1, count + 1):
        z = (key + step * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(((z ^ (z >> 31)) >> 11) * 2.0**-53)
    return numbers


def test_a_level_is_a_64th_of_a_nat() -> None:
    logp = torch.tensor([[-1.0, -2.0, -3.0]]).double()
    logp = torch.cat([logp, torch.log1p(-logp.exp().sum(1, keepdim=True))], 1)
    assert set(_encode(TopK(k=4), logp)["levels"].tolist()) >= {64, 128, 192}


def test_a_tail_is_never_above_the_whole_mass() -> None:
    """It lacks at least 1 / V, which is more than the rounding of a sum in float32."""
    for vocab_size in (1_000, 30_000, 50_000):
        logp = _logp(64, vocab_size, scale=0.01)
        columns = _encode(TopK(k=1), logp)
        assert (columns["log_tail"] <= 0).all()


def test_impossible_tokens_are_never_drawn() -> None:
    logp = _logp(500)
    logp[:, ::3] = -torch.inf
    logp[:, -1] = -torch.inf
    logp = logp.log_softmax(-1)
    encoded = _encode(Samples(draws=64), logp)
    assert (encoded["ids"] % 3 != 0).all()
    assert encoded["ids"].max() < V - 1


def test_stored_draws_decode_to_the_drawn_counts() -> None:
    logp, keys = _logp(9), _keys(9)
    encoded = _encode(Samples(draws=30), logp, keys)
    rows = _codec(Samples(draws=30)).decode(encoded)
    dense = rows.logits(slice(0, 9)).exp()
    expected = torch.stack([row.bincount(minlength=V).float() / 30 for row in draw(logp, keys, 30)])
    assert torch.allclose(dense, expected)
    assert rows.log_tail is None
    assert rows.block(slice(2, 5)).logits(slice(0, 3)).equal(rows.logits(slice(2, 5)))


@pytest.mark.parametrize("k", [1, 7, 59, 60, 100])
def test_top_k_meets_its_error_bound_and_has_an_exact_tail(k: int) -> None:
    logp = _logp(40, scale=4.0).double()
    rows = _codec(TopK(k=k)).decode(_encode(TopK(k=k), logp))
    kept = min(k, V)
    top = logp.topk(kept).values
    assert (rows.logp.view(40, kept) - top).abs().max() <= STEP
    tail = 1 - top.exp().sum(1)
    assert torch.allclose(rows.log_tail.double().exp(), tail, atol=1e-6)
    total = rows.logp.view(40, kept).double().exp().sum(1) + rows.log_tail.double().exp()
    assert torch.allclose(total, torch.ones(40, dtype=torch.float64), atol=1e-6)


def test_a_tail_below_rounding_is_kept() -> None:
    logp = torch.full((1, V), -40.0, dtype=torch.float64)
    logp[0, 5] = 0.0
    rows = _codec(TopK(k=1)).decode(_encode(TopK(k=1), logp))
    assert rows.log_tail.item() == pytest.approx(-40 + np.log(V - 1), abs=1e-5)
    assert rows.ids.tolist() == [5]


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32), (151_936, np.uint32)]
)
def test_the_largest_token_id_fits(vocab_size: int, dtype: type) -> None:
    assert id_dtype(vocab_size) is dtype
    logp = torch.full((1, vocab_size), -torch.inf)
    logp[0, vocab_size - 1] = 0.0
    for targets in (Samples(draws=300), TopK(k=1)):
        encoded = _encode(targets, logp)
        assert encoded["ids"].dtype == dtype
        assert _codec(targets, vocab_size).decode(encoded).ids.tolist() == [vocab_size - 1]


def test_the_dtype_of_counts_fits_the_number_of_draws() -> None:
    certain = torch.log(torch.tensor([[1.0, 0.0]]))
    for draws, dtype in ((255, np.uint8), (256, np.uint16)):
        encoded = _encode(Samples(draws=draws), certain)
        assert encoded["counts"].dtype == dtype
        assert encoded["counts"].tolist() == [draws]


def test_scalars_are_float16_and_finite() -> None:
    scalars = _scalars(1) | {"label_logp": torch.tensor([-1e30])}
    encoded = _codec(Samples()).encode(_logp(1), _keys(1), scalars)
    assert all(encoded[name].dtype == np.float16 for name in SCALARS)
    assert np.isfinite(encoded["label_logp"]).all()
    with refused(ValueError, "entropy: "):
        _codec(Samples()).encode(
            _logp(1), _keys(1), scalars | {"entropy": torch.tensor([torch.nan])}
        )


@pytest.mark.parametrize(
    "change",
    [
        {"counts": np.array([3, 3], np.uint8)},
        {"counts": np.array([0, 5], np.uint8)},
        {"vocabulary": np.array([1, V], np.uint16)},
        {"gaps": np.array([0, 2], np.uint16)},
        {"sizes": np.array([1], np.uint8)},
        {"sizes": np.array([2, 0], np.uint8)} | {n: np.zeros(2, np.float16) for n in SCALARS},
        {"entropy": np.zeros(2, np.float16)},
    ],
    ids=["counts", "no draw", "token id", "rank", "sizes", "empty row", "scalars"],
)
def test_columns_that_no_encoder_writes_are_refused(change: dict) -> None:
    codec = _codec(Samples(draws=5))
    packed = {
        "sizes": np.array([2], np.uint8),
        "gaps": np.array([0, 1], np.uint16),
        "counts": np.array([2, 3], np.uint8),
        "vocabulary": np.array([0, 1], np.uint16),
        **{name: np.zeros(1, np.float16) for name in SCALARS},
    }
    assert codec.unpack(packed, packed.pop("vocabulary"))["ids"].tolist() == [0, 1]
    packed |= {"vocabulary": np.array([0, 1], np.uint16)} | change
    with refused(ValueError):
        codec.unpack(packed, packed.pop("vocabulary"))


def test_both_ends_of_the_unit_interval_draw_possible_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = np.array([[0.0, 1 - 2.0**-53]])
    monkeypatch.setattr("collegium.cache.codecs.targets._uniforms", lambda keys, number: ends)
    logp = torch.log(torch.tensor([[0.0, 0.1, 0.7, 0.2, 0.0]]))
    assert draw(logp, _keys(1), 2).tolist() == [[1, 3]]
