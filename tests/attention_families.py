"""Tiny configurations of mlx-lm's model families in which tokens are linked by attention alone."""

from __future__ import annotations

from typing import Any

# Sizes and switches by the names that mlx-lm's configurations have for them. A configuration takes those it knows.
COMMON: dict[str, Any] = {
    name: value
    for value, names in [
        (97, "vocab_size num_vocab embedding_size"),
        (64, "hidden_size n_embd d_model model_dim hidden_dim dim_model_base mlp_hidden_size"),
        (
            48,
            "intermediate_size ffn_hidden_size ff_intermediate_size intermediate_size_mlp shared_intermediate_size "
            "n_inner dense_intermediate_size",
        ),
        (32, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size share_expert_dim"),
        (16, "head_dim kv_channels swa_head_dim swa_v_head_dim"),
        (
            8,
            "sliding_window sliding_window_size attention_window_size attention_chunk_size window_size "
            "loop_window_size q_lora_rank kv_lora_rank qk_nope_head_dim v_head_dim qk_rope_head_dim rotary_dim",
        ),
        (
            4,
            "num_attention_heads n_head n_heads num_heads num_experts num_local_experts n_routed_experts "
            "moe_num_experts num_hidden_layers n_layer n_layers num_layers n_kv_heads swa_num_attention_heads",
        ),
        (
            2,
            "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_top_k moe_k decoder_sparse_step "
            "num_attention_groups sliding_window_pattern swa_num_key_value_heads num_kv_reuse_layers "
            "dense_attention_every_n_layers num_nextn_predict_layers",
        ),
        (
            1,
            "n_group topk_group moe_layer_freq first_k_dense_replace num_shared_experts n_shared_experts "
            "num_dense_layers moe_num_shared_experts zero_expert_num",
        ),
        (0, "moe_layer_start_index num_kv_shared_layers pad_token_id hidden_size_per_layer_input"),
        (128, "max_position_embeddings n_positions n_ctx block_size"),
        (
            100.0,
            "rope_theta swa_rope_theta rope_base rope_local_base_freq rope_local_theta rope_embedding_base "
            "rotary_emb_base",
        ),
        (1e-5, "rms_norm_eps norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon"),
        (
            1.0,
            "routed_scaling_factor scale_depth scale_emb logits_scaling attention_multiplier embedding_multiplier "
            "residual_multiplier route_scale mup_embedding_multiplier mup_width_multiplier mup_attn_multiplier "
            "rope_position_scale",
        ),
        (0.5, "logit_scale partial_rotary_factor rotary_pct"),
        (16.0, "query_pre_attn_scalar"),
        (50.0, "attn_logit_softcapping"),
        (30.0, "final_logit_softcapping"),
        (
            True,
            "norm_topk_prob use_qk_norm qk_norm post_norm route_norm mla_scale_q_lora mla_scale_kv_lora no_bias "
            "mup_enabled mup_use_scaling use_qkv_bias",
        ),
        (False, "tie_word_embeddings attention_bias mlp_bias use_bias bias rope_traditional qkv_bias mlp_only"),
        (None, "rope_scaling"),
        ("silu", "hidden_act"),
        ("sigmoid", "scoring_func score_func"),
        ("noaux_tc", "topk_method"),
    ]
    for name in names.split()
}
_LAYERS = ["sliding_attention", "full_attention"] * 2
_LATENT = {"num_key_value_heads": 4, "head_dim": None}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 100.0}
_ROPE = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}
_ROPES = {"full_attention": _ROPE, "sliding_attention": {**_ROPE, "rope_theta": 50.0}}
_BLOCK = {
    "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
    "ffn": {"ffn_mult": 1.0, "no_op": False, "replace_with_linear": False},
}
_GEMMA = {"num_hidden_layers": 4, "sliding_window_pattern": 2}
_LONG = {
    "type": "longrope",
    "long_factor": [1.5] * 8,
    "short_factor": [1.0] * 8,
    "long_mscale": 1.2,
    "short_mscale": 1.2,
    "original_max_position_embeddings": 64,
}
_GEMMA4 = {
    "layer_types": _LAYERS,
    "head_dim": 16,
    "global_head_dim": 16,
    "rope_parameters": _ROPES,
    "num_kv_shared_layers": 2,
}
# Module of mlx_lm.models: what differs from COMMON.
FAMILIES: dict[str, dict[str, Any]] = {
    "Klear": {"mlp_only_layers": [0]},
    "afmoe": {"layer_types": _LAYERS},
    "apertus": {},
    "bailing_moe": {},
    "cohere": {},
    "cohere2": {},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 100.0, "clip_qkv": 8.0},
    },
    "deepseek": {"scoring_func": "softmax"},
    "deepseek_v2": {
        **_LATENT,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "rope_scaling": {**_YARN, "mscale_all_dim": 1.0},
    },
    "deepseek_v3": {**_LATENT, "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "dots1": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone": {},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": _LAYERS, "is_moe_layer": [False, True, True, True]},
    "gemma": {},
    "gemma2": {},
    "gemma3": {"text_config": {**COMMON, "model_type": "gemma3_text", **_GEMMA}},
    "gemma3_text": _GEMMA,
    "gemma4": {"text_config": {**COMMON, "model_type": "gemma4_text", **_GEMMA4}},
    "gemma4_text": _GEMMA4,
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": {**_LATENT, "partial_rotary_factor": 1.0},
    "gpt_neox": {},
    "gpt_oss": {"layer_types": _LAYERS},
    "gptj": {},
    "granite": {},
    "granitemoe": {},
    "helium": {},
    "internlm2": {},
    "internlm3": {},
    "kimi_vl": {"text_config": {**COMMON, **_LATENT}},
    "kimi_k25": {"text_config": {**COMMON, **_LATENT}},
    "laguna": {
        "layer_types": _LAYERS,
        "rope_parameters": _ROPES,
        "num_attention_heads_per_layer": [4] * 4,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "lille-130m": {},
    "llama": {"layer_types": _LAYERS},
    "llama4_text": {"no_rope_layers": [0, 0, 1, 1]},
    "longcat_flash": {"zero_expert_type": "identity", "attention_method": "MLA"},
    "mellum": {"layer_types": _LAYERS, "rope_parameters": _ROPES},
    "mimo": {},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 0, 1],
        "moe_layer_freq": [0, 1, 0, 1],
        "v_head_dim": 16,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    },
    "minicpm": {},
    "minicpm3": {**_LATENT, "rope_scaling": {**_LONG, "long_factor": [1.5] * 4, "short_factor": [1.0] * 4}},
    "minimax": {},
    "ministral3": {
        "layer_types": _LAYERS,
        "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 128},
    },
    "mistral3": {"text_config": {**COMMON, "model_type": "llama"}},
    "mistral4": {
        **_LATENT,
        "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 128},
    },
    "mixtral": {},
    "muse_glimmer": {"layer_types": _LAYERS},
    "nanbeige": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron-nas": {"block_configs": [_BLOCK] * 4},
    "olmo2": {},
    "olmo3": {"layer_types": _LAYERS},
    "olmoe": {},
    "openelm": {
        "num_transformer_layers": 4,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4] * 4,
        "num_kv_heads": [2] * 4,
        "ffn_multipliers": [1.0] * 4,
        "rope_freq_constant": 100.0,
        "ffn_with_glu": True,
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
    },
    "phi": {},
    "phi3": {"partial_rotary_factor": 1.0},
    "phimoe": {
        "original_max_position_embeddings": 64,
        "rope_scaling": _LONG,
    },
    "phixtral": {},
    "pixtral": {"text_config": {**COMMON, "model_type": "llama"}},
    "plamo": {"n_shared_head": 2},
    "plamo3": {},
    "qwen": {"num_key_value_heads": 4},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen2_vl": {"text_config": {**COMMON, "model_type": "qwen2"}},
    "qwen3": {},
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen3_vl": {"text_config": {**COMMON, "model_type": "qwen3"}},
    "qwen3_vl_moe": {"text_config": {**COMMON, "model_type": "qwen3_moe", "mlp_only_layers": []}},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0], "no_rope_layer_interval": 2},
    "solar_open": {},
    "spark2_5": {"hidden_act": "gelu", "layer_types": _LAYERS, "rope_parameters": _ROPES},
    "stablelm": {},
    "starcoder2": {},
    "step3p5": {"layer_types": _LAYERS, "moe_layers_enum": "1,2,3", "partial_rotary_factors": [0.5, 1.0] * 2},
    "talkie": {},
    "telechat3": {},
    "youtu_llm": _LATENT,
}
# Not right when packed, and why.
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("absolute positions", {}),
    "gpt_bigcode": ("absolute positions", {}),
    "hunyuan_v1_dense": ("learned norms between rotation and product", {}),
    "iquestloopcoder": ("gates of rotated queries", {}),
}
