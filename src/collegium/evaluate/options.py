"""Options of the measurements after training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from collegium.options import option

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]

MAX_SAMPLES = 10
"""Continuations of each model whose texts are kept."""


@option
class GenerationOptions:
    """Continuations of held-out documents, compared with the documents."""

    max_prompts: Annotated[int, Field(ge=1)] = 256
    """Documents of the validation split, evenly spread over its domains."""
    prompt_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens at the start of a text that are the prompt. Of a chat or a row with a prompt, the
    prompt is all that precedes the first target."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Tokens to generate and to compare with, at most."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most likely token, 1 samples from the model."""
