"""Building models and tokenizers, with checks that all weights are present and finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from collegium.errors import ModelError, first_line, nearest
from collegium.models import adapters, lora
from collegium.models.folder import check_model_type, resolve_folder
from collegium.models.forward import head_layer, tap_names, tap_width
from collegium.models.weights import CONFIG, main_dtype, quantization_of, read_headers, read_json
from collegium.options import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerFast as Tokenizer

    from collegium.models.options import ModelOptions

logger = logging.getLogger(__name__)

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
TRAINED_QUANTIZATION = ("bitnet",)
"""Methods that quantize float weights in each forward pass, as the model was trained."""
MAX_NAMES = 5
MISFITS = {
    "mismatched_keys": "tensors with wrong shapes for config.json",
    "missing_keys": "missing tensors",
    "unexpected_keys": "tensors not in the model of config.json",
}
"""Faults in the loading report of transformers, the most specific first."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about the architecture of a model."""

    num_parameters: int
    tap_widths: Mapping[str, int]
    """Width of each hidden state that can be tapped, in order of depth."""
    has_attention: bool = True
    """Whether queries, keys and values of its layers can be read."""
    query_width: int | None = None
    """Width of the queries of all heads, None where the config does not give it."""


def load_model(options: ModelOptions, *, where: str) -> PreTrainedModel:
    """Load a causal language model whose weights are finite and match its config one to one.

    An adapter is merged into the weights.
    """
    model = load_base(options, where=where)
    if options.adapter is not None:
        lora.attach_adapter(
            model, options.adapter, name=lora.ADAPTER_NAME, where=f"{where}.adapter"
        )
        model = adapters.merged(model)
    return model


def load_base(options: ModelOptions, *, where: str) -> PreTrainedModel:
    """Load a model as `load_model`, without its adapter."""
    model = _read_model(options, where=where)
    remedy = "save the model again from an earlier checkpoint"
    saved, loaded = saved_dtype(options, where=where), str(model.dtype).removeprefix("torch.")
    if saved not in (None, loaded):
        remedy = (
            f"{loaded} may not hold the values, which are saved as {saved}; set `dtype: {saved}`"
        )
    # A forward pass is not enough: attention can hide a non-finite weight.
    tensors = (*model.named_parameters(), *model.named_buffers())
    for line in scan_weights(tensors, where=where, remedy=remedy):
        logger.warning(line)
    _record_tying(model)
    if not head_layer(model).weight.is_floating_point():
        raise ModelError(
            f"{where}: the head of {options.model} is quantized; must be floats, since the losses "
            "read its weight; use a model that was quantized without it"
        )
    if not getattr(model, "is_quantized", False):  # else it was loaded to its device
        torch.nn.Module.to(model, choose_device(options.device))
    return model.eval()


def check_weights(options: ModelOptions, *, where: str) -> PreTrainedModel | None:
    """Compare names and shapes of the saved tensors with those of the config, reading no tensor.

    Returns the model without its values. Skipped for hub ids, custom code and quantized weights,
    which `load_model` checks.
    """
    folder = resolve_folder(options.model, where=where)
    if folder is None or options.runs_code(where) or quantization_of(folder, where=where):
        return None
    # On the meta device transformers maps the files and compares names and shapes, with the
    # renamings of each model type, but reads no tensor.
    return _read_model(options, where=where, device="meta")


def saved_dtype(options: ModelOptions, *, where: str) -> str | None:
    """Return the data type of most values in the files, None for a hub id."""
    folder = resolve_folder(options.model, where=where)
    return None if folder is None else main_dtype(read_headers(folder, where=where))


