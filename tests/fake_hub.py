"""A cache of the Hugging Face hub and a data set, as their downloads lay them out on disk.

The configs in fixtures/hub/configs.json are those of the real models. Beside each is the page that
it was taken from. Weights are missing, and tokenizers have the real added tokens under their real
ids, but no merges and no other token than the bytes.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONFIGS = json.loads(
    (Path(__file__).parent / "fixtures" / "hub" / "configs.json").read_text(encoding="utf-8")
)
COMMIT = "c" * 40
# torchtune/models/qwen2_5/_tokenizer.py lists the added tokens of Qwen2.5 with their ids.
FIRST_ADDED = 151643
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
C4_CARD = """\
---
license:
- odc-by
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""


def qwen_tokenizer(eos_token: str) -> PreTrainedTokenizerFast:
    """Return a byte tokenizer with the added tokens of Qwen2.5 under their ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    vocabulary |= {token: FIRST_ADDED + n for n, token in enumerate((*SPECIAL, *ADDED))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ADDED])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos_token, pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_models(cache: Path, names: Sequence[str] = tuple(CONFIGS)) -> None:
    """Write config and tokenizer of hub models into a cache of the hub, one commit each."""
    for name in names:
        config: dict[str, Any] = CONFIGS[name]["config"]
        repository = cache / f"models--{name.replace('/', '--')}"
        snapshot = repository / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        (snapshot / "config.json").write_text(json.dumps(config))
        is_chat = name.endswith("-Instruct")
        qwen_tokenizer("<|im_end|>" if is_chat else "<|endoftext|>").save_pretrained(snapshot)
        file = snapshot / "tokenizer_config.json"
        settings = json.loads(file.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}
        file.write_text(json.dumps(settings))


def write_c4(folder: Path, *, train: Sequence[str], validation: Sequence[str]) -> None:
    """Write the first files of C4 English, of which the second of `train` is damaged."""
    data = folder / "allenai" / "c4"
    (data / "en").mkdir(parents=True)
    (data / "README.md").write_text(C4_CARD)
    for split, texts, total in (("train", train, 1024), ("validation", validation, 8)):
        rows = [
            {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.com/{n}"}
            for n, text in enumerate(texts)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        file = data / "en" / f"c4-{split}.00000-of-{total:05d}.json.gz"
        file.write_bytes(gzip.compress(lines.encode(), mtime=0))
    (data / "en" / "c4-train.00001-of-01024.json.gz").write_bytes(b"damaged")
