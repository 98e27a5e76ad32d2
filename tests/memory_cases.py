"""Recipes of which peak memory is measured: the parts that are planned dominate it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import tiny

WARM: dict[str, Any] = {"layers": 2, "width": 32, "vocab": 400}
"""A recipe without memory of its own."""
CASES: dict[str, dict[str, Any]] = {
    "live": {"layers": 4, "width": 256},
    "wide vocabulary": {"vocab": 24_000, "layers": 2, "width": 192, "batch": 16},
    "activations": {"layers": 12, "width": 128, "batch": 64, "vocab": 2_000},
    "labels only": {"layers": 8, "width": 256, "objective": {"kd_ratio": 0}, "teachers": {}},
    "features": {"layers": 4, "width": 384, "objective": {"features": {"layers": "uniform"}}},
    "cached": {"layers": 4, "width": 256, "cache": {"enabled": True}},
    "lora": {"pretrained": True, "vocab": 12_000, "layers": 6, "width": 512},
    "reverse KL": {"layers": 4, "width": 320, "objective": {"divergence": "reverse_kl"}},
}


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of this many ids, most of which no text has."""
    content = json.loads(tiny.tiny_tokenizer().backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    for number in range(len(vocab), size):
        vocab[f"<{number}>"] = number
    inner = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>")


def config_of(layers: int, width: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "vocab_size": vocab,
        **more,
    }


def write_case(
    root: Path,
    *,
    layers: int,
    width: int,
    vocab: int = 8_000,
    batch: int = 4,
    pretrained: bool = False,
    **sections: Any,
) -> Path:
    """Write models, text and recipe, and return the recipe."""
    root.mkdir(parents=True)
    tokenizer = tokenizer_of(vocab)
    names = ["a", "b"] + ["s"] * pretrained
    for name in names:
        size = (layers, width) if name == "s" else (2, 256)
        values = config_of(*size, vocab, tie_word_embeddings=False)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        config.eos_token_id, config.bos_token_id, config.pad_token_id = 0, 0, 1
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    text = " ".join(tiny.TEXT)
    lines = [json.dumps({"text": f"{text} {i} " * 12}) for i in range(40)]
    (root / "text.jsonl").write_text("\n".join(lines) + "\n")
    student: dict[str, Any] = {"model": str(root / "s"), "lora": {"r": 8}}
    if not pretrained:
        config = config_of(layers, width, vocab)
        student = {"config": config, "tokenizer": str(root / "a")}
    recipe = {
        "output_dir": str(root / "run"),
        "student": student,
        "teachers": {name: {"model": str(root / name)} for name in "ab"},
        "fusion": {"weighting": "uniform"},
        "data": {
            "train": [{"path": str(root / "text.jsonl")}],
            "max_length": 32,
            "calibration_fraction": 0.1,
            "validation_fraction": 0.1,
        },
        "train": {"max_steps": 2, "per_device_train_batch_size": batch, "learning_rate": 1e-3},
        "evaluate": {"controls": []},
        **sections,
    }
    file = root / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    return file