def _read_model(options: ModelOptions, *, where: str, device: str | None = None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    saved, folder = saved_dtype(options, where=where), resolve_folder(options.model, where=where)
    config = options.load_config(where)
    if folder is not None and quantization_of(folder, where=where):
        settings = dict(read_json(folder / CONFIG, where=where)["quantization_config"])
        if settings["quant_method"] == "compressed-tensors":
            settings["dequantize"] = True
        config.quantization_config = settings
        device = str(choose_device(options.device))  # its layers may not be movable
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder or options.model),
            config=config,
            revision=options.commit(where),
            trust_remote_code=options.runs_code(where),
            # For `auto` transformers believes config.json, which may name another type.
            dtype=saved or "auto" if options.dtype == "auto" else options.dtype,
            # Given also if it is None, which is `sdpa` if the model supports it, else `eager`: a
            # checkpoint must not select the attention kernel.
            attn_implementation=None if options.attention == "auto" else options.attention,
            device_map=device,
            use_safetensors=True,
            # Report mismatches instead of raising, so that all of them can be named.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    # Bad values in the config make model constructors raise errors of any type.
    except Exception as error:
        raise ModelError(
            f"{where}: {options.model} cannot be loaded ({first_line(error)}); must have a config "
            "that transformers can build, and the weights of that model; copy it again"
        ) from error
    model, report = loaded
    # `from_pretrained` only reports these, and goes on with randomly initialized weights.
    for key, fault in MISFITS.items():
        if names := sorted(report[key]):
            raise ModelError(
                f"{where}: {fault} ({len(names)}): {_preview(names)}; must match config.json one "
                "to one; copy the model again, or use the config of these weights"
            )
    if getattr(model, "_hf_peft_config_loaded", False):  # of a hub id
        raise ModelError(
            f"{where}: {options.model} contains an adapter; must be a model; merge it into its "
            "base model first"
        )
    return model


def drop_quantization(config: PretrainedConfig, *, where: str) -> None:
    """Remove a quantization config in place: it is read only beside quantized weights.

    Raises ModelError for a method that is part of the architecture.
    """
    for part in (config, config.get_text_config()):
        settings = vars(part).pop("quantization_config", None)
        if isinstance(settings, dict) and settings.get("quant_method") in TRAINED_QUANTIZATION:
            raise ModelError(
                f"{where}: {CONFIG}: quantization_config: got {settings['quant_method']}; must be "
                "a model without quantized layers; use another model"
            )


def _record_tying(model: PreTrainedModel) -> None:
    """Set `tie_word_embeddings` to false in the config of a model that was loaded untied."""
    # transformers keeps a saved head that differs from the embedding, whatever the config says.
    # Programs that believe the config of a saved student would drop that head.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True).items()
    if any(parameters.get(name) is not parameters.get(source) for name, source in pairs):
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def _preview(names: list[Any]) -> str:
    shown = [
        name if isinstance(name, str) else f"{name[0]} is {list(name[1])}, must be {list(name[2])}"
        for name in names[:MAX_NAMES]
    ]
    rest = len(names) - MAX_NAMES
    return ", ".join(shown) + (f", and {rest} more" if rest > 0 else "")


def scan_weights(
    tensors: Iterable[tuple[str, Tensor]],
    *,
    where: str,
    remedy: str = "save the model again from an earlier checkpoint",
) -> list[str]:
    """Return a warning per all-zero matrix. Raises ModelError if a tensor is not finite."""
    lines = []
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        # NaN is both minimum and maximum. 0.7 ns per value, where `isfinite` takes 9.
        lowest, highest = (float(end) for end in torch.aminmax(tensor.detach()))
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            is_bad = ~torch.isfinite(tensor.detach())
            raise ModelError(
                f"{where}: {name} has non-finite values ({int(is_bad.sum())}, first at "
                f"{is_bad.nonzero()[0].tolist()}); must be finite; {remedy}"
            )
        if tensor.dim() == 2 and lowest == highest == 0.0:
            lines.append(f"{where}: {name} is all zeros")
    return lines


def scan_folder(options: ModelOptions, *, where: str) -> list[str]:
    """Run `scan_weights` on the files of a folder, one tensor at a time. A no-op for hub ids."""
    folder = resolve_folder(options.model, where=where)
    if folder is None:
        return []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, entry in read_headers(folder, where=where).items():
            with safe_open(entry.file, framework="pt") as file:
                yield name, file.get_tensor(name)

    return scan_weights(tensors(), where=where)


