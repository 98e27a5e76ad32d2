"""Sweep of a preflight over the teachers: scalars at every temperature, and their disagreement.

Shapes: N rows of the calibration split, n block of rows, V vocabulary, K teachers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collegium.distributions import Answer, Teacher
from collegium.evaluate.metrics import Metrics, ScoredTokens
from collegium.evaluate.scoring import Windows
from collegium.fusion.buffered import buffer_rows, buffered, split_rows, strips_of, vocab_size_of
from collegium.fusion.calibration import TEMPERATURES, GridReader, TemperatureTables
from collegium.fusion.pools import TeacherReader
from collegium.fusion.weighting import RowStats
from collegium.kernels.plain import strips
from collegium.kernels.rows import RawRows, top_tokens
from collegium.types import map_tensors

NUM_BYTES = 2**28
"""Memory for logits by default."""

JSD_ROWS = 4096
"""Approximate number of rows on which the disagreement of the teachers is measured."""

MAX_BUFFERS = 6
"""Further (n, V) buffers in use besides those of the teachers' logits."""


@dataclass(frozen=True, eq=False)
class Scalars:
    """Scalars of each teacher on the calibration split, and the disagreement of each pair."""

    tables: TemperatureTables
    targets: ScoredTokens
    jsd_KK: Tensor
    """Mean Jensen-Shannon divergence of each pair in nats, float64."""
    differs_KK: Tensor
    """Share of rows on which the most likely tokens of a pair differ, float64."""

    def metrics(self, teacher: str) -> Metrics:
        """Return the metrics of one raw teacher."""
        stats = self.tables.stats({}, [teacher])
        label_logp_N, max_logp_N = stats.label_logp_KN[0], stats.max_logp_KN[0]
        return Metrics(
            targets=self.targets,
            nll_N=-label_logp_N.float().numpy(),
            entropy_N=stats.entropy_KN[0].float().numpy(),
            confidence_N=max_logp_N.exp().float().numpy(),
            # No argmax is stored; a tie at the maximum counts as correct.
            is_correct_N=(label_logp_N == max_logp_N).numpy(),
        )


@torch.no_grad()
def sweep_teachers(
    teachers: Sequence[Teacher],
    split: Windows,
    *,
    with_consensus: bool = True,
    num_bytes: int = NUM_BYTES,
) -> Scalars:
    """Score each teacher once on the chosen windows and keep only scalars.

    Each head is applied once per row.

    Args:
        teachers: live teachers, or all read from a per-teacher cache. The disagreement of cached
            teachers is measured on their stored tokens, with the remaining mass spread evenly.
        split: the windows.
        with_consensus: whether to measure the consensus of live teachers.
        num_bytes: memory for logits.

    Raises:
        DataError: the windows have no target tokens.
    """
    stored_at = teachers[0].capabilities.temperatures
    grid = TEMPERATURES if stored_at is None else sorted((1.0, *stored_at))
    grid_reader = GridReader(grid)
    tables: list[TemperatureTables] = []
    disagreement: list[tuple[Tensor, Tensor, int]] = []
    tokens: list[ScoredTokens] = []
    step = max(1, int(split.counts().sum()) // JSD_ROWS)
    has_consensus = with_consensus and stored_at is None
    for answers, rows, batch_tokens in split.answers(teachers):
        vocab_size, size = buffer_sizes(answers, num_bytes)
        answers = buffered(answers, size)
        columns: dict[str, list[RowStats]] = {answer.name: [] for answer in answers}
        kl = []
        # Every reader reads the block that is in the buffers.
        for block in split_rows(slice(0, len(rows)), size):
            for answer in answers:
                stats = grid_reader.read(answer.distribution, rows.labels[block], block)
                columns[answer.name].append(map_tensors(stats, Tensor.cpu))
            if has_consensus:
                reader = TeacherReader(answers, rows, {})
                for strip in strips_of(block, vocab_size, rows.labels.device):
                    kl.append(reader.stats(strip, consensus=True).consensus_kl().cpu())
            disagreement += _disagreement(answers, block, step)
        kl_KN = torch.cat(kl, dim=1) if has_consensus else None
        stats = {name: RowStats.cat(parts) for name, parts in columns.items()}
        tables.append(TemperatureTables(grid, stats, rows.to(torch.device("cpu")), kl_KN))
        tokens.append(batch_tokens)
    targets = ScoredTokens.cat(tokens)
    jsd, differs, counts = zip(*disagreement, strict=True)
    zero_KK, num_rows = torch.zeros_like(jsd[0]), sum(counts)
    return Scalars(
        TemperatureTables.cat(tables),
        targets,
        sum(jsd, start=zero_KK) / num_rows,
        sum(differs, start=zero_KK) / num_rows,
    )


def buffer_sizes(answers: Sequence[Answer], num_bytes: int = NUM_BYTES) -> tuple[int, int]:
    """Return V, and the rows of each buffer of logits."""
    vocab_size = vocab_size_of(answers[0].distribution)
    return vocab_size, buffer_rows(vocab_size, num_bytes // (len(answers) + MAX_BUFFERS))


def _disagreement(
    answers: Sequence[Answer], block: slice, step: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield sums over every `step`-th row: (K, K) JSD and different top-1 tokens, and the count."""
    first = block.start + -block.start % step
    if first >= block.stop:
        return
    logits = [answer.distribution.logits(slice(first, block.stop, step)) for answer in answers]
    for strip in strips(RawRows(logits[0])):
        logits_KnV = torch.stack([x[strip].to(logits[0].device) for x in logits])
        top1_Kn = torch.stack([top_tokens(logits_nV) for logits_nV in logits_KnV])
        differs_KK = (top1_Kn[:, None] != top1_Kn[None]).sum(-1)
        jsd_KK = pairwise_jsd(logits_KnV.log_softmax(-1)).sum(-1)
        yield jsd_KK.double().cpu(), differs_KK.double().cpu(), top1_Kn.shape[1]


def pairwise_jsd(logp_KnV: Tensor) -> Tensor:
    """Return JSD(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2, (K, n, V) -> (K, K, n) in nats."""
    prob_KnV = logp_KnV.exp()
    entropy_Kn = torch.special.entr(prob_KnV).sum(-1)
    jsd_KKn = entropy_Kn.new_zeros(len(entropy_Kn), *entropy_Kn.shape)
    # Pair by pair: all at once would take a (K, K, n, V) buffer.
    for i in range(len(prob_KnV)):
        for j in range(i):
            mixture_n = torch.special.entr((prob_KnV[i] + prob_KnV[j]) / 2).sum(-1)
            jsd_n = mixture_n - (entropy_Kn[i] + entropy_Kn[j]) / 2
            # Rounding can push the JSD of equal distributions below 0.
            jsd_KKn[i, j] = jsd_KKn[j, i] = jsd_n.clamp(min=0.0)
    return jsd_KKn
