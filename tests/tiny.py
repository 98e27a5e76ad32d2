"""Tiny real tokenizers and models, built in memory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

TEXT = [
    "In the beginning was the word, and the word was with them all.",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer.",
    "def add(a, b):\n    return a + b  # the sum of two numbers\n",
    "A café in Zürich sells naïve jalapeño soup for 3 € — 数 and 学, they say.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@lru_cache(maxsize=4)
def tiny_tokenizer(vocab_size: int = 400, chat: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with `<|end|>` as eos and `<|pad|>` as pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(
    vocab_size: int = 400,
    *,
    seed: int = 0,
    model_type: str = "llama",
    width: int = 32,
    **config: object,
) -> PreTrainedModel:
    """Build a random two-layer causal LM in float32, on CPU, in eval mode."""
    import torch

    settings: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    settings.update(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    return model.eval()


def save_tiny(
    folder: Path, *, vocab_size: int = 400, seed: int = 0, chat: bool = False, **config: object
) -> Path:
    """Save a tiny model and its tokenizer as a Hugging Face folder."""
    tokenizer = tiny_tokenizer(vocab_size, chat)
    model = tiny_model(len(tokenizer), seed=seed, **config)  # type: ignore[arg-type]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
