"""Known differences between mlx-lm's models and transformers'; loading such a model gives a warning.

Each was measured against transformers on random weights (tests/judge/test_architectures.py). Differences below 1 % of
the largest logit are left out. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Config = dict[str, Any]

# mlx-lm's classes for these attend to all tokens, which matters only for texts longer than the window.
_NO_WINDOW = ("gemma2", "ministral3", "mistral", "mixtral", "phi3", "phimoe", "starcoder2")
_NO_WINDOW_IF_USED = ("qwen2", "qwen2_moe", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3", "qwen3_moe")
# mlx-lm's classes for these take the layers of full attention from a regular pattern.
_PATTERN = {"gemma3_text": 6, "cohere2": 4, "exaone4": 4}
# mlx-lm's classes for these read no scaling of the rotary embedding, or not this kind.
_NO_ROPE_SCALING = {"cohere", "cohere2", "dbrx", "ernie4_5", "ernie4_5_moe", "gemma", "gemma2", "glm", "glm4"}
_NO_ROPE_SCALING |= {"gpt_neox", "helium", "lfm2", "lfm2_moe", "minimax_m2", "mixtral", "muse_glimmer_text", "nanochat"}
_NO_ROPE_SCALING |= {"glm4_moe", "phi", "qwen2_moe", "qwen3_moe", "starcoder2"}
_ONLY_YARN = ("deepseek_v2", "ministral3", "mistral4")
# The activation that mlx-lm's class always computes. The variants of GELU are nearly the same.
_ACTIVATIONS = {
    "silu": "afmoe bailing_hybrid cohere cohere2 deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5 ernie4_5_moe "
    "exaone exaone4 exaone_moe falcon_h1 falcon_mamba glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa granite granitemoe "
    "granitemoehybrid helium hunyuan_v1_dense internlm3 iquestcoder jamba llama ministral3 mistral mixtral olmo2 "
    "olmo3 olmoe phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss smollm3 stablelm",
    "gelu": "gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text gpt2 gptj gpt_bigcode gpt_neox phi "
    "starcoder2",
}
_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function")


def _rotates_a_part(config: Config) -> bool:
    rope = config.get("rope_parameters") or config
    return rope.get("partial_rotary_factor", 0.5) != 1.0


def _does_not_truncate(config: Config) -> bool:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type") == "yarn" and rope.get("truncate") is False


def _is_set(name: str, default: Any = None) -> Callable[[Config], bool]:
    return lambda config: config.get(name, default) not in (None, default)


# (model types, whether this config is affected, what mlx-lm does)
_FIELDS: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (("gemma3_text",), _is_set("final_logit_softcapping"), "does not cap the logits (final_logit_softcapping)"),
    (("gemma3_text",), _is_set("attn_logit_softcapping"), "does not cap the attention (attn_logit_softcapping)"),
    (
        ("gemma3_text",),
        _is_set("use_bidirectional_attention", False),
        "masks later tokens in the attention, the model does not (use_bidirectional_attention)",
    ),
    (
        ("qwen2_moe",),
        _is_set("norm_topk_prob", False),
        "does not normalize the weights of chosen experts (norm_topk_prob)",
    ),
    (("gpt2", "gpt_bigcode"), _is_set("scale_attn_weights", True), "scales the attention (scale_attn_weights)"),
    (
        ("gpt2",),
        _is_set("scale_attn_by_inverse_layer_idx", False),
        "scales the attention of all layers alike (scale_attn_by_inverse_layer_idx)",
    ),
    (("olmoe",), _is_set("clip_qkv"), "does not limit queries, keys and values (clip_qkv)"),
    (("nanochat",), _is_set("final_logit_softcapping", 15.0), "caps the logits at 15 (final_logit_softcapping)"),
    (("gpt_oss",), _is_set("swiglu_limit", 7.0), "limits the experts' values at 7 (swiglu_limit)"),
)
_DIFFERENCES: dict[str, tuple[Callable[[Config], bool], str]] = {
    "ernie4_5_moe": (lambda c: True, "chooses experts without the model's correction bias (moe_statics)"),
    "glm": (_rotates_a_part, "rotates all of each attention head, the model a part of it (partial_rotary_factor)"),
    "gpt_oss": (_does_not_truncate, "rounds the limits of YaRN's ramp, the model does not (truncate: false)"),
    "olmo_hybrid": (lambda c: True, "computes other logits, for an unknown reason"),
    "jamba": (
        lambda c: c.get("num_experts", 1) > 1,
        "normalizes the weights of chosen experts, the model does not",
    ),
}


def known_differences(config: Config) -> list[str]:
    """Sentences about what mlx-lm's class computes differently for a model with this ``config``."""
    text = _text(config)
    window, rope = text.get("sliding_window"), _scaling(text)
    found = [f"mlx-lm {cause}: its answers differ from transformers'" for cause in other_numbers(config)]
    if rope.get("rope_type", rope.get("type")) in ("longrope", "su") and rope.get("short_factor") != rope.get(
        "long_factor"
    ):
        length = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        found.append(
            "mlx-lm always uses the rotary factors of long texts (long_factor): its answers differ from transformers' "
            f"in texts of up to {length} tokens"
        )
    if _ignores_window(text) and isinstance(window, int) and 0 < window < (text.get("max_position_embeddings") or 0):
        found.append(f"mlx-lm attends to all tokens, the model to the last {window}: longer texts differ")
    return found


