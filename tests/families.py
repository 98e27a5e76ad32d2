"""Tiny random models of every type of causal language model in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tiny import tiny_tokenizer

V, ROWS = 90, 96
MAX_PARAMETERS = 30_000_000
NOT_TINY = frozenset(
    [
        "bailing_hybrid",
        "blt",
        "cohere_compass_text",
        "dbrx",
        "dots3_note",
        "dots3_note_text",
        "emu3",
        "gemma3n",
        "gemma4",
        "gemma4_assistant",
        "gemma4_text",
        "gemma4_unified_assistant",
        "kimi_linear",
        "llama4",
        "llama4_text",
        "mllama",
        "musicgen",
        "musicgen_melody",
        "qwen4_exp",
        "qwen4_exp_text",
        "reformer",
    ]
)
"""Types that need more than a table of values to be built tiny, or to be trained."""
TYPES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_TINY)

SIZES: dict[str, Any] = {"is_decoder": True, "use_cache": True, "rotary_pct": 1.0}
for value, names in {
    ROWS: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size n_embd d_model dim emb_dim embedding_size word_embed_proj_dim lru_width "
    "attention_hidden_size embed_dim",
    64: "intermediate_size ffn_dim n_inner ffn_hidden_size d_inner encoder_ffn_dim "
    "decoder_ffn_dim feed_forward_size mamba_d_ssm index_topk ffn_size",
    128: "max_position_embeddings n_positions n_ctx max_seq_len",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank "
    "mamba_chunk_size chunk_size block_size index_head_dim expert_ffn_hidden_size",
    8: "head_dim attention_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_d_state "
    "mamba_n_heads mamba_d_head state_size ssm_state_size mamba_num_heads mamba_head_dim "
    "mamba_headdim linear_key_head_dim linear_value_head_dim query_pre_attn_scalar kv_channels "
    "hidden_size_per_layer_input kq_dim rotary_dim",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers "
    "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads "
    "num_heads num_experts num_local_experts n_routed_experts mamba_d_conv time_step_rank "
    "conv_kernel linear_num_value_heads sliding_window window_size attention_window_size "
    "moe_num_experts",
    3: "conv_L_cache",
    2: "encoder_layers num_key_value_heads num_experts_per_tok mamba_expand n_mamba_heads "
    "linear_num_key_heads expand moe_k moe_topk index_n_heads",
    1: "n_shared_experts num_shared_experts first_k_dense_replace n_group topk_group "
    "num_expert_groups num_limited_groups mamba_n_groups n_groups mamba_ngroups "
    "moe_num_shared_experts pad_token_id",
    0: "bos_token_id eos_token_id num_kv_shared_layers dropout attention_dropout hidden_dropout "
    "resid_pdrop embd_pdrop attn_pdrop activation_dropout attention_probs_dropout_prob "
    "hidden_dropout_prob router_jitter_noise input_jitter_noise summary_first_dropout "
    "residual_dropout",
}.items():
    SIZES |= dict.fromkeys(names.split(), value)
SIZES["image_token_id"] = ROWS - 1

LINEAR = ["linear_attention", "full_attention"] * 2
MAMBA = {"mamba_dt_rank": 4, "use_mamba_kernels": False}
PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 1}
GRANITE = {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
EXTRA: dict[str, dict[str, Any]] = {
    **{
        key: {"num_key_value_heads": 4}
        for key in [
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "youtu",
        ]
    },
    **{key: {"logit_scale": 0.3} for key in ["cohere", "cohere2"]},
    **{key: {"final_logit_softcapping": 0.5} for key in ["gemma2", "vaultgemma"]},
    **{
        key: {"layer_types": LINEAR}
        for key in ["minimax", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]
    },
    **{key: {"intermediate_size": 64} for key in ["falcon_mamba", "mamba"]},
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {"attention_type": "original_full"},
    "ctrl": {"dff": 64},
    "falcon_h1": {
        **{"lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, "mlp_multipliers": [1.0, 1.0]},
        "ssm_multipliers": [1.0] * 5,
    },
    "gemma3n_text": {
        **{"intermediate_size": [64] * 4, "activation_sparsity_pattern": [0.0] * 4},
        **{"laurel_rank": 8, "altup_num_inputs": 2, "num_kv_shared_layers": 2},
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite": {**GRANITE, "attention_multiplier": 0.2},
    "granitemoe": GRANITE,
    "granitemoehybrid": {
        **{"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 32}
    },
    "granitemoeshared": {"shared_intermediate_size": 32},
    "hyperclovax": {"logits_scaling": 3.0},
    "jamba": {**MAMBA, **PERIODS, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {
        **{"layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 64},
        **{"block_multiple_of": 8, "block_auto_adjust_ff_dim": False},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {
        **{"num_key_value_heads": 4, "num_layers": 2, "moe_topk": 2, "zero_expert_num": 0}
    },
    "mamba2": {"num_heads": 8},
    "minicpm3": {
        **{"num_key_value_heads": 4, "dim_model_base": 8, "scale_emb": 3.0, "scale_depth": 1.4}
    },
    "mpt": {"expansion_ratio": 2},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "moe"]},
    "recurrent_gemma": {**{"block_types": ["recurrent", "attention"], "attention_window_size": 16}},
    "xlm": {"n_layers": 2, "causal": True},
    "zamba": {
        **MAMBA,
        **PERIODS,
        **{"attention_hidden_size": 64, "attention_head_dim": 16},
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        **{"layers_block_type": ["mamba", "mamba", "hybrid", "mamba"], "num_mem_blocks": 1},
        **{"attention_hidden_size": 64, "attention_head_dim": 16, "use_mem_rope": True},
        "n_mamba_heads": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_values(config: PretrainedConfig) -> dict[str, Any]:
    """Small values for the keys that a config has."""
    keys = config.to_dict()
    values = {k: v for k, v in SIZES.items() if k in keys and not isinstance(keys[k], dict)}
    for key, value in values.items():
        if value == 0 and isinstance(keys[key], float):
            values[key] = 0.0
    return values | EXTRA.get(config.model_type, {})


def tiny_config(model_type: str) -> PretrainedConfig:
    """A config of four small layers. The parts of a composite config are small, too."""
    default = AutoConfig.for_model(model_type)
    parts: dict[str, Any] = {}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is None:
            continue
        parts[name] = tiny_values(part)
        if "text" not in name and "decoder" not in name:
            for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "is_decoder"):
                parts[name].pop(key, None)
            if hasattr(part, "patch_size"):
                parts[name] |= {"image_size": 8, "patch_size": 4}
    return AutoConfig.for_model(model_type, **{**tiny_values(default), **parts})


def tiny_family(model_type: str, folder: Path) -> PreTrainedModel:
    """Save a tiny model with weights so large that every error shows, and load it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) <= MAX_PARAMETERS
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            elif "norm" in name or "ln" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.tie_weights()
    if model.generation_config is not None:
        model.generation_config.do_sample = True
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
