"""The probability that teachers give to the tokens that the student's vocabulary leaves out."""

from __future__ import annotations

import torch

from collegium.evaluate.scoring import BLOCK_ELEMENTS, Windows
from collegium.models.loading import vocab_size_of
from collegium.run.context import RunContext
from collegium.storage.records import PreflightReport

MASS_TOKENS = 4096
"""Tokens of the calibration split on which the mass is measured."""


def with_cut_mass(report: PreflightReport, context: RunContext) -> PreflightReport:
    """Return the report with `cut_mass` of each teacher, or as it is if no token is cut."""
    used = context.used
    if used is None or len(used.kept_U) == vocab_size_of(context.whole_tokenizer):
        return report
    measured = {
        name: measure.model_copy(update={"cut_mass": cut_mass(context, name)})
        for name, measure in report.teachers.items()
    }
    return report.model_copy(update={"teachers": measured})


@torch.no_grad()
def cut_mass(context: RunContext, name: str) -> float:
    """Return m = (1 / N) sum_n sum_{v cut} P(v | x_n) of one teacher, which is loaded for it.

    The N rows x_n are about `MASS_TOKENS` of the calibration split. P is the distribution over the
    whole vocabulary at temperature 1.
    """
    assert context.used is not None
    size = vocab_size_of(context.whole_tokenizer)
    teacher = context.recipe.teachers[name].load(name, vocab_size=size, where=f"teachers.{name}")
    is_cut_V = torch.ones(size, dtype=torch.bool)
    is_cut_V[torch.from_numpy(context.used.kept_U)] = False
    split, batch_size = context.whole_datasets["calibration"], context.recipe.preflight.batch_size
    total, num_rows, step = 0.0, 0, max(1, BLOCK_ELEMENTS // size)
    for batch, rows, _ in Windows.spread(split, batch_size, MASS_TOKENS).batches():
        distribution = teacher.score(batch, rows).distribution
        for start in range(0, len(rows), step):
            prob_nV = distribution.logits(slice(start, start + step)).softmax(-1)
            total += float(prob_nV[:, is_cut_V.to(prob_nV.device)].sum(dtype=torch.float64))
        num_rows += len(rows)
    return total / num_rows
