"""Fields of PEFT's config without meaning here: kept with the adapter, and written back into a PEFT folder.

Fields that describe the arrays are written from the current adapter, and fields of another method are left out, so
that a config is never out of date.
"""

from __future__ import annotations

from typing import Any

from ...adapter import Adapter

# Read into the adapter, or only valid for the old arrays.
_OWN = {
    *("peft_type", "peft_version", "base_model_name_or_path", "inference_mode", "bias", "fan_in_fan_out"),
    *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("modules_to_save", "trainable_token_indices", "token_indices", "feedforward_modules"),
    *("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
    *("lora_dropout", "vera_dropout", "projection_prng_key", "save_projection", "d_initial"),
    *("init_lora_weights", "init_weights", "init_ia3_weights", "velora_config"),
}
_OF_ALL_METHODS = {"task_type", "auto_mapping", "revision"}


def unused_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that do not go into the adapter."""
    return {name: value for name, value in raw.items() if name not in _OWN}


def kept_fields(adapter: Adapter, peft_type: str) -> dict[str, Any]:
    """The fields to write back into a config of ``peft_type``; ``task_type`` is CAUSAL_LM if none was read."""
    peft = adapter.metadata.get("peft", {})
    fields = peft.get("fields", {})
    if peft.get("type") != peft_type:
        fields = {name: value for name, value in fields.items() if name in _OF_ALL_METHODS}
    fields = {"task_type": "CAUSAL_LM", **fields}
    if adapter.config.embedding_side == "input":
        fields.pop("ensure_weight_tying", None)
    return fields
