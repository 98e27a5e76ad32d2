"""Make models and tokenizers, from folders or from a config, and prove that every weight is there and finite."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor, nn

from collegium.errors import ModelError, nearest
from collegium.models.config import first_line, load_config
from collegium.models.folder import ModelOptions, read_headers, resolve_folder, shards
from collegium.models.forward import head_layer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
MAX_NAMES = 5
LAYER = re.compile(r"(.*?)\.(\d+)\.")
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, StrictDataclassError)


class HasVocabulary(Protocol):
    """What `vocab_size_of` asks of a tokenizer."""

    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, with its weights checked."""

    model: PreTrainedModel
    head_size: int
    """Rows of the head, pad rows included."""
    name: str


def load_model(options: ModelOptions, *, where: str) -> LoadedModel:
    """Load a causal language model whose weights fit its config one to one and are finite.

    Raises:
        ModelError: a missing, superfluous, misshapen or non-finite tensor, or an unusable folder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    resolve_folder(options.model, where=where)
    source = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(options.model, **source)
        # always said aloud, so that a config cannot choose a kernel of its own
        config._attn_implementation_internal = None
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            options.model,
            config=config,
            dtype=options.dtype,
            attn_implementation=_attention(config, options.attention),
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **source,
        )
    except LOADING_ERRORS as error:
        raise ModelError(f"{where}: {options.model} cannot be loaded; {error}") from error
    model, info = loaded
    _check_loading(info, where=where)
    scan_weights(model, where=where)
    model.to(choose_device(options.device))
    head_size = head_layer(model).weight.shape[0]
    return LoadedModel(model.eval(), head_size, Path(options.model).name)


def check_weights(options: ModelOptions, *, where: str) -> None:
    """Compare names and shapes of the saved tensors with the model of the config, without reading one.

    Model types whose tensors are renamed on loading are left to `load_model`, as are hub ids.

    Raises:
        ModelError: a tensor is missing, fits nothing, or has another shape.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    folder = resolve_folder(options.model, where=where)
    if folder is None or options.trust_remote_code:
        return
    config = load_config(options, where=where)
    model = empty_model(config, f"{where}: {folder}/config.json")
    if get_checkpoint_conversion_mapping(config.model_type):
        return
    saved = {
        name: tuple(entry["shape"]) for name, entry in read_headers(folder, where=where).items()
    }
    known = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    saved = {_full_name(name, known, model.base_model_prefix): s for name, s in saved.items()}
    _check_layers(saved, known, where=where)
    tied = set(model.all_tied_weights_keys)
    _check_loading(
        {
            "missing_keys": set(known) - set(saved) - tied,
            "unexpected_keys": {
                name for name in set(saved) - set(known) if not _is_ignored(model, name)
            },
            "mismatched_keys": {
                (name, saved[name], known[name])
                for name in set(saved) & set(known)
                if saved[name] != known[name]
            },
        },
        where=where,
    )


