"""Step-by-step decoding of a Hugging Face model with its key-value cache.

Shapes: B prompts, T tokens so far with padding on the left, t new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collegium.models.forward import body_of, input_layer, model_head, takes_positions
from collegium.models.probe import is_close
from collegium.options import torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Length and left padding of the two prompts by which `has_exact_cache` compares.
_LENGTH, _PADDING, _READ = 9, 3, 6


class Decoder:
    """The logits of a batch of prompts that grow together. Each token is read once."""

    def __init__(self, model: PreTrainedModel, vocab_size: int) -> None:
        """Start without tokens. Logits are cut to `vocab_size`, V."""
        self._model = model
        self._vocab_size = vocab_size
        self._cache: Any = None
        self._mask_BT: Tensor | None = None

    @torch.no_grad()
    def states(self, ids_Bt: Tensor, is_token_Bt: Tensor) -> Tensor:
        """Append tokens: (B, t) ids and bool, False for padding -> (B, t, D) hidden states.

        Padding precedes the first token of a prompt. States at padding are meaningless.
        """
        body, mask_Bt = body_of(self._model), is_token_Bt.long()
        mask_BT = mask_Bt if self._mask_BT is None else torch.cat([self._mask_BT, mask_Bt], dim=1)
        self._mask_BT = mask_BT
        inputs = {"input_ids": ids_Bt, "attention_mask": mask_BT}
        if takes_positions(body):
            position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = position_BT[:, -ids_Bt.shape[1] :]
        output = body(**inputs, past_key_values=self._cache, use_cache=True)
        self._cache = output.past_key_values
        return output.last_hidden_state

    @torch.no_grad()
    def logits(self, ids_Bt: Tensor, is_token_Bt: Tensor, keep: int) -> Tensor:
        """Append tokens as `states`, and return the logits of the last `keep`: (B, keep, V)."""
        hidden_BkD = self.states(ids_Bt, is_token_Bt)[:, -keep:]
        return model_head(self._model, self._vocab_size).logits(hidden_BkD)


def has_exact_cache(model: PreTrainedModel, vocab_size: int) -> bool:
    """Return whether a cache and left padding leave the hidden states of a model as they are.

    Recurrent and convolutional layers read the padding, or have no key-value cache. The hidden
    states of two random prompts are compared with those of each prompt without cache or padding.
    """
    generator = torch.Generator().manual_seed(0)
    device = input_layer(model).weight.device
    ids_BT = torch.randint(vocab_size, (2, _LENGTH), generator=generator).to(device)
    is_token_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    is_token_BT[1, :_PADDING] = False
    try:
        decoder = Decoder(model, vocab_size)
        spans = (slice(_READ), slice(_READ, _LENGTH - 1), slice(_LENGTH - 1, _LENGTH))
        parts = [decoder.states(ids_BT[:, span], is_token_BT[:, span]) for span in spans]
        states_BTD = torch.cat(parts, dim=1)
        for prompt, start in enumerate((0, _PADDING)):
            ids_1T = ids_BT[prompt : prompt + 1, start:]
            is_token_1T = torch.ones_like(ids_1T, dtype=torch.bool)
            exact_1TD = Decoder(model, vocab_size).states(ids_1T, is_token_1T)
            if not is_close(states_BTD[prompt, start:], exact_1TD[0], model.dtype, factor=64):
                return False
    # Models without such a cache raise errors of many types.
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    return True
