"""A base model's ``config.json``, as mlx-lm's model classes expect it. Standard library only.

transformers 5 moved the rotary settings into ``rope_parameters`` and renamed a few fields. mlx-lm's classes read the
older names and, where they find none, fall back to a default: a checkpoint saved by transformers 5 would load with the
wrong RoPE and say nothing. Stops at the config: weights are loaded in ``loading.py``.
"""

from __future__ import annotations

from typing import Any

# Those whose older rope_scaling meant full attention alone. mlx-lm's classes for newer models of two settings (Gemma 4)
# read rope_parameters; there a rope_scaling would make transformers drop both settings for it.
_SCALES_FULL_ATTENTION = ("gemma3_text", "gemma3n_text", "olmo3")
_GPT_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def missing_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The older fields that ``config`` implies but does not state; empty for a config of transformers 4.

    Both generations of fields may stand side by side: transformers 5 reads either. A stated field is never replaced,
    except a ``rope_theta`` that ``rope_parameters`` contradicts (transformers 5 goes by ``rope_parameters``).
    """
    found: dict[str, Any] = {}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        nested = any(isinstance(v, dict) for v in rope.values())
        found |= _rope_by_layer(rope, config.get("model_type")) if nested else _rope(rope)
        if config.get("model_type") == "gpt_neox":
            found |= {_GPT_NEOX[k]: v for k, v in found.items() if k in _GPT_NEOX}
    if "num_local_experts" in config:
        found["num_experts"] = config["num_local_experts"]
    if "n_positions" in config:
        found["n_ctx"] = config["n_positions"]
    if pattern := _sliding_window_pattern(config):
        found["sliding_window_pattern"] = pattern
    stated = {k for k in found if config.get(k) is not None and k != "rope_theta"}
    found = {k: v for k, v in found.items() if k not in stated and (k not in config or config[k] != v)}
    if isinstance(config.get("text_config"), dict) and (inner := missing_fields(config["text_config"])):
        found["text_config"] = {**config["text_config"], **inner}
    return found


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    found = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if rope.get(k) is not None}
    kind = rope.get("rope_type", "default")
    # Whole, with theta: transformers takes a rope_scaling, where there is one, in place of rope_parameters. Where there
    # is no scaling the field is still stated: some of mlx-lm's classes demand it.
    found["rope_scaling"] = {**rope, "type": kind} if kind != "default" else None
    return found


def _rope_by_layer(rope: dict[str, Any], model_type: str | None) -> dict[str, Any]:
    """Gemma 3 and its like: one set of settings for full, one for sliding attention."""
    full, sliding = ({**(rope.get(kind) or {})} for kind in ("full_attention", "sliding_attention"))
    found = {"rope_theta": full.get("rope_theta"), "rope_local_base_freq": sliding.get("rope_theta")}
    if model_type in _SCALES_FULL_ATTENTION:
        found["rope_scaling"] = _rope(full)["rope_scaling"]
    return {k: v for k, v in found.items() if v is not None}


def _sliding_window_pattern(config: dict[str, Any]) -> int | None:
    """Every how many layers attention is full, where ``layer_types`` follows such a rule."""
    types = config.get("layer_types")
    if not isinstance(types, list) or "sliding_attention" not in types or "full_attention" not in types:
        return None
    every = types.index("full_attention") + 1
    regular = all((kind == "full_attention") == ((i + 1) % every == 0) for i, kind in enumerate(types))
    return every if regular else None
