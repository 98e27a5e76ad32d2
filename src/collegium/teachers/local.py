"""A frozen Hugging Face model as a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from collegium.distributions import LIVE, Answer, Capability, Distribution, HiddenRows, WrappedRows
from collegium.errors import ModelError, TrainingError, nearest
from collegium.models.adapters import active_adapter, trained_adapters
from collegium.models.forward import forward_rows, head_layer
from collegium.models.loading import count_parameters, load_base, load_model
from collegium.models.lora import attach_adapter
from collegium.models.probe import probe
from collegium.models.quantized import quantize_
from collegium.models.sharded import num_processes, shard_layers
from collegium.models.used_vocabulary import cut_vocabulary
from collegium.options import plain
from collegium.storage.files import fingerprint
from collegium.types import Batch, Rows, map_tensors

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from collegium.teachers.options import LocalOptions

MAX_NAMES = 5
_bases: WeakValueDictionary[str, PreTrainedModel] = WeakValueDictionary()
"""Bases of adapters in memory."""


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
        shard: bool = False,
        logit_scale: float = 1.0,
        student: nn.Module | None = None,
        adapter: str | None = None,
    ) -> None:
        """Freeze `model`.

        With `offload` it is on the CPU between its turns. With `shard` and other processes it is
        as well, until `shard_layers`. `adapter` is the one that is active while it answers, for
        models that share a base. Raises ModelError if it does not exist, or if the model shares a
        parameter with `student`.
        """
        adapters = list(getattr(model, "peft_config", {}))
        if adapter is not None and adapter not in adapters:
            raise ModelError(
                f"teacher {name}: has no adapter `{adapter}`{nearest(adapter, adapters)}; must be "
                "the name of one, since its model is also the student or another teacher; rename "
                "it, or use copy.deepcopy(model)"
            )
        # Adapters on one base may share it: only the trained ones belong to the student.
        trained = trained_adapters(model) if adapter is not None and model is student else []
        if not trained or adapter in trained:
            _refuse_shared(name, model, student)
            model.requires_grad_(False).eval()
        self.name = name
        self.model = model
        self.adapter = adapter
        self._is_probed = False
        self.vocab_size = vocab_size
        self.num_parameters = count_parameters(model, without=[x for x in adapters if x != adapter])
        self.logit_scale = logit_scale
        self.device = head_layer(model).weight.device
        self.shard = shard
        waits = offload or (shard and num_processes() > 1)
        self._is_offloaded = waits and self.device.type != "cpu"
        if self._is_offloaded:
            nn.Module.to(model, "cpu")

    @classmethod
    def load(
        cls,
        name: str,
        options: LocalOptions,
        *,
        vocab_size: int,
        kept_U: np.ndarray | None = None,
        where: str,
    ) -> LocalTeacher:
        """Load a teacher. Raises ModelError if its folder or its weights cannot be used.

        Teachers with adapters of one base share the base in memory while one of them lives. The
        adapter of a teacher to quantize is merged before its weights are rounded. Rows of other
        tokens than `kept_U` are cut, so that it reads and predicts the ids of the student.
        """
        adapter = None
        if options.quantize is not None:
            model = _cut(load_model(options, where=where), kept_U, where)
            quantize_(model, options.quantize, where=f"{where}.quantize")
        elif options.adapter is None:
            model = _cut(load_base(options, where=where), kept_U, where)
        else:
            model = _shared_base(options, kept_U, where)
            adapter = name.replace(".", "_")  # PEFT separates the parts of names by dots
            if adapter in getattr(model, "peft_config", {}):  # of a teacher that was released
                model.delete_adapter(adapter)
            attach_adapter(model, options.adapter, name=adapter, where=f"{where}.adapter")
        return cls(
            name,
            model,
            vocab_size=vocab_size,
            offload=options.offload,
            shard=options.shard,
            logit_scale=options.logit_scale,
            adapter=adapter,
        )

    def probe(self, where: str, *, packed: bool = True, max_length: int | None = None) -> None:
        """Check once that its logits are those of the model. Raises ModelError, see `probe`."""
        if self._is_probed:
            return
        with self.placed():
            probe(
                self.model,
                vocab_size=self.vocab_size,
                where=where,
                packed=packed,
                max_length=max_length,
            )
        self._is_probed = True

    @property
    def is_sharded(self) -> bool:
        """Whether every process has to score as many batches as the others."""
        return Capability.SUBSETS not in self.capabilities.supported

    def shard_layers(self) -> None:
        """Keep a share of each layer in each process, as `shard` asks. A collective.

        Every process has to score as many batches as the others from then on. A no-op without
        `shard`, or without other processes.
        """
        if self.shard and num_processes() > 1 and not self.is_sharded:
            shard_layers(self.model, self.device)
            self._is_offloaded = False
            self.capabilities = replace(LIVE, supported=LIVE.supported - {Capability.SUBSETS})

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Have the model on its device, with its adapter, during the block."""
        if self._is_offloaded:
            nn.Module.to(self.model, self.device)
        if self.adapter is None:
            self.model.eval()  # pinned: someone may have called train() on a parent module
            yield
        else:
            with active_adapter(self.model, self.adapter):
                yield
        if self._is_offloaded:
            nn.Module.to(self.model, "cpu")

    @torch.no_grad()
    def score(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> Answer:
        """Score rows. Raises TrainingError for non-finite states, ModelError for a missing tap."""
        home = batch.input_ids.device
        hidden = self.hidden_rows(batch, rows, taps)
        features = {tap: hidden_ND.to(home) for tap, hidden_ND in hidden.features.items()}
        attention = {
            tap: map_tensors(states, lambda tensor: tensor.to(home))
            for tap, states in hidden.attention.items()
        }
        return Answer(self.name, readable_from(home, hidden), features, attention=attention)

    @torch.no_grad()
    def hidden_rows(self, batch: Batch, rows: Rows, taps: Sequence[str] = ()) -> HiddenRows:
        """Return hidden states and head on the device of the model. Raises as `score`."""
        batch, moved, size = batch.to(self.device), rows.to(self.device), self.vocab_size
        with self.placed():
            hidden = forward_rows(self.model, batch, moved, vocab_size=size, taps=taps)
            # Cut off from the model, whose parameters may move to another device.
            bias = None if hidden.head.bias is None else hidden.head.bias.detach()
            head = replace(hidden.head, weight=hidden.head.weight.detach(), bias=bias)
        self._check_finite({"the last layer": hidden.hidden, **hidden.features}, rows)
        return replace(hidden, head=head.scaled(self.logit_scale))

    def _check_finite(self, states: Mapping[str, Tensor], rows: Rows) -> None:
        for place, hidden_ND in states.items():
            is_bad_N = ~torch.isfinite(hidden_ND).all(-1)
            if not bool(is_bad_N.any()):
                continue
            samples = rows.samples[is_bad_N.to(rows.samples.device)].unique().tolist()
            shown = ", ".join(map(str, samples[:MAX_NAMES])) + ", ..." * (len(samples) > MAX_NAMES)
            raise TrainingError(
                f"teacher {self.name}: non-finite hidden states at {place} in "
                f"{int(is_bad_N.sum())} of {len(rows)} rows (samples {shown}); must be finite; "
                "try `dtype: float32` for this teacher"
            )


def _cut(model: PreTrainedModel, kept_U: np.ndarray | None, where: str) -> PreTrainedModel:
    if kept_U is not None:
        cut_vocabulary(model, kept_U, where=where)
    return model


def _shared_base(options: LocalOptions, kept_U: np.ndarray | None, where: str) -> PreTrainedModel:
    """Return the base of an adapter: that of a living teacher with these options, or a new one."""
    own = ("adapter", "offload", "quantize", "logit_scale")
    shared = {k: value for k, value in plain(options).items() if k not in own}
    key = fingerprint([shared, None if kept_U is None else kept_U.tolist()])
    base = _bases.get(key)
    if base is None:
        base = _bases[key] = _cut(load_base(options, where=where), kept_U, where)
    return base


def _refuse_shared(name: str, model: nn.Module, student: nn.Module | None) -> None:
    theirs = {id(parameter) for parameter in student.parameters()} if student else set()
    shared = [n for n, parameter in model.named_parameters() if id(parameter) in theirs]
    if shared:
        raise ModelError(
            f"teacher {name}: shares {len(shared)} parameters with the student ({shared[0]}); "
            f"must be a model of its own, since teachers are frozen; use copy.deepcopy(model)"
        )


def readable_from(device: torch.device, rows: HiddenRows) -> Distribution:
    """Return the distributions with their logits on `device`, wherever the head is."""
    return rows if rows.head.weight.device == device else MovedRows(rows, device)
