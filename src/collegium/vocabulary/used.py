"""The part of a vocabulary that a corpus uses, and the tokenizer of that part.

Shapes: V ids of the whole vocabulary, U kept ids.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from collegium.errors import VocabularyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

BYTE_FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


def check_can_be_cut(tokenizer: Tokenizer, *, where: str) -> None:
    """Check that tokens can be cut so that every text still has an encoding.

    Raises:
        VocabularyError: it is not a BPE whose smallest tokens are bytes.
    """
    settings = _settings(tokenizer)
    model = settings["model"]
    kind = model.get("type")
    if kind != "BPE":
        fault = f"a {kind} tokenizer"
    elif not (_is_byte_level(settings) or model.get("byte_fallback")):
        fault = "a BPE tokenizer without tokens of single bytes"
    elif model.get("dropout") or any(model.get(key) for key in _AFFIXES):
        fault = "a BPE tokenizer with dropout, prefixes or suffixes"
    else:
        return
    raise VocabularyError(
        f"{where}: got {fault}; must be a BPE over bytes, such as that of GPT-2 or Llama; keep "
        "every token with `all`"
    )


_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")


def kept_ids(tokenizer: Tokenizer, used: Collection[int]) -> np.ndarray:
    """Return the ascending ids (U,) with which all texts that use these ids are encoded the same.

    They are the used ids, all added tokens, the tokens of single bytes, and the results of all
    merges on the way from characters to a used token. A span of a text that ends up as one token
    was merged as that token is by itself: merges are applied by rank, and none crossed its ends.
    So every merge of those texts is kept, and at each step the merge of lowest rank is the same.
    """
    settings = _settings(tokenizer)
    vocab: Mapping[str, int] = settings["model"]["vocab"]
    ranks = {(left, right): rank for rank, (left, right) in enumerate(settings["model"]["merges"])}
    names = {number: token for token, number in vocab.items()}
    singles = ByteLevel.alphabet() if _is_byte_level(settings) else BYTE_FALLBACK
    tokens = {token for token in (*singles, settings["model"].get("unk_token")) if token in vocab}
    for number in used:
        if number in names:
            tokens.update(token for token in _merged(names[number], ranks) if token in vocab)
    ids = {*used, *map(vocab.__getitem__, tokens), *_special_ids(settings)}
    return np.array(sorted(ids), np.int64)


def cut_tokenizer(tokenizer: Tokenizer, kept_U: np.ndarray, *, where: str) -> Tokenizer:
    """Return the tokenizer whose token u is the token kept_U[u] of the given one.

    Raises:
        VocabularyError: transformers loads other ids from its file.
    """
    from transformers import AutoTokenizer

    settings, new = _settings(tokenizer), {old: u for u, old in enumerate(kept_U.tolist())}
    names = {token: number for token, number in tokenizer.get_vocab().items() if number in new}
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        text = json.dumps(_renumbered(settings, new), ensure_ascii=False)
        (Path(folder) / TOKENIZER).write_text(text, encoding="utf-8")
        _renumber_config(Path(folder) / TOKENIZER_CONFIG, new)
        smaller = AutoTokenizer.from_pretrained(folder)
    smaller.name_or_path = tokenizer.name_or_path
    if smaller.get_vocab() != {token: new[number] for token, number in names.items()}:
        raise VocabularyError(
            f"{where}: {tokenizer.name_or_path}: transformers numbers the kept tokens otherwise; "
            "must load with ascending ids; keep every token with `all`"
        )
    return smaller


def _settings(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _is_byte_level(settings: Mapping[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps([settings["pre_tokenizer"], settings["decoder"]])


def _merged(token: str, ranks: Mapping[tuple[str, str], int]) -> Iterator[str]:
    """Yield the characters of a token, the results of its merges in order, and the token."""
    yield token  # some tokenizers emit whole words of the vocabulary without a merge
    pieces = list(token)
    yield from pieces
    while len(pieces) > 1:
        pairs = [ranks.get(pair, len(ranks)) for pair in pairwise(pieces)]
        first = pairs.index(min(pairs))
        if pairs[first] == len(ranks):
            return
        pieces[first : first + 2] = [pieces[first] + pieces[first + 1]]
        yield pieces[first]


def _special_ids(settings: Mapping[str, Any]) -> set[int]:
    """Return the ids of added tokens, of the frame around a text, and of padding."""
    ids = {token["id"] for token in settings["added_tokens"]}
    ids |= {number for owner, key in _frame(settings) for number in np.atleast_1d(owner[key])}
    return {int(number) for number in ids}


def _frame(settings: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the places of ids around a text: a container, and the key of an id or of a list."""
    if settings.get("padding"):
        yield settings["padding"], "pad_id"
    processor = settings.get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        for token in (part.get("special_tokens") or {}).values():  # of a template
            yield token, "ids"
        for name in ("sep", "cls"):  # of BERT and RoBERTa: a token and its id
            if name in part:
                yield part[name], 1


def _renumbered(settings: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return the content of tokenizer.json for the kept tokens, changing the given one."""
    model = settings["model"]
    model["vocab"] = {token: new[old] for token, old in model["vocab"].items() if old in new}
    kept = model["vocab"].keys()
    model["merges"] = [
        [left, right] for left, right in model["merges"] if {left, right, left + right} <= kept
    ]
    for token in settings["added_tokens"]:
        token["id"] = new[token["id"]]
    for owner, key in _frame(settings):
        ids = owner[key]
        owner[key] = [new[old] for old in ids] if isinstance(ids, list) else new[ids]
    return settings


def _renumber_config(path: Path, new: Mapping[int, int]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    decoder = config.get("added_tokens_decoder")
    if decoder:
        config["added_tokens_decoder"] = {str(new[int(old)]): one for old, one in decoder.items()}
        path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
