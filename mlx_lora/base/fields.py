"""Config fields that mlx-lm's model classes need but transformers 5 renames or no longer writes.

The tables are by mlx-lm's names. A field is filled in only if the config does not state it, and only for the class that
mlx-lm builds: stored and written configs do not change. Fields of the rotary embedding are in ``config.py``. Standard
library only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from .heads import FLAG, stated_tie

Config = dict[str, Any]

# mlx-lm's field: transformers' fields; the first one that the config states is used.
_SAME = {
    "num_layers": ("num_hidden_layers",),
    "num_experts": ("num_local_experts",),
    "num_local_experts": ("num_experts",),
    "num_experts_per_tok": ("num_experts_per_token",),
    "n_group": ("num_expert_group",),
    "layer_norm_epsilon": ("rms_norm_eps",),
    "layernorm_epsilon": ("rms_norm_eps",),
    "max_position_embeddings": ("model_max_length",),
    "block_dim": ("hidden_size",),
    "swa_num_attention_heads": ("num_attention_heads",),
    "swa_head_dim": ("head_dim",),
    "swa_v_head_dim": ("v_head_dim",),
    "sliding_window_size": ("sliding_window",),
    "swa_rope_theta": ("rope_local_base_freq",),
}
# mlx-lm's field: how to compute it from others. A KeyError or TypeError means that one of them is not stated.
_DERIVED: dict[str, Callable[[Config], Any]] = {
    "head_dim": lambda c: c["hidden_size"] // c["num_attention_heads"],
    "intermediate_size": lambda c: c["expand"] * c["hidden_size"],
    "n_inner": lambda c: 4 * c["n_embd"],
    "is_moe_layer": lambda c: [kind == "sparse" for kind in c["mlp_layer_types"]],
    "rotary_dim": lambda c: int(c["head_dim"] * c.get("partial_rotary_factor", 1.0)),
    "swa_num_key_value_heads": lambda c: 2 * c["num_key_value_heads"],
    "hybrid_layer_pattern": lambda c: [int(kind == "sliding_attention") for kind in c["layer_types"]],
    "vocab_size": lambda c: c["text_config"]["vocab_size"],
    "first_k_dense_replace": lambda c: c["mlp_layer_types"].index("sparse"),
    "linear_attn_config": lambda c: {
        "num_heads": c["linear_num_heads"],
        "head_dim": c["linear_head_dim"],
        "short_conv_kernel_size": c["linear_conv_kernel_dim"],
        # counted from 1
        "kda_layers": [i for i, kind in enumerate(c["layer_types"], 1) if kind == "linear_attention"],
        "full_attn_layers": [i for i, kind in enumerate(c["layer_types"], 1) if kind == "full_attention"],
    },
}
_NOAUX_TC = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_MAMBA_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}
# Model type: settings that transformers fixes in code or writes differently, and that mlx-lm's class needs.
_BY_TYPE: dict[str, Callable[[Config], Config]] = {
    "apertus": lambda c: {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "bailing_hybrid": lambda c: {"head_dim": c["linear_head_dim"]},
    # A scaling by 1: mlx-lm's class requires the section.
    "deepseek_v2": lambda c: {"rope_scaling": {"factor": 1.0}},
    "exaone4": lambda c: {"sliding_window_pattern": _letters(c["sliding_window_pattern"])},
    "gemma3_text": lambda c: {"sliding_window_pattern": 1} if set(c["layer_types"]) == {"full_attention"} else {},
    "gemma4_unified_text": lambda c: {"hidden_size_per_layer_input": 0},
    "glm_moe_dsa": lambda c: {**_NOAUX_TC, "moe_layer_freq": 1},
    "granitemoehybrid": lambda c: {
        "layer_types": [_MAMBA_NAMES.get(kind, kind) for kind in c["layer_types"]],
        "position_embedding_type": "nope",  # transformers' default
    },
    "kimi_linear": lambda c: {"rope_theta": 10000.0, "mla_use_nope": True},  # without rotary embeddings
    "longcat_flash": lambda c: {
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "mimo_v2_flash": lambda c: {
        **_NOAUX_TC,
        "n_shared_experts": None,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "moe_layer_freq": [int(kind == "sparse") for kind in c["mlp_layer_types"]],
        "partial_rotary_factor": c["rope_parameters"]["full_attention"]["partial_rotary_factor"],
    },
    "minicpm3": lambda c: {"rope_scaling": {"original_max_position_embeddings": c["max_position_embeddings"]}},
    "minimax_m2": lambda c: {"shared_intermediate_size": 0},
    "qwen3_vl_moe_text": lambda c: {"norm_topk_prob": True},
    "solar_open": lambda c: {"first_k_dense_replace": 0, "intermediate_size": 0, "partial_rotary_factor": 1.0},
}
# Text parts of vision-language models that mlx-lm has only as the whole model.
_TEXT_PARTS = ("gemma3n_text", "gemma4_unified_text", "qwen3_5_text", "qwen3_5_moe_text")
# Fields of both libraries with values that mlx-lm's class does not understand.
_REPLACED = {("bailing_hybrid", "head_dim"), ("exaone4", "sliding_window_pattern"), ("granitemoehybrid", "layer_types")}


def _letters(pattern: str | int | None) -> str | None:
    """EXAONE 4's attention pattern as letters: 4 means LLLG, three local layers and a global one."""
    return "L" * (pattern - 1) + "G" if isinstance(pattern, int) and pattern else pattern


def class_fields(config: Config, known: Collection[str] | None = None) -> Config:
    """The fields that mlx-lm's class needs and ``config`` implies but does not state.

    Args:
        known: the class's fields; None for all, if the class is unknown (the text part of a vision-language model).
    """
    kind = config.get("model_type")
    found: Config = {}
    for name, others in _SAME.items():
        found |= next(({name: config[other]} for other in others if config.get(other) is not None), {})
    for name, rule in _DERIVED.items():
        with suppress(KeyError, TypeError, ZeroDivisionError, ValueError):
            found.setdefault(name, rule({**found, **config}))
    with suppress(KeyError, TypeError):
        found |= _BY_TYPE[kind](config)
    absent = {
        name: value
        for name, value in found.items()
        if (config.get(name) is None or (kind, name) in _REPLACED) and (known is None or name in known)
    }
    if isinstance(text := config.get("text_config"), dict):
        tied = stated_tie(config)
        absent["text_config"] = {**text, **class_fields(text), **({} if tied is None else {FLAG: tied})}
    return absent


def as_known_type(config: Config) -> Config:
    """Turn the config of a separately saved text part into one that mlx-lm has a class for.

    mlx-lm has these models only as vision-language models. Its ``llama4_text`` is another, dense model.
    """
    kind = config.get("model_type", "")
    if kind == "bailing_hybrid" and "kda_lower_bound" in config:
        return {**config, "architectures": ["BailingMoeV3ForCausalLM"]}
    if kind == "lfm2_vl":
        return {**config, "model_type": "lfm2-vl"}
    whole = kind.removesuffix("_text")
    if kind in _TEXT_PARTS or (kind == "llama4_text" and config.get("num_local_experts")):
        return {"model_type": whole, "text_config": config, "vocab_size": config.get("vocab_size")}
    return config
