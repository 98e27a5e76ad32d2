"""Greedy generation of a model with a smaller one that drafts its tokens, by transformers.

Source: Leviathan et al. 2023, arXiv 2211.17192; transformers calls it assisted generation.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from collegium.errors import ModelError, first_line
from collegium.models.forward import head_layer, input_layer
from collegium.options import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class DraftedText:
    """A greedy continuation, and what it cost."""

    ids: list[int]
    seconds: float
    passes: int
    """Forward passes of the target."""
    drafted: int
    """Tokens of the draft model that the target has read."""

    @property
    def accepted(self) -> int:
        """Drafted tokens that were kept: each pass adds one token of the target itself."""
        return min(self.drafted, len(self.ids) - self.passes)


class DraftedModel:
    """A target and a model that drafts for it, one text at a time."""

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel,
        *,
        vocab_size: int,
        num_drafted: int,
        stops: Iterable[int],
    ) -> None:
        """Keep both models, which share the first `vocab_size` ids.

        The generation config of `draft` and the vocabulary size in its config are replaced.
        """
        from transformers import GenerationConfig

        self.target, self.draft = target, draft
        rows = max(head_layer(model).weight.shape[0] for model in (target, draft))
        settings: dict[str, Any] = {
            "do_sample": False,
            "eos_token_id": sorted(stops),
            "pad_token_id": 0,
            # Rows that pad a vocabulary have no id in the other model.
            "suppress_tokens": list(range(vocab_size, rows)) or None,
        }
        self._config = GenerationConfig(**settings)
        # A constant number of drafted tokens, so that the accepted share has a definition.
        draft.generation_config = GenerationConfig(
            **settings,
            num_assistant_tokens=num_drafted,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        # transformers takes models of one vocabulary size to share their tokens, and translates
        # texts between others. These share their ids, whatever the padding.
        draft.config.get_text_config().vocab_size = target.config.get_text_config().vocab_size

    @torch.no_grad()
    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, *, is_drafted: bool
    ) -> DraftedText:
        """Continue a prompt greedily, with or without the draft model.

        Raises:
            ModelError: transformers cannot do it for this family.
        """
        lengths: list[int] = []

        def count(_: Any, __: Any, inputs: dict[str, Any]) -> None:
            lengths.append(inputs["input_ids"].shape[1])

        ids_1T = torch.tensor([prompt], device=input_layer(self.target).weight.device)
        target: Any = self.target  # `generate` of a PreTrainedModel has no type
        hook = target.register_forward_pre_hook(count, with_kwargs=True)
        options: dict[str, Any] = {"assistant_model": self.draft} if is_drafted else {}
        try:
            started = time.perf_counter()
            output = target.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                generation_config=self._config,
                max_new_tokens=max_new_tokens,
                **options,
            )
            new = output[0, len(prompt) :].tolist()  # waits for the device
            seconds = time.perf_counter() - started
        # Caches that cannot be rolled back, and families without one, fail in many ways.
        except Exception as error:
            raise ModelError(
                f"{self.target.config.model_type}: transformers cannot draft for it "
                f"({first_line(error)})"
            ) from error
        finally:
            hook.remove()
        # The first pass reads the prompt, each later one a token of the target, and all the drafts.
        drafted = sum(lengths) - len(prompt) - (len(lengths) - 1)
        return DraftedText(new, seconds, len(lengths), drafted)
