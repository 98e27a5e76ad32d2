"""GGUF files of a student, for llama.cpp and the tools around it, in float16 or 8 bits.

`gguf`, the package of llama.cpp, names the tensors and writes the file. The layout of the values
follows its converter, `convert_hf_to_gguf.py`: the rows of queries and keys of Llama are permuted,
the norms of Gemma are stored with their 1, and the fused projection of GPT-NeoX is sorted.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from collegium.errors import ExportError
from collegium.export.fake_quantization import WeightGrid
from collegium.export.format import Format
from collegium.export.gguf_tokenizer import add_tokenizer, tokenizer_kind
from collegium.models.loading import load_model, load_tokenizer
from collegium.models.options import ModelOptions
from collegium.models.weights import CONFIG

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

FILE = "model.gguf"
ROPE_TYPES = ("default", "linear")
"""Rotary embeddings whose settings a file holds, and transformers reads or ignores at factor 1."""

Layout = Callable[[str, "NDArray[Any]", Any], "NDArray[Any]"]
"""(name in the file, values, config) -> values as llama.cpp stores them."""


def _same(name: str, values: NDArray[Any], config: Any) -> NDArray[Any]:
    del name, config
    return values


def _permuted(name: str, values: NDArray[Any], config: Any) -> NDArray[Any]:
    """Interleave both halves of each head of queries and keys, as llama.cpp rotates pairs.

    (heads, 2, d / 2, ...) -> (heads, d / 2, 2, ...) for a head of width d.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = name.split(".")[-2]
    if part not in heads:
        return values
    size = heads[part]
    halves = values.reshape(size, 2, values.shape[0] // size // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _with_one(name: str, values: NDArray[Any], config: Any) -> NDArray[Any]:
    """Store w + 1 for the norms, which multiply by 1 + w."""
    del config
    return values + 1 if name.endswith("norm.weight") else values


def _sorted_qkv(name: str, values: NDArray[Any], config: Any) -> NDArray[Any]:
    """(heads, 3, d, ...) -> (3, heads, d, ...): all queries, then all keys, then all values."""
    if ".attn_qkv." not in name:
        return values
    heads = config.num_attention_heads
    parts = values.reshape(heads, 3, values.shape[0] // heads // 3, *values.shape[1:])
    return parts.swapaxes(0, 1).reshape(values.shape)


@dataclass(frozen=True)
class Family:
    """A model family of llama.cpp."""

    arch: str
    """Its name in GGUF files."""
    layout: Layout = _same
    is_read: bool = True
    """Whether transformers reads such files."""


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", _permuted),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", _with_one, is_read=False),
    "gemma2": Family("gemma2", _with_one),
    "gemma3_text": Family("gemma3", _with_one),
    "phi3": Family("phi3"),
    "gpt_neox": Family("gptneox", _sorted_qkv, is_read=False),
}
"""Families by `model_type`."""


@dataclass(frozen=True, kw_only=True)
class Gguf(Format):
    """One file with weights, tokenizer and chat template. Vectors stay float32."""

    packages = ("gguf",)
    loader = "gguf"
    file = FILE
    weights: Literal["F16", "Q8_0"]
    """Type of the matrices. Q8_0 needs rows of a multiple of 32, and keeps others in float16."""

    @property
    def grid(self) -> WeightGrid | None:
        return WeightGrid(bits=8, group_size=32) if self.weights == "Q8_0" else None

    def check(
        self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, where: str
    ) -> None:
        super().check(config, tokenizer, where)
        if config.model_type not in FAMILIES:
            raise ExportError(
                f"{where}: got a student of type {config.model_type}; must be one of "
                f"{', '.join(FAMILIES)}; choose another format"
            )
        for problem in _unsupported(config):
            raise ExportError(f"{where}: got {problem}; choose another format")
        tokenizer_kind(tokenizer, where)

    def write(self, student: Path, target: Path) -> None:
        from gguf import GGUFWriter

        where = str(student)
        model = load_model(ModelOptions(model=where, dtype="float32", device="cpu"), where=where)
        tokenizer = load_tokenizer(where, where=where)
        config: Any = model.config
        self.check(config, tokenizer, where)
        family = FAMILIES[config.model_type]
        writer = GGUFWriter(target / FILE, family.arch)
        _add_settings(writer, config, self.weights)
        add_tokenizer(writer, tokenizer, num_tokens=config.vocab_size, where=where)
        parameters = {n: p.detach().numpy() for n, p in model.named_parameters()}
        for name, values, kind in self._tensors(parameters, family, config):
            writer.add_tensor(name, values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        # The reader of transformers leaves out some keys, such as the width of a head of Qwen3.
        shutil.copyfile(student / CONFIG, target / CONFIG)

    def _tensors(
        self, parameters: Mapping[str, NDArray[Any]], family: Family, config: Any
    ) -> Iterator[tuple[str, NDArray[Any], Any]]:
        """Yield name, stored values and type of each tensor."""
        import gguf

        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]
        for key, values in parameters.items():
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ExportError(
                    f"{key}: has no name in GGUF files of {family.arch}; choose another format"
                )
            values = family.layout(name, values, config)
            kind = gguf.GGMLQuantizationType.F32
            if values.ndim > 1:
                is_quantized = self.weights == "Q8_0" and values.shape[-1] % block == 0
                kind = gguf.GGMLQuantizationType["Q8_0" if is_quantized else "F16"]
            yield name, gguf.quantize(values, kind), kind


def _rope(config: Any) -> dict[str, Any]:
    """Return the rotary settings of layers with full attention."""
    settings = config.rope_parameters
    return settings.get("full_attention", settings)


def _unsupported(config: Any) -> Iterator[str]:
    """Yield settings of a family that its files cannot hold."""
    kind = _rope(config).get("rope_type", "default")
    if kind not in ROPE_TYPES:
        yield f"rope_type {kind}; must be one of {', '.join(ROPE_TYPES)}"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale = getattr(config, "query_pre_attn_scalar", head)
    if scale != head:
        yield f"query_pre_attn_scalar {scale}; must be {head}, the width of a head"
    if getattr(config, "mlp_bias", False):
        yield "mlp_bias; must be false"


def _add_settings(writer: Any, config: Any, weights: str) -> None:
    from gguf import LlamaFileType, RopeScalingType

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = _rope(config)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{weights}"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if config.model_type == "gpt_neox":
        writer.add_parallel_residual(config.use_parallel_residual)
        writer.add_layer_norm_eps(config.layer_norm_eps)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if sliding := getattr(config, "sliding_window", None):
        writer.add_sliding_window(sliding)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
