"""Building models and tokenizers, with checks that all weights are present and finite."""

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
from collegium.models.folder import read_headers, resolve_folder, shards
from collegium.models.forward import head_layer, tap_names, tap_width
from collegium.models.options import ModelFacts, ModelOptions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
MAX_NAMES = 5
LAYER = re.compile(r"(.*?)\.(\d+)\.")
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, StrictDataclassError)


class HasVocabulary(Protocol):
    """Anything with a token-to-id mapping."""

    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device, with validated weights."""

    model: PreTrainedModel
    head_size: int
    """Rows of the head, pad rows included."""
    name: str


def load_model(options: ModelOptions, *, where: str) -> LoadedModel:
    """Load a causal language model whose weights are finite and match its config one to one.

    Raises:
        ModelError: a missing, unexpected, misshapen or non-finite tensor, or an unusable folder.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    resolve_folder(options.model, where=where)
    source = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(options.model, **source)
        # Always explicit: a checkpoint must not select the attention kernel.
        config._attn_implementation_internal = None
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            options.model,
            config=config,
            dtype=options.dtype,
            attn_implementation=_attention(config, options.attention),
            use_safetensors=True,
            # Report mismatches instead of raising, so that `_check_loading` names all of them.
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
    """Compare names and shapes of the saved tensors with those of the config, reading no tensor.

    Skipped for hub ids and for model types whose tensors are renamed on loading, which `load_model`
    checks.

    Raises:
        ModelError: a tensor is missing, unexpected, or has another shape.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    folder = resolve_folder(options.model, where=where)
    if folder is None or options.trust_remote_code:
        return
    config = load_config(options, where=where)
    model = empty_model(config, f"{where}: {folder}/config.json")
    if get_checkpoint_conversion_mapping(config.model_type):
        return
    saved = {name: tensor.shape for name, tensor in read_headers(folder, where=where).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    saved = {
        _prefixed_name(name, expected, model.base_model_prefix): s for name, s in saved.items()
    }
    _check_layers(saved, expected, where=where)
    tied = set(model.all_tied_weights_keys)
    _check_loading(
        {
            "missing_keys": set(expected) - set(saved) - tied,
            "unexpected_keys": {
                name for name in set(saved) - set(expected) if not _is_ignored(model, name)
            },
            "mismatched_keys": {
                (name, saved[name], expected[name])
                for name in set(saved) & set(expected)
                if saved[name] != expected[name]
            },
        },
        where=where,
    )


def scan_weights(model: nn.Module, where: str) -> None:
    """Check that every parameter and buffer is finite, and warn about all-zero matrices.

    Raises:
        ModelError: a weight is not finite.
    """
    # A forward pass is not enough: attention can hide a non-finite weight.
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        for line in _check_values(name, tensor.detach(), where=where):
            logger.warning(line)


def scan_folder(options: ModelOptions, *, where: str) -> list[str]:
    """Run `scan_weights` on the files of a folder, one tensor at a time. A no-op for hub ids.

    Returns: one warning per all-zero matrix.

    Raises:
        ModelError: a weight is not finite.
    """
    folder = resolve_folder(options.model, where=where)
    lines: list[str] = []
    for shard in [] if folder is None else shards(folder, where=where):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (`safe_open` is not a mapping)
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
    """Load a fast tokenizer. Slow ones do not expose the bytes of their tokens.

    Raises:
        ModelError: no tokenizer found, or only a slow one.
    """
    from transformers import AutoTokenizer

    resolve_folder(path, where=where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        reason = first_line(error)
        raise ModelError(f"{where}: no tokenizer can be loaded from {path}; {reason}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{where}: {path} is a slow tokenizer; must have tokenizer.json; convert it once with "
            f"`AutoTokenizer.from_pretrained(...).save_pretrained(...)`"
        )
    return tokenizer


def model_facts(model: PreTrainedModel) -> ModelFacts:
    """Return facts about the architecture of a model, which may be on the meta device."""
    widths = {tap: tap_width(model, tap) for tap in tap_names(model)}
    return ModelFacts(num_parameters=count_parameters(model), tap_widths=widths)


def empty_model(config: PretrainedConfig, where: str) -> PreTrainedModel:
    """Build the model of a config on the meta device: names and shapes without weight memory.

    Raises:
        ModelError: the config does not build a model.
    """
    from transformers import AutoModelForCausalLM

    # Always explicit: a checkpoint must not select the attention kernel.
    config._attn_implementation_internal = None
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # Bad values in the file make model constructors raise errors of any type.
    except Exception as error:
        raise ModelError(
            f"{where}: builds no {config.model_type} model ({first_line(error)}); must be a config "
            "that transformers can build; fix its values"
        ) from error


def build_model(
    config: Mapping[str, Any], *, vocab_size: int, seed: int, attention: str = "auto"
) -> PreTrainedModel:
    """Build a randomly initialized float32 model without touching the global generators.

    Raises:
        ModelError: unknown model type or key, or a `vocab_size` other than the tokenizer's.
    """
    from transformers import AutoModelForCausalLM

    settings = check_config(config, vocab_size=vocab_size)
    full = _complete_config(settings, vocab_size)
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
    """Validate all keys and values of a config and return it with its `vocab_size` set.

    Raises:
        ModelError: unknown model type or key, a value that the model type does not accept, or a
            `vocab_size` other than the tokenizer's.
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
    valid_keys = _config_keys(model_type)
    for key in settings:
        if key not in valid_keys:
            raise ModelError(f"config.{key}: unknown key of {model_type}{nearest(key, valid_keys)}")
    config_size = settings.setdefault("vocab_size", vocab_size)
    if config_size != vocab_size:
        raise ModelError(
            f"config.vocab_size: got {config_size}; must be {vocab_size}, the number of ids of the "
            f"tokenizer; leave it out"
        )
    empty_model(_complete_config(settings, vocab_size), "config")
    return settings