def scan_weights(model: nn.Module, where: str) -> None:
    """Look at every parameter and buffer: attention can hide a non-finite weight from a forward pass.

    Raises:
        ModelError: a weight is not finite.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        for line in _check_values(name, tensor.detach(), where=where):
            logger.warning(line)


def scan_folder(options: ModelOptions, *, where: str) -> list[str]:
    """`scan_weights` over the files of a folder, one tensor at a time and without a model; a hub id passes.

    Returns: one line for every matrix of zeros.

    Raises:
        ModelError: a weight is not finite.
    """
    folder = resolve_folder(options.model, where=where)
    lines: list[str] = []
    for shard in [] if folder is None else shards(folder, where=where):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping: it has no other way to list them)
                lines += _check_values(name, file.get_tensor(name), where=where)
    return lines


def _check_values(name: str, tensor: Tensor, *, where: str) -> list[str]:
    if not tensor.is_floating_point():
        return []
    is_bad = ~torch.isfinite(tensor)
    count = int(is_bad.sum())
    if count:
        first = is_bad.nonzero()[0].tolist()
        raise ModelError(
            f"{where}: {name} has {count} non-finite values, first at {first}; must be finite; "
            f"save the model again from an earlier checkpoint"
        )
    is_zero = tensor.dim() == 2 and not bool(tensor.any())
    return [f"{where}: {name} is all zeros"] if is_zero else []


def load_tokenizer(
    path: str, *, revision: str | None = None, where: str
) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer, which alone knows the bytes of its tokens.

    Raises:
        ModelError: no tokenizer there, or only a slow one.
    """
    from transformers import AutoTokenizer

    resolve_folder(path, where=where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises a plain one
        reason = first_line(error)
        raise ModelError(f"{where}: no tokenizer can be loaded from {path}; {reason}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{where}: {path} holds a slow tokenizer; must have tokenizer.json; convert it once with "
            f"`AutoTokenizer.from_pretrained(...).save_pretrained(...)`"
        )
    return tokenizer


def empty_model(config: PretrainedConfig, where: str) -> PreTrainedModel:
    """The model of a config without memory for its weights: names and shapes alone.

    Raises:
        ModelError: the values of the config make no model.
    """
    from transformers import AutoModelForCausalLM

    # always said aloud, so that a config cannot choose a kernel of its own
    config._attn_implementation_internal = None
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Exception as error:  # whatever the values of a file can do to a constructor
        raise ModelError(
            f"{where}: makes no {config.model_type} model ({first_line(error)}); must be a config that "
            "transformers can build; correct its values"
        ) from error


def build_model(
    config: Mapping[str, Any], *, vocab_size: int, seed: int, attention: str = "auto"
) -> PreTrainedModel:
    """A fresh random model in float32 from a transformers config; the global generators stay as they are.

    Raises:
        ModelError: unknown model type or key, or a `vocab_size` other than the tokenizer's.
    """
    from transformers import AutoModelForCausalLM

    settings = check_config(config, vocab_size=vocab_size)
    full = _own_config(settings, vocab_size)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(
                full, dtype=torch.float32, attn_implementation=_attention(full, attention)
            )
    except Exception as error:
        reason = first_line(error)
        raise ModelError(f"config: {settings['model_type']} cannot be built; {reason}") from error


def check_config(config: Mapping[str, Any], *, vocab_size: int) -> dict[str, Any]:
    """The config with its `vocab_size`, once its model type knows every key and takes every value.

    Raises:
        ModelError: as `build_model`.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    settings = dict(config)
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = nearest(str(model_type), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        hint = hint if hint.startswith("; did") else ""
        raise ModelError(
            f"config.model_type: got {model_type!r}; must be a causal language model of "
            f"transformers, such as `llama` or `qwen3`{hint}"
        )
    known = _config_keys(model_type)
    for key in settings:
        if key not in known:
            raise ModelError(f"config.{key}: no such key of {model_type}{nearest(key, known)}")
    given = settings.setdefault("vocab_size", vocab_size)
    if given != vocab_size:
        raise ModelError(
            f"config.vocab_size: got {given}; must be {vocab_size}, the number of ids of the "
            f"tokenizer; leave it out"
        )
    empty_model(_own_config(settings, vocab_size), "config")
    return settings


def vocab_size_of(tokenizer: HasVocabulary) -> int:
    """V, the largest token id + 1: added tokens count, holes too."""
    return max(tokenizer.get_vocab().values()) + 1


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each block in the backward pass instead of keeping what it made."""
    # the older name warns from transformers 5.23 on, and the newer does not exist before
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _config_keys(model_type: str) -> set[str]:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    internal = {"transformers_version"}
    names = (set(config.to_dict()) | set(vars(config)) | set(config.attribute_map)) - internal
    return {name for name in names if not name.startswith("_")}


def make_config(settings: Mapping[str, Any]) -> PretrainedConfig:
    """A config out of its keys and values.

    Raises:
        ModelError: its model type does not take these values.
    """
    from transformers import AutoConfig

    arguments = {key: value for key, value in settings.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(settings["model_type"], **arguments)
    except Exception as error:  # whatever the values of a recipe can do to a constructor
        raise ModelError(
            f"config: {settings['model_type']} does not take these values; {first_line(error)}"
        ) from error


def _own_config(settings: Mapping[str, Any], vocab_size: int) -> PretrainedConfig:
    """The config of a fresh model, without the special tokens of the vocabulary that its type usually has."""
    config = make_config(settings)
    for name in SPECIAL_IDS:
        value = getattr(config, name, None)
        if name not in settings and isinstance(value, int) and value >= vocab_size:
            setattr(config, name, None)
    return config


def _attention(config: PretrainedConfig, choice: str) -> str:
    """The implementation to ask for by name; a model without `sdpa` gets `eager`."""
    from transformers import AutoModelForCausalLM

    if choice != "auto":
        return choice
    mapping: Any = AutoModelForCausalLM._model_mapping
    known = type(config) in mapping
    return "sdpa" if not known or mapping[type(config)]._supports_sdpa else "eager"


def choose_device(choice: str) -> torch.device:
    """The device that `auto` stands for: the first CUDA device, else Apple's, else the CPU."""
    if choice != "auto":
        return torch.device(choice)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _check_loading(info: Mapping[str, Iterable[Any]], *, where: str) -> None:
    """Refuse what `from_pretrained` would only report, and then train on invented weights."""
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, saved, wanted = mismatched[0]
        raise ModelError(
            f"{where}: {len(mismatched)} tensors have another shape than config.json says: {name} "
            f"is {list(saved)}, must be {list(wanted)}; use the config of these weights"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{where}: {len(missing)} tensors are missing: {_some(missing)}; must fit config.json "
            f"one to one; copy the model again"
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        raise ModelError(
            f"{where}: {len(unexpected)} tensors fit nothing in the model of config.json: "
            f"{_some(unexpected)}; use the config of these weights"
        )


def _check_layers(saved: Iterable[str], known: Iterable[str], *, where: str) -> None:
    """Say it in one number where config and weights differ by whole layers."""
    found, wanted = _depths(saved), _depths(known)
    for place, depth in wanted.items():
        if found.get(place, depth) != depth:
            raise ModelError(
                f"{where}: the weights hold {found[place]} layers ({place}), config.json says {depth}; "
                f"must be the same; use the config of these weights"
            )


def _depths(names: Iterable[str]) -> dict[str, int]:
    """`model.layers` -> number of layers there, by the names of their tensors."""
    depths: dict[str, int] = {}
    for match in filter(None, map(LAYER.match, names)):
        place, number = match[1], int(match[2])
        depths[place] = max(depths.get(place, 0), number + 1)
    return depths


def _some(names: list[str]) -> str:
    rest = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f", and {rest} more" if rest > 0 else "")


def _full_name(name: str, known: Mapping[str, Any], prefix: str) -> str:
    """Old files name the tensors of the body without its prefix."""
    return f"{prefix}.{name}" if name not in known and f"{prefix}.{name}" in known else name


def _is_ignored(model: PreTrainedModel, name: str) -> bool:
    patterns = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq"]
    return name in model.all_tied_weights_keys or any(re.search(p, name) for p in patterns)
