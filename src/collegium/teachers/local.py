"""A frozen Hugging Face model as a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from collegium.distributions import LIVE, Answer, Distribution, HiddenRows, WrappedRows
from collegium.errors import ModelError, TrainingError
from collegium.models.forward import forward_rows, head_layer
from collegium.models.loading import count_parameters, load_model
from collegium.types import Batch, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from collegium.teachers.options import LocalOptions

MAX_NAMES = 5


@dataclass(frozen=True)
class MovedRows(WrappedRows):
    """Hidden states and head on the teacher's device. Only the logits of a block are moved."""

    device: torch.device

    def logits(self, block: slice) -> Tensor:
        return self.inner.logits(block).to(self.device)


class LocalTeacher:
    """A frozen model: no gradient, no dropout, its own dtype and device."""

    capabilities = LIVE

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        *,
        vocab_size: int,
        offload: bool = False,
        logit_scale: float = 1.0,
        student: nn.Module | None = None,
    ) -> None:
        """Freeze `model`, which must share no parameter with `student`.

        Raises:
            ModelError: teacher and student share a parameter: freezing one would freeze both.
        """
        if student is not None:
            _check_apart(name, model, student)
        self.name = name
        self.model = model.requires_grad_(False).eval()
        self.vocab_size = vocab_size
        self.num_parameters = count_parameters(model)
        self._logit_scale = logit_scale
        self._device = head_layer(model).weight.device
        self._is_offloaded = offload and self._device.type != "cpu"
        if self._is_offloaded:
            nn.Module.to(model, "cpu")

    @classmethod
    def load(cls, name: str, options: LocalOptions, *, vocab_size: int, where: str) -> LocalTeacher:
        """Load a teacher from its folder.

        Raises:
            ModelError: the folder or its weights cannot be used.
        """
        return cls(
            name,
            load_model(options, where=where),
            vocab_size=vocab_size,
            offload=options.offload,
            logit_scale=options.logit_scale,
        )

    @torch.no_grad()
    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> Answer:
        """Score the rows without gradient. `taps` names the hidden states to return.

        Raises:
            TrainingError: a hidden state is not finite.
            ModelError: the model has no such tap, or too small a head.
        """
        home = batch.input_ids.device
        hidden = self.hidden_rows(batch, rows, taps)
        features = {tap: hidden_ND.to(home) for tap, hidden_ND in hidden.features.items()}
        return Answer(self.name, readable_from(home, hidden), features)

    @torch.no_grad()
    def hidden_rows(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> HiddenRows:
        """Run the body: the hidden states of the rows and the head, on the device of the model.

        Raises:
            TrainingError, ModelError: as `score`.
        """
        self.model.eval()  # pinned: someone may have called train() on a parent module
        if self._is_offloaded:
            nn.Module.to(self.model, self._device)
        hidden = _detached(
            forward_rows(
                self.model,
                batch.to(self._device),
                rows.to(self._device),
                vocab_size=self.vocab_size,
                taps=taps,
            )
        )
        if self._is_offloaded:
            nn.Module.to(self.model, "cpu")
        self._check_finite({"the last layer": hidden.hidden, **hidden.features}, rows)
        return replace(hidden, head=hidden.head.scaled(self._logit_scale))

    def _check_finite(self, states: Mapping[str, Tensor], rows: Rows) -> None:
        for place, hidden_ND in states.items():
            is_bad_N = ~torch.isfinite(hidden_ND).all(-1)
            if not bool(is_bad_N.any()):
                continue
            samples = rows.samples[is_bad_N.to(rows.samples.device)].unique().tolist()
            more = ", ..." if len(samples) > MAX_NAMES else ""
            raise TrainingError(
                f"teacher {self.name}: non-finite hidden states at {place} in "
                f"{int(is_bad_N.sum())} of {len(rows)} rows (samples "
                f"{', '.join(map(str, samples[:MAX_NAMES]))}{more}); must be finite; "
                f"try `dtype: float32` for this teacher"
            )


def readable_from(device: torch.device, rows: HiddenRows) -> Distribution:
    """Return the distributions with their logits on `device`, wherever the head is."""
    return rows if rows.head.weight.device == device else MovedRows(rows, device)


def _check_apart(name: str, model: nn.Module, student: nn.Module) -> None:
    theirs = {id(parameter) for parameter in student.parameters()}
    shared = [n for n, parameter in model.named_parameters() if id(parameter) in theirs]
    if shared:
        raise ModelError(
            f"teacher {name}: shares {len(shared)} parameters with the student ({shared[0]}); "
            f"must be a model of its own, since teachers are frozen; use copy.deepcopy(model)"
        )


def _detached(rows: HiddenRows) -> HiddenRows:
    """The same values, cut off from the model: its parameters may move to another device."""
    head, bias = rows.head, rows.head.bias
    bias = None if bias is None else bias.detach()
    return replace(rows, head=replace(head, weight=head.weight.detach(), bias=bias))
