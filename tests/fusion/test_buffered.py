"""Buffered logits: equal values in any order of reading, and one product with the head per row."""

from __future__ import annotations

import torch

from collegium.distributions import Answer, HiddenRows
from collegium.fusion.buffered import BufferedRows, buffered, split_rows
from collegium.fusion.fuse import Fusion, StreamedTarget, fuse
from collegium.fusion.rules import Consensus, Entropy, PrefixLikelihood, Uniform
from collegium.types import Head, Rows

N, V, D = 37, 11, 5


class CountedRows(HiddenRows):
    """Records the rows whose product with the head was computed."""

    __slots__ = ()
    computed: list[int] = []  # noqa: RUF012

    def raw(self, block, workspace, buffer):
        self.computed.extend(range(*block.indices(len(self))))
        return super().raw(block, workspace, buffer)


def hidden(seed: int, dtype: torch.dtype = torch.float32, **head: float) -> CountedRows:
    torch.manual_seed(seed)
    weight_VD = (3 * torch.randn(V, D)).to(dtype)
    return CountedRows(torch.randn(N, D).to(dtype), Head(weight_VD, None, **head))


def rows() -> Rows:
    zero_N = torch.zeros(N, dtype=torch.int64)
    labels_N = torch.arange(N) % V
    return Rows(
        index=torch.arange(N), labels=labels_N, documents=torch.arange(N) // 9, samples=zero_N
    )


def test_every_block_has_the_values_of_the_distribution() -> None:
    for inner in (
        hidden(0), hidden(1, torch.float64), hidden(2, torch.bfloat16), hidden(3, softcap=4.0)
    ):  # fmt: skip
        held = BufferedRows(inner, 8)
        for block in (
            slice(0, 3),
            slice(3, 8),
            slice(6, 20),
            slice(1, 2),
            slice(30, N),
            slice(2, 30, 7),
        ):
            torch.testing.assert_close(held.logits(block), inner.logits(block), rtol=0, atol=1e-5)
        picked_m = torch.tensor([0, 5, 6, 20, 36])
        torch.testing.assert_close(
            held.take(picked_m).logits(slice(1, 5)), inner.take(picked_m).logits(slice(1, 5))
        )


def test_heads_are_applied_once_or_twice_for_any_number_of_fusions() -> None:
    streaming = [Uniform(), PrefixLikelihood(), Entropy()]
    others = [Entropy(form="complement"), Entropy(granularity="sequence"), Consensus()]
    for weightings, num_products in ((streaming, 1), ([*streaming, *others], 2)):
        fusions = [
            Fusion(weighting=weighting, pool=pool)
            for weighting in weightings
            for pool in ("linear", "log_linear", "power_mean")
        ]
        CountedRows.computed.clear()
        answers = [Answer(name, hidden(seed)) for seed, name in enumerate("ab")]
        members = buffered(answers, 16)
        targets = [fuse(fusion, members, rows()) for fusion in fusions]
        strips = split_rows(slice(0, N), 3)
        for strip in strips:
            for target in targets:
                assert isinstance(target, StreamedTarget)
                target.read_ahead(strip)
        logp = [[target.block(strip).logp().clone() for target in targets] for strip in strips]
        products = len(answers) * num_products * N
        # Strips of 3 rows do not divide a buffer of 16: a strip across its end starts a new one.
        assert len(CountedRows.computed) <= products * (1 + 2 / 14)
        for number, fusion in enumerate(fusions):
            whole = fuse(fusion, answers, rows()).block(slice(0, N)).logp()
            parts = torch.cat([part[number] for part in logp])
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