def other_numbers(config: Config) -> list[str]:
    """What mlx-lm's class computes differently even for short texts."""
    text = _text(config)
    kind, rope = text.get("model_type"), _scaling(text)
    causes = [what for kinds, concerns, what in _FIELDS if kind in kinds and concerns(text)]
    if kind in _DIFFERENCES and _DIFFERENCES[kind][0](text):
        causes.append(_DIFFERENCES[kind][1])
    scaling = rope.get("rope_type", rope.get("type", "default"))
    unread = kind in _NO_ROPE_SCALING or (kind in _ONLY_YARN and scaling != "yarn")
    if unread and isinstance(scaling, str) and scaling != "default":
        causes.append(f"does not scale the rotary embedding (rope_type {scaling})")
    for activation, kinds in _ACTIVATIONS.items():
        stated = next((text[field] for field in _ACTIVATION_FIELDS if isinstance(text.get(field), str)), activation)
        if kind in kinds.split() and activation not in stated.replace("swish", "silu"):
            causes.append(f"computes the activation {activation}, the model {stated}")
    return causes


def not_computed(config: Config) -> list[str]:
    """Fields of ``config`` whose values mlx-lm's class does not support, and why."""
    text, found = _text(config), []
    kind, types = text.get("model_type"), text.get("layer_types")
    if kind == "gemma2":
        caps = [name for name in ("attn_logit_softcapping", "final_logit_softcapping") if text.get(name, 1) is None]
        found += [f"{name} is null, and mlx-lm always caps" for name in caps]
    if kind in _PATTERN:
        every = text.get("sliding_window_pattern") or _PATTERN[kind]
        full = isinstance(types, list) and set(types) == {"full_attention"}
        if kind == "gemma3_text" and not full and text.get("num_hidden_layers", every) < every:
            found.append(f"num_hidden_layers is below {every} (sliding_window_pattern), so no layer has full attention")
        elif isinstance(types, list) and isinstance(every, int) and "sliding_attention" in types:
            regular = [(i + 1) % every == 0 for i in range(len(types))]
            if regular != [name == "full_attention" for name in types]:
                found.append(f"layer_types: mlx-lm gives full attention to every {every}th layer and to no other")
    return found


def _text(config: Config) -> Config:
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _scaling(text: Config) -> Config:
    return text.get("rope_parameters") or text.get("rope_scaling") or {}


def _ignores_window(text: Config) -> bool:
    kind, types = text.get("model_type"), text.get("layer_types")
    if kind not in _NO_WINDOW_IF_USED:
        return kind in _NO_WINDOW
    if isinstance(types, list):
        return "sliding_attention" in types
    layers = text.get("num_hidden_layers", 0)
    return bool(text.get("use_sliding_window")) and text.get("max_window_layers", layers) < layers
