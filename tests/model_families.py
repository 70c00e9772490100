"""A tiny random model of each of mlx-lm's families: sizes by the names of config fields, and what else it needs."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

_SIZES: dict[str, Any] = {
    name: size
    for size, names in [
        (
            64,
            "vocab_size hidden_size n_embd d_model embedding_dim hidden_dim lru_width block_dim max_seq_len block_size "
            "vocab_size_per_layer_input model_max_length n_positions n_ctx seq_length dim_model_base model_dim "
            "num_vocab",
        ),
        (
            4,
            "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads num_experts "
            "num_local_experts n_routed_experts linear_num_value_heads moe_num_experts mamba_num_heads mamba_n_heads "
            "num_transformer_layers swa_num_attention_heads linear_num_heads swa_num_query_heads index_n_heads "
            "conv_kernel conv_L_cache mamba_d_conv time_step_rank index_topk laurel_rank hidden_size_per_layer_input",
        ),
        (
            2,
            "num_key_value_heads num_kv_heads kv_n_heads n_kv_heads num_experts_per_tok moe_topk moe_top_k moe_k "
            "n_group num_expert_group linear_num_key_heads num_attention_groups attn_layer_period expert_layer_period "
            "cla_share_factor mamba_expand layer_group_size sliding_window_pattern swa_num_key_value_heads expand "
            "num_kv_reuse_layers linear_conv_kernel_dim full_attention_interval n_groups num_dense_layers "
            "num_global_key_value_heads mamba_n_groups num_kv_shared_layers conv_window",
        ),
        (
            48,
            "intermediate_size ffn_hidden_size mlp_hidden_size dense_intermediate_size n_inner block_ff_dim "
            "intermediate_size_mlp",
        ),
        (
            24,
            "moe_intermediate_size shared_expert_intermediate_size q_lora_rank expert_ffn_hidden_size "
            "shared_intermediate_size share_expert_dim",
        ),
        (
            16,
            "head_dim v_head_dim kv_lora_rank linear_key_head_dim linear_value_head_dim attention_head_dim "
            "mamba_head_dim swa_head_dim swa_v_head_dim mamba_d_head index_head_dim block_multiple_of "
            "query_pre_attn_scalar global_head_dim head_size kv_channels",
        ),
        (
            8,
            "sliding_window qk_nope_head_dim qk_rope_head_dim state_size chunk_size attention_window_size rotary_dim "
            "ssm_state_size mamba_d_state sliding_window_size attention_chunk_size mamba_chunk_size floor_scale "
            "a_low_rank_dim v_low_rank_dim gate_low_rank_dim decay_low_rank_dim",
        ),
        (256, "max_position_embeddings"),
        (
            1e-5,
            "rms_norm_eps layer_norm_eps norm_eps layer_norm_epsilon layernorm_epsilon norm_epsilon layernorm_eps",
        ),
        (1e4, "rope_theta rotary_emb_base swa_rope_theta rope_local_base_freq"),
        (
            1,
            "topk_group num_shared_experts n_shared_experts first_k_dense_replace num_shared_expert attn_layer_offset "
            "expert_layer_offset decoder_sparse_step moe_layer_freq routed_scaling_factor scale_depth scale_emb "
            "group_norm_size zero_expert_num logits_scaling attention_multiplier embedding_multiplier "
            "residual_multiplier",
        ),
        (
            False,
            "attention_bias mlp_bias use_bias tie_word_embeddings conv_bias post_norm use_mixed_mlp_moe use_cla "
            "mamba_proj_bias block_auto_adjust_ff_dim add_swa_attention_sink_bias add_full_attention_sink_bias "
            "use_qkv_bias",
        ),
        (
            True,
            "norm_topk_prob use_qk_norm qk_norm use_conv_bias use_expert_bias mla_scale_q_lora mla_scale_kv_lora "
            "rms_norm mamba_conv_bias linear_allow_neg_eigval",
        ),
        (0.5, "rotary_pct partial_rotary_factor"),
    ]
    for name in names.split()
}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_MIXED = [_SLIDING, _FULL] * 2
_ROPE = {"rope_theta": 1e4, "rope_type": "default"}
_LLAMA4_ROPE = {**_ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 256}
_ROUTER = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_YARN = {"type": "yarn", "factor": 1, "mscale": 1, "mscale_all_dim": 0, "original_max_position_embeddings": 256}
_GEMMA3N = dict(
    model_type="gemma3n_text",
    hidden_size=64,
    num_hidden_layers=6,
    intermediate_size=[48] * 6,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_kv_shared_layers=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    vocab_size=64,
    vocab_size_per_layer_input=64,
    hidden_size_per_layer_input=16,
    sliding_window=8,
    max_position_embeddings=256,
    rope_local_base_freq=1e4,
    rope_theta=1e5,
    rope_scaling=None,
    final_logit_softcapping=30.0,
    layer_types=[_SLIDING, _FULL] * 3,
    activation_sparsity_pattern=[0.0] * 6,
    altup_num_inputs=4,
    altup_coef_clip=120.0,
    altup_correct_scale=True,
    altup_active_idx=0,
    laurel_rank=8,
)
_QWEN35 = {
    **{name: _SIZES[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "rms_norm_eps")},
    **{name: _SIZES[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")},
    **{name: _SIZES[name] for name in ("linear_num_value_heads", "linear_num_key_heads", "linear_value_head_dim")},
    **{name: _SIZES[name] for name in ("linear_key_head_dim", "full_attention_interval", "max_position_embeddings")},
    **{name: _SIZES[name] for name in ("moe_intermediate_size", "shared_expert_intermediate_size")},
    "model_type": "qwen3_5_text",
    "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
}
_LLAMA4 = {
    **{name: _SIZES[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "rms_norm_eps")},
    **{name: _SIZES[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")},
    **{name: _SIZES[name] for name in ("intermediate_size_mlp", "num_local_experts", "max_position_embeddings")},
    **{name: _SIZES[name] for name in ("attention_bias", "attention_chunk_size", "rope_theta", "use_qk_norm")},
    "model_type": "llama4_text",
    "interleave_moe_layer_step": 2,
    "num_experts_per_tok": 1,
    "rope_scaling": None,
}
# What a family needs besides.
_MORE: dict[str, dict[str, Any]] = {
    "Klear": {"mlp_only_layers": []},
    "afmoe": {"layer_types": _MIXED},
    "baichuan_m1": {"sliding_window_layers": [0, 2]},
    "bailing_hybrid": {"num_key_value_heads": 4},
    "bailing_moe_v3": {"n_group": 1},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "deepseek_v2": {"rope_scaling": _YARN},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": _MIXED, "is_moe_layer": [False, True] * 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gear": {"layer_types": _MIXED},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3_text": {"num_hidden_layers": 6},
    "gemma4_text": {"num_hidden_layers": 6, "layer_types": [_SLIDING, _FULL] * 3},
    "glm4_moe": {"rope_scaling": None},
    "glm_moe_dsa": {**_ROUTER, "rope_parameters": _ROPE},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_groups": 1, "mamba_n_heads": 8},
    "hunyuan": {"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}},
    "kimi_linear": {
        "q_lora_rank": None,
        "linear_attn_config": {
            "kda_layers": [1, 2, 3],
            "full_attn_layers": [4],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
    },
    "lfm2": {"full_attn_idxs": [1, 3], "block_ffn_dim_multiplier": 1.0},
    "lfm2_moe": {"full_attn_idxs": [1, 3]},
    "llama4_text": {"no_rope_layers": [1, 0] * 2},
    "longcat_flash": {"attention_method": "MLA", "zero_expert_type": "identity"},
    "mamba2": {"num_heads": 8, "head_dim": 16, "time_step_limit": [0.0, 100.0]},
    "mellum": {"layer_types": _MIXED, "rope_parameters": {_SLIDING: _ROPE, _FULL: _ROPE}},
    "mimo_v2_flash": {**_ROUTER, "hybrid_layer_pattern": [0, 1] * 2, "moe_layer_freq": [0, 1] * 2},
    "minicpm3": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [1.0] * 4,
            "original_max_position_embeddings": 256,
        }
    },
    "ministral3": {"rope_parameters": _LLAMA4_ROPE},
    "mistral4": {"rope_parameters": _LLAMA4_ROPE},
    "nanochat": {"num_key_value_heads": 4},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {"block_configs": [{"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}}] * 4},
    "nemotron_h": {"hybrid_override_pattern": "M*-M", "mamba_num_heads": 8},
    "olmo_hybrid": {"layer_types": ["linear_attention", _FULL] * 2, "linear_num_key_heads": 4},
    "openelm": {
        "ffn_dim_divisor": 8,
        "num_query_heads": [4] * 4,
        "num_kv_heads": [2] * 4,
        "ffn_multipliers": [1.0] * 4,
    },
    "phimoe": {
        "original_max_position_embeddings": 256,
        "rope_scaling": {
            **dict.fromkeys(("short_factor", "long_factor"), [1.0] * 8),
            **dict.fromkeys(("short_mscale", "long_mscale"), 1.0),
        },
    },
    "plamo": {"num_attention_heads": 8, "n_shared_head": 8},
    "llama4": {"text_config": _LLAMA4},
    "qwen3_5": {"text_config": _QWEN35},
    "qwen3_5_moe": {"text_config": {**_QWEN35, "num_experts": 4, "num_experts_per_tok": 2}},
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen3_next": {"mlp_only_layers": []},
    "recurrent_gemma": {
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "num_key_value_heads": 1,
        "block_types": ["recurrent", "attention"],
    },
    "spark2_5": {"rope_parameters": {_SLIDING: _ROPE, _FULL: _ROPE}, "layer_types": _MIXED},
}
# Families that contain the language model of another one.
_INSIDE = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "kimi_k25": "deepseek_v3",
    "kimi_vl": "deepseek_v3",
    "lfm2-vl": "lfm2",
    "mistral3": "ministral3",
    "pixtral": "llama",
    "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
# Not made, and why.
NOT_MADE = {
    "bitnet": "mlx-lm has its layers for Metal only",
    "kimi_k3": "needs the configuration of its residual attention; tests of the gated delta rule have one",
    "minimax_m3_vl": "needs a configuration of its own for the text part",
    "muse_spark": "needs a configuration of its own for the text part",
    "olmo": "needs the package ai2-olmo, and leaves the interpreter without it",
    "phi3small": "its block-sparse attention needs Metal",
    "prism_hadamard_qwen35": "is a packed format of Qwen3.5",
}
_VISION = {"vision_config": {}, "vision_feature_layer": -1}


def families() -> list[str]:
    """The modules of mlx-lm with a model that is made here."""
    import mlx_lm.models as models

    names = [module.name for module in pkgutil.iter_modules(models.__path__) if module.name not in NOT_MADE]
    return [name for name in names if hasattr(importlib.import_module(f"mlx_lm.models.{name}"), "Model")]


def _config(name: str) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(_module(name).ModelArgs)}
    config = {field: size for field, size in _SIZES.items() if field in known}
    if "kv_lora_rank" in known:  # multi-head latent attention: as many keys as queries
        config["num_key_value_heads"] = 4
    config |= {"model_type": name, **_MORE.get(name, {})}
    if name in _INSIDE:
        config |= _VISION | {"text_config": _config(_INSIDE[name])}
    return config


def _module(name: str) -> Any:
    return importlib.import_module(f"mlx_lm.models.{name}")


def tiny_model(name: str) -> nn.Module:
    """A random float32 model of the family ``name`` with 64 tokens in its vocabulary."""
    module = _module(name)
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(_config(name)))

    def draw(path: str, array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        noise = mx.random.normal(array.shape)
        return array + 0.1 * noise if array.ndim < 2 else noise * array.shape[-1] ** -0.5

    model.update(tree_map_with_path(draw, model.parameters()))
    return model
