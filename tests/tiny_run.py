"""Smallest complete run: two tiny teachers with one tokenizer, text of two domains, a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import tiny

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_RECIPE = """
name: tiny
output_dir: {root}/run
student:
  config: {config}
  tokenizer: {root}/scripture
teachers:
  scripture: {{model: {root}/scripture}}
  code: {{model: {root}/code}}
{more}data:
  train:
    - {{path: {root}/scripture.jsonl}}
    - {{path: {root}/code.jsonl}}
  max_length: 32
  calibration_fraction: 0.2
  validation_fraction: 0.2
objective: {{kd_ratio: 0.5}}
train:
  {{learning_rate: 1e-2, max_steps: 4, per_device_train_batch_size: 4, logging_steps: 2,
  save_steps: 2}}
preflight: {{max_tokens: 200, batch_size: 4}}
evaluate: {{controls: [ce_only], batch_size: 4, samples: 0}}
"""


def recipe_text(root: Path, teachers: int = 2) -> str:
    """Return a recipe for a folder filled by `write_zoo`."""
    more = "".join(f"  more{i}: {{model: {root}/more{i}}}\n" for i in range(2, teachers))
    return _RECIPE.format(root=root, config=json.dumps(CONFIG), more=more)


def write_zoo(root: Path, teachers: int = 2) -> Path:
    """Write the teachers, with one tokenizer, and two corpora."""
    tiny.save_tiny(root / "scripture", seed=1)
    tiny.save_tiny(root / "code", seed=2, model_type="qwen3", head_dim=8)
    for i in range(2, teachers):
        tiny.save_tiny(root / f"more{i}", seed=1 + i)
    for domain, text in (("scripture", tiny.TEXT[0]), ("code", tiny.TEXT[2])):
        lines = [json.dumps({"text": f"{text} number {i}. " * 4}) for i in range(60)]
        (root / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root
