"""Feature losses between adapted hidden states of the student and hidden states of the teachers.

Shapes: N rows, D width of the teacher's hidden states, K teachers with a feature term.

Each teacher and pair of layers has a trained adapter. In one shared space the sum of the K terms
would reduce to one term against the mean of K unrelated spaces. Both sides are normalized because
raw norms differ by orders of magnitude between model families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from collegium.distributions import Answer, HiddenRows
from collegium.losses.pairing import NO_ORIGINS, EmbeddingOptions, FeatureOptions, Origins
from collegium.losses.states import StateLoss
from collegium.types import Rows


class FeatureLoss(StateLoss):
    """Feature or embedding terms, with their trained adapters.

    F_k(n) = mean over the pairs of mean_d (norm(W f_student)_d - norm(f_teacher)_d)^2 with
    norm(x) = x / rms(x), or of 1 - cos(W f_student, f_teacher). The mean over the width keeps a
    term from growing with the model.

    Source: FitNets, arXiv 1412.6550, with normalized states.
    """

    def __init__(
        self,
        options: FeatureOptions | EmbeddingOptions,
        student_widths: Mapping[str, int],
        teacher_widths: Mapping[str, Mapping[str, int]],
        *,
        seed: int = 0,
        name: str | None = None,
        origins: Origins = NO_ORIGINS,
    ) -> None:
        """Build the adapters; `seed` determines their initial weights. See `StateLoss`."""
        super().__init__(options, student_widths, teacher_widths, name=name, origins=origins)
        generator = torch.Generator().manual_seed(seed)
        # ModuleList, not ModuleDict: names of teachers may contain dots, module names may not.
        self.adapters = nn.ModuleList(
            nn.ModuleList(
                _adapter(student_widths[ours], teacher_widths[name][theirs], generator)
                for ours, theirs in pairs
            )
            for name, pairs in self.pairs.items()
        )

    def pair_values(
        self, teacher: int, student: HiddenRows, answer: Answer, rows: Rows
    ) -> list[Tensor]:
        adapters, theirs = cast(list[list[nn.Linear]], self.adapters)[teacher], answer.features
        return [
            _distance(linear, student.features[ours], theirs[tap].detach(), self.options.loss)
            for (ours, tap), linear in zip(self.pairs[answer.name], adapters, strict=True)
        ]


def _adapter(student_width: int, teacher_width: int, generator: torch.Generator) -> nn.Linear:
    """Create a linear map without bias that initially preserves the size of its inputs."""
    # skip_init: the default initialization would advance the global random generator.
    adapter = nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False)
    nn.init.normal_(cast(Tensor, adapter.weight), std=student_width**-0.5, generator=generator)
    return cast(nn.Linear, adapter)


def _distance(adapter: nn.Linear, student_ND: Tensor, teacher_ND: Tensor, loss: str) -> Tensor:
    """(N, D_s), (N, D) -> (N,)."""
    ours_ND = _normalize(adapter(student_ND.to(adapter.weight.dtype)))
    theirs_ND = _normalize(teacher_ND).to(ours_ND.dtype)
    if loss == "cosine":
        return 1 - (ours_ND * theirs_ND).mean(-1)
    return (ours_ND - theirs_ND).square().mean(-1)


def _normalize(x_ND: Tensor) -> Tensor:
    """x / rms(x) in float32 or wider, the same at any scale of x; 0 for a zero state."""
    # The mean over D of the product of two normalized states is their cosine.
    x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    largest_N1 = x_ND.detach().abs().amax(-1, keepdim=True)
    # An epsilon would shrink small states. Divided by its largest entry, a state has a mean square
    # of at least 1 / D, and a zero state is left as it is, with a finite gradient.
    is_zero_N1 = largest_N1 == 0
    x_ND = x_ND / largest_N1.masked_fill(is_zero_N1, 1.0)
    return x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True).masked_fill(is_zero_N1, 1.0))
