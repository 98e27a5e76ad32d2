"""Tokenizer and chat template inside a GGUF file, read from the fast tokenizer of a student."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal

from collegium.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>$")


def tokenizer_kind(tokenizer: PreTrainedTokenizerFast, where: str) -> tuple[str, str]:
    """Return `tokenizer.ggml.model` and `tokenizer.ggml.pre`: BPE over bytes, or SentencePiece.

    llama.cpp splits text by a built-in rule with a name, so the rule of the student must be one of
    those. Raises ExportError for another one.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model, steps = content["model"], _steps(content.get("pre_tokenizer"))
    if model["type"] != "BPE":
        raise ExportError(
            f"{where}: got a tokenizer of type {model['type']}; must be BPE; choose another format"
        )
    if model.get("byte_fallback"):
        return "llama", "default"
    name = _split_name(steps)
    normalizers = [step["type"] for step in _steps(content.get("normalizer"))]
    if name is None or normalizers not in ([], ["NFC"]):
        kinds = ", ".join([*normalizers, *(step["type"] for step in steps)]) or "none"
        raise ExportError(
            f"{where}: got a tokenizer that splits text by {kinds}; must split it by a rule that "
            "llama.cpp has; choose another format"
        )
    return "gpt2", name


def _steps(part: Mapping[str, Any] | None) -> list[Any]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [*part.get("pretokenizers", ()), *part.get("normalizers", ())]
    return [part]


def _split_name(steps: list[Any]) -> str | None:
    """Return the name that llama.cpp has for these pre-tokenizers, None without one."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    kinds = [step["type"] for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1]["add_prefix_space"]:
        return None
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm" if steps[1]["use_regex"] else None
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        pattern = steps[0]["pattern"].get("Regex")
        return next((n for n, split in GGUF_PRE_TOKENIZER_SPLITS.items() if split == pattern), None)
    return None


def add_tokenizer(
    writer: Any, tokenizer: PreTrainedTokenizerFast, *, num_tokens: int, where: str
) -> None:
    """Write the vocabulary, merges, special tokens and the chat template.

    Ids without a token, up to the rows of the embedding, are unused tokens `[PADi]`, as in the
    converter of llama.cpp.
    """
    kind, pre = tokenizer_kind(tokenizer, where)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    # Pairs in newer files, and strings in older ones.
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(num_tokens)]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(_token_types(tokenizer, tokens, by_id, kind))
    if kind == "llama":
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(tokenizer.tokenize("a")[0].startswith(SPACE))
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        # transformers adds an unk token that the model has no row for to some tokenizers.
        if index is not None and index < num_tokens:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and tokenizer.bos_token_id in ids)
    writer.add_add_eos_token(tokenizer.eos_token_id in ids)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _token_types(
    tokenizer: PreTrainedTokenizerFast,
    tokens: list[str],
    by_id: Mapping[int, str],
    kind: Literal["llama", "gpt2"] | str,
) -> list[Any]:
    from gguf import TokenType

    added = tokenizer.added_tokens_decoder
    types = []
    for index, token in enumerate(tokens):
        if index not in by_id:
            types.append(TokenType.UNUSED)
        elif index == tokenizer.unk_token_id and kind == "llama":
            types.append(TokenType.UNKNOWN)
        elif index in added:
            types.append(TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED)
        elif kind == "llama" and _BYTE.match(token):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.NORMAL)
    return types


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return -rank of the first merge that makes a token: SentencePiece merges by highest score."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]