def vocab_size_of(tokenizer: HasVocabulary) -> int:
    """Return V, the largest token id + 1, including added tokens and holes."""
    return max(tokenizer.get_vocab().values()) + 1


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing: recompute each block in the backward pass."""
    # transformers 5.23 deprecated `gradient_checkpointing_enable`; older versions have only that.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters, counting tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _config_keys(model_type: str) -> set[str]:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    internal = {"transformers_version"}
    names = (set(config.to_dict()) | set(vars(config)) | set(config.attribute_map)) - internal
    return {name for name in names if not name.startswith("_")}


def make_config(settings: Mapping[str, Any]) -> PretrainedConfig:
    """Build a config from its keys and values.

    Raises:
        ModelError: the model type does not accept these values.
    """
    from transformers import AutoConfig

    arguments = {key: value for key, value in settings.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(settings["model_type"], **arguments)
    # Bad values in a recipe make config constructors raise errors of any type.
    except Exception as error:
        raise ModelError(
            f"config: {settings['model_type']} does not accept these values; {first_line(error)}"
        ) from error


def _complete_config(settings: Mapping[str, Any], vocab_size: int) -> PretrainedConfig:
    config = make_config(settings)
    # Default special ids refer to the usual vocabulary of the type and may be out of range here.
    for name in SPECIAL_IDS:
        value = getattr(config, name, None)
        if name not in settings and isinstance(value, int) and value >= vocab_size:
            setattr(config, name, None)
    return config


def _attention(config: PretrainedConfig, choice: str) -> str:
    """Resolve `auto`: `sdpa` if the model supports it or is unknown, else `eager`."""
    from transformers import AutoModelForCausalLM

    if choice != "auto":
        return choice
    mapping: Any = AutoModelForCausalLM._model_mapping
    is_registered = type(config) in mapping
    return "sdpa" if not is_registered or mapping[type(config)]._supports_sdpa else "eager"


def choose_device(choice: str) -> torch.device:
    """Resolve `auto` to the first CUDA device, else MPS, else the CPU."""
    if choice != "auto":
        return torch.device(choice)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _check_loading(info: Mapping[str, Iterable[Any]], *, where: str) -> None:
    # `from_pretrained` only reports these, and goes on with randomly initialized weights.
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, saved, expected = mismatched[0]
        raise ModelError(
            f"{where}: tensors with wrong shapes for config.json ({len(mismatched)}): {name} "
            f"is {list(saved)}, must be {list(expected)}; use the config of these weights"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{where}: missing tensors ({len(missing)}): {_preview(missing)}; must match "
            f"config.json one to one; copy the model again"
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        raise ModelError(
            f"{where}: tensors not in the model of config.json ({len(unexpected)}): "
            f"{_preview(unexpected)}; use the config of these weights"
        )


def _check_layers(saved: Iterable[str], expected: Iterable[str], *, where: str) -> None:
    # A different number of layers is one message, not a list of tensors.
    saved_depths, expected_depths = _layer_counts(saved), _layer_counts(expected)
    for prefix, depth in expected_depths.items():
        if saved_depths.get(prefix, depth) != depth:
            raise ModelError(
                f"{where}: the weights have {saved_depths[prefix]} layers ({prefix}), config.json "
                f"has {depth}; must be equal; use the config of these weights"
            )


def _layer_counts(names: Iterable[str]) -> dict[str, int]:
    """Count layers by tensor name: `model.layers.3.x` gives at least 4 for `model.layers`."""
    depths: dict[str, int] = {}
    for match in filter(None, map(LAYER.match, names)):
        prefix, number = match[1], int(match[2])
        depths[prefix] = max(depths.get(prefix, 0), number + 1)
    return depths


def _preview(names: list[str]) -> str:
    rest = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f", and {rest} more" if rest > 0 else "")


def _prefixed_name(name: str, expected: Mapping[str, Any], prefix: str) -> str:
    # Old checkpoints name the tensors of the body without its prefix.
    return f"{prefix}.{name}" if name not in expected and f"{prefix}.{name}" in expected else name


def _is_ignored(model: PreTrainedModel, name: str) -> bool:
    patterns = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq"]
    return name in model.all_tied_weights_keys or any(re.search(p, name) for p in patterns)
