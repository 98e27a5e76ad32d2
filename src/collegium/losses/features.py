"""Feature losses between adapted hidden states of the student and hidden states of the teachers.

Shapes: N rows, D width of the teacher's hidden states, K teachers with a feature term.

Each teacher and pair of layers has a trained adapter. In one shared space the sum of the K terms
would reduce to one term against the mean of K unrelated spaces. Both sides are normalized because
raw norms differ by orders of magnitude between model families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from collegium.distributions import Answer
from collegium.errors import RecipeError, TrainingError, nearest
from collegium.losses.pairing import FeatureOptions, feature_map
from collegium.types import LossSum


class FeatureLoss(nn.Module):
    """One feature term per teacher, with its trained adapters and its dynamic scale.

    F_k(n) = mean over the pairs of mean_d (norm(W f_student)_d - norm(f_teacher)_d)^2 with
    norm(x) = x / rms(x), or of 1 - cos(W f_student, f_teacher). The mean over the width keeps a
    term from growing with the model.

    Source: FitNets, arXiv 1412.6550, with normalized states. The scale follows NVIDIA ModelOpt's
    `LogitsAndIntermediatesLossBalancer`.
    """

    scale_K: Tensor

    def __init__(
        self,
        options: FeatureOptions,
        student_widths: Mapping[str, int],
        teacher_widths: Mapping[str, Mapping[str, int]],
        *,
        seed: int = 0,
        origins: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    ) -> None:
        """Build the adapters; `seed` determines their initial weights.

        The widths are those of all taps of a model, in order of depth. `origins` are the layers
        that those of the student are copies of, by teacher.

        Raises:
            RecipeError: a named teacher or tap does not exist.
        """
        super().__init__()
        for name in options.teacher_weights:
            if name not in teacher_widths:
                raise RecipeError(
                    f"features.teacher_weights: got `{name}`; must be a teacher"
                    f"{nearest(name, teacher_widths)}"
                )
        self.options = options
        self.pairs = {
            name: feature_map(options, list(student_widths), list(widths), origins.get(name))
            for name, widths in teacher_widths.items()
            if options.teacher_weight(name) > 0
        }
        generator = torch.Generator().manual_seed(seed)
        # ModuleList, not ModuleDict: names of teachers may contain dots, module names may not.
        self.adapters = nn.ModuleList(
            nn.ModuleList(
                _adapter(student_widths[ours], teacher_widths[name][theirs], generator)
                for ours, theirs in pairs
            )
            for name, pairs in self.pairs.items()
        )
        self.register_buffer("scale_K", torch.ones(len(self.pairs)))
        self._sums: Tensor | None = None  # (1 + K,): distribution loss, then the terms

    @property
    def student_taps(self) -> list[str]:
        """Taps of the student that the terms read, without duplicates."""
        return list(dict.fromkeys(ours for pairs in self.pairs.values() for ours, _ in pairs))

    def teacher_taps(self, name: str) -> list[str]:
        """Return the taps that the term of one teacher reads, empty if it has no term."""
        return list(dict.fromkeys(theirs for _, theirs in self.pairs.get(name, [])))

    def weights(self) -> dict[str, float]:
        """Return the current factor of each term: weight * teacher weight * dynamic scale."""
        return {
            f"feature/{name}": self.options.teacher_weight(name) * scale
            for name, scale in zip(self.pairs, self.scale_K.tolist(), strict=True)
        }

    def forward(
        self, student_features: Mapping[str, Tensor], teachers: Sequence[Answer]
    ) -> dict[str, Tensor]:
        """Compute the feature term of each teacher per row.

        Student taps (N, D_s), teacher taps (N, D) -> `feature/NAME`: (N,) in float32 or wider.

        Raises:
            TrainingError: a teacher with a term is missing.
        """
        by_name = {teacher.name: teacher for teacher in teachers}
        losses: dict[str, Tensor] = {}
        adapters = cast(list[list[nn.Linear]], self.adapters)
        for (name, pairs), linears in zip(self.pairs.items(), adapters, strict=True):
            if name not in by_name:
                raise TrainingError(f"feature/{name}: teacher not scored; every term needs it")
            theirs = by_name[name].features
            values = [
                _distance(linear, student_features[ours], theirs[tap].detach(), self.options.loss)
                for (ours, tap), linear in zip(pairs, linears, strict=True)
            ]
            losses[f"feature/{name}"] = torch.stack(values).mean(0)
        return losses

    def added_to(
        self,
        loss: LossSum,
        student_features: Mapping[str, Tensor],
        answers: Sequence[Answer],
        *,
        measure: bool = False,
    ) -> LossSum:
        """Add the feature terms to a loss, and record their size for the next dynamic scales.

        `measure` also measures the gradient norm of each term.
        """
        factors = self.weights()
        sums = {name: value.sum() for name, value in self(student_features, answers).items()}
        total, norms = loss.total, dict(loss.grad_norms)
        if total.requires_grad and sums:
            reference = "kd" if "kd" in loss.terms else "ce"
            self.record(loss.weights[reference] * loss.terms[reference], sums)
        for name, value in sums.items():
            weighted = factors[name] * value
            total = total + weighted
            if measure and total.requires_grad:
                norms[name] = _grad_norm(weighted, student_features)
        terms = {**loss.terms, **{name: value.detach() for name, value in sums.items()}}
        weights = {**loss.weights, **factors}
        return replace(loss, total=total, terms=terms, weights=weights, grad_norms=norms)

    def record(self, reference: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Accumulate a micro-batch's sums over rows of the distribution loss and feature terms."""
        terms = [sums[f"feature/{name}"].detach() for name in self.pairs]
        step = torch.stack([reference.detach().to(terms[0].dtype), *terms])
        self._sums = step if self._sums is None else self._sums + step

    def end_step(self) -> None:
        """Update the dynamic scales from the sums of the optimizer step that just ended.

        The scales are constant within a step, and the first step has scale 1.
        """
        # Sums cover the whole step and all ranks, so any split of a batch gives the same gradient.
        # Scales per micro-batch would give small micro-batches the weight of large ones.
        sums, self._sums = self._sums, None
        if sums is None or not self.options.dynamic_scale:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        ratio_K = sums[0] / sums[1:]
        # Without rows, or with a loss of zero, a step has no usable ratio: keep the previous scale.
        is_usable_K = ratio_K.isfinite() & (ratio_K > 0)
        self.scale_K.copy_(torch.where(is_usable_K, ratio_K.to(self.scale_K.dtype), self.scale_K))


def _adapter(student_width: int, teacher_width: int, generator: torch.Generator) -> nn.Linear:
    """Create a linear map without bias that initially preserves the size of its inputs."""
    # skip_init: the default initialization would advance the global random generator.
    adapter = nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False)
    nn.init.normal_(cast(Tensor, adapter.weight), std=student_width**-0.5, generator=generator)
    return cast(nn.Linear, adapter)


def _distance(adapter: nn.Linear, student_ND: Tensor, teacher_ND: Tensor, loss: str) -> Tensor:
    """(N, D_s), (N, D) -> (N,)."""
    # Autocast would run the adapter and the norms in half precision.
    with torch.autocast(student_ND.device.type, enabled=False):
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


def _grad_norm(value: Tensor, features: Mapping[str, Tensor]) -> Tensor:
    """Norm of a term's gradient at all tapped hidden states together."""
    square = torch.zeros((), dtype=value.dtype, device=value.device)
    taps = [tap for tap in features.values() if tap.requires_grad]
    grads = torch.autograd.grad(value, taps, retain_graph=True, allow_unused=True) if taps else ()
    for grad in (grad for grad in grads if grad is not None):
        square += torch.linalg.vector_norm(grad, dtype=value.dtype).square()
    return square.sqrt()
