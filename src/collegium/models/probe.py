"""The probe of a loaded model: are its logits and packed windows those that training relies on?

Shapes: B windows, T tokens, N = B T rows, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from collegium.distributions import HiddenRows
from collegium.errors import ModelError
from collegium.models.families import check_windows, mixing_error
from collegium.models.forward import body_of, forward_rows, head_layer, inputs_of, takes_positions
from collegium.options import torch
from collegium.types import IGNORE, Batch, Rows

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# Tokens of the two documents of each probe window, or of the two parts of its one document.
_LENGTHS = [5, 7]
ROUNDINGS = 64
"""Roundings of the largest value by which equal results may differ."""
AMPLIFIED_ROUNDINGS = 4096
"""The same in a float32 model with outliers, whose layers amplify them: a student cut out of
SmolLM2-135M differs by 150. Between the two, float64 decides."""


def probe(
    model: PreTrainedModel,
    *,
    vocab_size: int,
    where: str,
    packed: bool = True,
    max_length: int | None = None,
) -> None:
    """Raise ModelError if logits of random ids differ from the model's, or documents interact.

    Args:
        model: a causal language model on its device.
        vocab_size: V, the number of ids in use.
        where: path of the model, such as `teachers.a`.
        packed: whether a window may hold several documents. If not, only later tokens must have no
            effect on earlier ones.
        max_length: length of the longest document, None if it is not known.
    """
    model_type = model.config.model_type
    if packed and not takes_positions(body_of(model)):
        raise mixing_error(model_type, where=where, reason=", since it takes no position_ids")
    # The types of packed windows are measured below.
    check_windows(model.config, packed=False, max_length=max_length, where=where)
    device = head_layer(model).weight.device
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocab_size, (2, sum(_LENGTHS)), generator=generator).to(device)
    changed_BT = ids_BT.clone()
    changed_BT[:, : _LENGTHS[0]] = (ids_BT[:, : _LENGTHS[0]] + 1) % vocab_size
    lengths = _LENGTHS if packed else [sum(_LENGTHS)]
    with _eval_mode(model), torch.no_grad(), _run_errors(model_type, where):
        batch, ours = _forward_packed(model, ids_BT, lengths, vocab_size)
        logits_NV = ours.logits(slice(None))
        positions = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        theirs_BTV = model(**inputs_of(model, **positions), use_cache=False).logits
        _, changed = _forward_packed(model, changed_BT, lengths, vocab_size)
    expected_NV = theirs_BTV[..., :vocab_size].flatten(0, 1)
    dtype = ours.hidden.dtype
    # The two differ by the rounding of one linear map. In half precision 64 roundings would be half
    # of the largest logit and hide a wrong factor.
    factor = ROUNDINGS if torch.finfo(dtype).bits >= 32 else 8
    if not is_close(logits_NV, expected_NV, dtype, factor=factor):
        raise ModelError(
            f"{where}: {model_type} computes its logits in an unsupported way (largest difference "
            f"{_gap(logits_NV, expected_NV):.3g}); use another model family"
        )
    hidden_BTD = ours.hidden.unflatten(0, ids_BT.shape)
    changed_BTD = changed.hidden.unflatten(0, ids_BT.shape)
    with _eval_mode(model), torch.no_grad(), _run_errors(model_type, where):
        differs = not _equals_parts(model, hidden_BTD, ids_BT, vocab_size, packed=packed)
    if not packed:
        if differs:
            raise ModelError(
                f"{where}: {model_type} lets tokens attend to later ones; must be a causal "
                "language model; use another model family"
            )
        return
    second = slice(_LENGTHS[0], None)
    leaks = not is_close(hidden_BTD[:, second], changed_BTD[:, second], dtype, factor=8)
    if leaks or differs:
        effect = "change with the previous document" if leaks else "differ from unpacked ones"
        raise mixing_error(model_type, where=where, reason=f" (hidden states {effect})")


def _equals_parts(
    model: PreTrainedModel, hidden_BTD: Tensor, ids_BT: Tensor, vocab_size: int, *, packed: bool
) -> bool:
    """Return whether hidden states of a window are those of its documents by themselves.

    Without packing, those of its first tokens only, which later ones must not change.
    """
    gap, largest = _gap_to_parts(model, hidden_BTD, ids_BT, vocab_size, packed=packed)
    rounding = torch.finfo(hidden_BTD.dtype).eps * largest
    if gap <= ROUNDINGS * rounding:
        return True
    if hidden_BTD.dtype != torch.float32 or not gap <= AMPLIFIED_ROUNDINGS * rounding:
        return False
    exact, ids_BT = copy.deepcopy(model).cpu().double(), ids_BT.cpu()
    lengths = _LENGTHS if packed else [sum(_LENGTHS)]
    _, together = _forward_packed(exact, ids_BT, lengths, vocab_size)
    hidden_BTD = together.hidden.unflatten(0, ids_BT.shape)
    exact_gap, _ = _gap_to_parts(exact, hidden_BTD, ids_BT, vocab_size, packed=packed)
    # A difference in the formulas stays, and rounding vanishes but for norms that run in float32.
    return exact_gap < 0.25 * gap


def _gap_to_parts(
    model: PreTrainedModel, hidden_BTD: Tensor, ids_BT: Tensor, vocab_size: int, *, packed: bool
) -> tuple[float, float]:
    """Return the largest difference, and the largest value."""
    parts = ids_BT.split(_LENGTHS, dim=1)[: None if packed else 1]
    states = [_forward_packed(model, part, [part.shape[1]], vocab_size)[1] for part in parts]
    apart_BTD = torch.cat([one.hidden.unflatten(0, (2, -1)) for one in states], dim=1)
    together_BTD = hidden_BTD[:, : apart_BTD.shape[1]]
    return _gap(together_BTD, apart_BTD), max(1.0, float(apart_BTD.abs().max()))


@contextmanager
def _run_errors(model_type: str, where: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    # Models that need more than token ids raise errors of many types.
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise ModelError(
            f"{where}: {model_type} cannot be run on token ids ({type(error).__name__}: {reason}); "
            "must be a causal language model of text; use another model family"
        ) from error


def _forward_packed(
    model: PreTrainedModel, ids_BT: Tensor, lengths: Sequence[int], vocab_size: int
) -> tuple[Batch, HiddenRows]:
    """Run windows of documents of these lengths, without targets, at all positions."""
    ids_BT, ignored_BT = ids_BT.contiguous(), torch.full_like(ids_BT, IGNORE)
    position_T = torch.cat([torch.arange(length) for length in lengths]).to(ids_BT.device)
    batch = Batch(ids_BT, position_T.expand_as(ids_BT).contiguous(), ignored_BT, ignored_BT)
    index = torch.arange(ids_BT.numel(), device=ids_BT.device)
    rows = Rows(index=index, labels=index, documents=index, samples=index)
    return batch, forward_rows(model, batch, rows, vocab_size=vocab_size)


def _gap(left: Tensor, right: Tensor) -> float:
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    return float((left.to(dtype) - right.to(dtype)).abs().max())


def is_close(left: Tensor, right: Tensor, dtype: torch.dtype, *, factor: float) -> bool:
    """Compare two tensors to within `factor` roundings of the largest value. NaN is never close."""
    largest = max(1.0, float(right.float().abs().max()))
    return _gap(left, right) <= factor * torch.finfo(dtype).eps * largest


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
