"""Token by token reading of a model, as generation needs it.

Shapes: B prompts, T tokens so far with padding on the left, t new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from collegium.distributions import Teacher
from collegium.models.decode import Decoder, has_exact_cache
from collegium.teachers.local import LocalTeacher
from collegium.types import IGNORE, Batch, Rows


class TokenReader(Protocol):
    """Reads a batch of prompts that grow together."""

    def read(self, ids_Bt: Tensor, is_token_Bt: Tensor, keep: int = 1) -> Tensor:
        """Append tokens, and return the logits after each of the last `keep`: (B, keep, V).

        Args:
            ids_Bt: (B, t) int64.
            is_token_Bt: (B, t) bool, False for padding, which precedes the tokens of a prompt.
            keep: at most t. Logits at padding are meaningless.
        """
        ...


def reader_of(teacher: Teacher) -> Callable[[], TokenReader]:
    """Return a maker of readers: with a key-value cache where it leaves the logits unchanged."""
    if isinstance(teacher, LocalTeacher):
        with teacher.placed():
            if has_exact_cache(teacher.model, teacher.vocab_size):
                return partial(_CachedReader, teacher)
    return partial(Rescorer, teacher)


class _CachedReader:
    """A model in this process with its key-value cache."""

    def __init__(self, teacher: LocalTeacher) -> None:
        self._teacher = teacher
        self._decoder = Decoder(teacher.model, teacher.vocab_size)

    def read(self, ids_Bt: Tensor, is_token_Bt: Tensor, keep: int = 1) -> Tensor:
        teacher, home = self._teacher, ids_Bt.device
        with teacher.placed():
            device = teacher.device
            logits_BkV = self._decoder.logits(ids_Bt.to(device), is_token_Bt.to(device), keep)
        return (logits_BkV * teacher.logit_scale).to(home)


class Rescorer:
    """Any teacher, by scoring all tokens again at each step: slow, and exact for every family."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._ids: list[Tensor] = []
        self._is_token: list[Tensor] = []

    def read(self, ids_Bt: Tensor, is_token_Bt: Tensor, keep: int = 1) -> Tensor:
        self._ids.append(ids_Bt)
        self._is_token.append(is_token_Bt)
        ids_BT, is_token_BT = torch.cat(self._ids, dim=1), torch.cat(self._is_token, dim=1)
        batch_size, length = ids_BT.shape
        # Padding is moved to the right, where no causal model sees it.
        prompts = [ids_T[is_token_T] for ids_T, is_token_T in zip(ids_BT, is_token_BT, strict=True)]
        moved_BT = pad_sequence(prompts, batch_first=True)
        padding_B = length - is_token_BT.sum(1)
        place_T = torch.arange(moved_BT.shape[1], device=ids_BT.device)
        length_B1 = (length - padding_B)[:, None]
        is_padding_BT = place_T >= length_B1
        position_BT = torch.where(is_padding_BT, place_T - length_B1, place_T)
        sample_BT = torch.arange(batch_size, device=ids_BT.device)[:, None].expand_as(moved_BT)
        batch = Batch(
            moved_BT,
            position_BT,
            torch.full_like(moved_BT, IGNORE),
            sample_BT.masked_fill(is_padding_BT, -1),
        )
        prompt_N, place_N = is_token_BT[:, -keep:].nonzero(as_tuple=True)
        index_N = prompt_N * moved_BT.shape[1] + length - keep + place_N - padding_B[prompt_N]
        rows = Rows(index_N, torch.zeros_like(index_N), prompt_N, prompt_N)
        logits_NV = self._teacher.score(batch, rows).distribution.logits(slice(0, len(rows)))
        logits_BkV = logits_NV.new_zeros(batch_size, keep, logits_NV.shape[1])
        logits_BkV[prompt_N, place_N] = logits_NV
        return logits_BkV
