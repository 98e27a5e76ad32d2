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

    Source: FitNets, arXiv 1412.6550, with normalized states. The options `raw_mse`, `cka` and
    `adapters: shared` are for comparisons.
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
        widths = [[teacher_widths[name][tap] for _, tap in p] for name, p in self.pairs.items()]
        is_shared = self.options.adapters == "shared"
        # All teachers are compared in the width of the narrowest, or each in its own.
        targets = [
            [min(column) for column in zip(*widths, strict=True)] if is_shared else row
            for row in widths
        ]
        self._projections = [
            [_projection(*pair, generator) for pair in zip(row, target, strict=True)]
            for row, target in zip(widths, targets, strict=True)
        ]
        adapters = [
            [
                _adapter(student_widths[tap], width, generator)
                for (tap, _), width in zip(pairs, target, strict=True)
            ]
            for pairs, target in zip(self.pairs.values(), targets, strict=True)
        ]
        if is_shared:
            adapters = adapters[:1] * len(adapters)
        if self.options.loss == "cka":
            adapters = []
        # ModuleList, not ModuleDict: names of teachers may contain dots, module names may not.
        self.adapters = nn.ModuleList(map(nn.ModuleList, adapters))

    def pair_values(
        self, teacher: int, student: HiddenRows, answer: Answer, rows: Rows
    ) -> list[Tensor]:
        pairs = self.pairs[answer.name]
        states = [(student.features[a], answer.features[b].detach()) for a, b in pairs]
        if self.options.loss == "cka":
            return [cka_distance(*pair) for pair in states]
        adapters = cast(list[list[nn.Linear]], self.adapters)[teacher]
        values = []
        for (ours, theirs), linear, projection in zip(
            states, adapters, self._projections[teacher], strict=True
        ):
            if projection is not None:
                theirs = theirs.to(projection.dtype) @ projection.to(theirs.device)
            values.append(_distance(linear, ours, theirs, self.options.loss))
        return values


def _adapter(student_width: int, teacher_width: int, generator: torch.Generator) -> nn.Linear:
    """Create a linear map without bias that initially preserves the size of its inputs."""
    # skip_init: the default initialization would advance the global random generator.
    adapter = nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False)
    nn.init.normal_(cast(Tensor, adapter.weight), std=student_width**-0.5, generator=generator)
    return cast(nn.Linear, adapter)


def _projection(width: int, narrow: int, generator: torch.Generator) -> Tensor | None:
    """Return a random (D, d) matrix with orthonormal columns, None for equal widths."""
    if width == narrow:
        return None
    return torch.linalg.qr(torch.randn(width, narrow, generator=generator))[0]


def cka_distance(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """1 - |Y^T X|^2 / (|X^T X| |Y^T Y|) at each row, (N,): the same value, of all rows together.

    X and Y are the states minus their means over the rows, |.| is the Frobenius norm. 1 where one
    side is constant. Unlike other terms it depends on how a step is split into micro-batches.

    Source: Kornblith et al. 2019, "Similarity of neural network representations revisited",
    arXiv 1905.00414, equation 4.
    """
    x_ND, y_ND = (_centered(states) for states in (student_ND, teacher_ND))
    cross, own, theirs = (a.T @ b for a, b in ((y_ND, x_ND), (x_ND, x_ND), (y_ND, y_ND)))
    # Unlike a square root of squares, a norm has a finite gradient at 0.
    size = torch.linalg.matrix_norm(own) * torch.linalg.matrix_norm(theirs)
    is_constant = size == 0
    distance = 1 - cross.square().sum() / size.masked_fill(is_constant, 1.0)
    return distance.expand(len(student_ND))


def _centered(states_ND: Tensor) -> Tensor:
    """States in float32 or wider minus their mean over the rows, at most 1 in size."""
    states_ND = states_ND.to(torch.promote_types(states_ND.dtype, torch.float32))
    states_ND = states_ND - states_ND.mean(0)
    largest = states_ND.detach().abs().amax() if states_ND.numel() else states_ND.new_zeros(())
    return states_ND / largest.masked_fill(largest == 0, 1.0)


def _distance(adapter: nn.Linear, student_ND: Tensor, teacher_ND: Tensor, loss: str) -> Tensor:
    """(N, D_s), (N, D) -> (N,)."""
    if loss == "raw_mse":
        ours_ND = adapter(student_ND.to(adapter.weight.dtype))
        return (ours_ND - teacher_ND.to(ours_ND.dtype)).square().sum(-1)
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