def load_tokenizer(path: str, *, revision: str | None = None, where: str) -> Tokenizer:
    """Load a fast tokenizer. Slow ones do not expose the bytes of their tokens."""
    from transformers import AutoTokenizer

    source = str(resolve_folder(path, where=where) or path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
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
    return ModelFacts(
        num_parameters=count_parameters(model),
        tap_widths=widths,
        has_attention=bool(model._supports_attention_backend),
        query_width=_query_width(model.config.get_text_config()),
    )


def _query_width(config: PretrainedConfig) -> int | None:
    num_heads = getattr(config, "num_attention_heads", None)
    # Latent attention has heads of several widths.
    if not isinstance(num_heads, int) or hasattr(config, "kv_lora_rank"):
        return None
    return num_heads * (getattr(config, "head_dim", None) or config.hidden_size // num_heads)


def empty_model(config: PretrainedConfig, where: str) -> PreTrainedModel:
    """Build a model on the meta device: names and shapes. Raises ModelError if it cannot."""
    with torch.device("meta"):
        return _from_config(config, "auto", where)


def build_model(
    config: PretrainedConfig, *, seed: int, attention: str = "auto", dtype: str = "float32"
) -> PreTrainedModel:
    """Build a randomly initialized model without touching the global generators."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _from_config(config, attention, "config", dtype)


def cast_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model that loads from these weights in another data type.

    Some tensors stay float32, such as the frequencies of rotary embeddings: in bfloat16 they differ
    from those of every program that loads the saved folder.
    """
    loaded: Any = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=dtype,
        attn_implementation=model.config._attn_implementation,
    )
    return loaded


def _from_config(
    config: PretrainedConfig, attention: str, where: str, dtype: str = "float32"
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    kernel = None if attention == "auto" else attention
    try:
        return AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=kernel
        )
    # Bad values make model constructors raise errors of any type.
    except Exception as error:
        raise ModelError(
            f"{where}: builds no {config.model_type} model ({first_line(error)}); must be a config "
            "that transformers can build; fix its values"
        ) from error


def make_config(
    settings: Mapping[str, Any], *, vocab_size: int, where: str = "config"
) -> PretrainedConfig:
    """Build the config of a new model from its keys and values, and check that it builds a model.

    Raises:
        ModelError: unknown model type or key, a value that the model type does not accept, or a
            `vocab_size` other than the tokenizer's.
    """
    from transformers import AutoConfig

    values = {"vocab_size": vocab_size, **settings}
    model_type = values.pop("model_type", None)
    check_model_type(model_type, where=f"{where}.model_type")
    default = AutoConfig.for_model(str(model_type))
    keys = {*default.to_dict(), *vars(default), *default.attribute_map} - {"transformers_version"}
    keys = {key for key in keys if not key.startswith("_")}
    for key in values:
        if key not in keys:
            raise ModelError(f"{where}.{key}: unknown key of {model_type}{nearest(key, keys)}")
    if values["vocab_size"] != vocab_size:
        raise ModelError(
            f"{where}.vocab_size: got {values['vocab_size']}; must be {vocab_size}, the number of "
            "ids of the tokenizer; leave it out"
        )
    try:
        config = AutoConfig.for_model(str(model_type), **values)
    # Bad values in a recipe make config constructors raise errors of any type.
    except Exception as error:
        reason = first_line(error)
        raise ModelError(f"{where}: {model_type} does not accept these values; {reason}") from error
    # Default special ids refer to the usual vocabulary of the type and may be out of range here.
    for name in SPECIAL_IDS:
        value = getattr(config, name, None)
        if name not in settings and isinstance(value, int) and value >= vocab_size:
            setattr(config, name, None)
    empty_model(config, where)
    return config


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """Return V, the largest token id + 1, including added tokens and holes."""
    return max(tokenizer.get_vocab().values()) + 1


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing: recompute each block in the backward pass."""
    # transformers 5.23 deprecated `gradient_checkpointing_enable`; older versions have only that.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})


def count_parameters(model: nn.Module, without: Collection[str] = ()) -> int:
    """Return the number of parameters, counting tied ones once, `without` these adapters."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if set(without).isdisjoint(name.split(".")))


def choose_device(choice: str) -> torch.device:
    """Resolve `auto` to the first CUDA device, else MPS, else the CPU."""
    if choice != "auto":
        return torch.device(choice)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
