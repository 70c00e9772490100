"""Reading a base model's ``config.json`` and adding the fields that mlx-lm's model classes expect.

transformers 5 moved the rotary settings into ``rope_parameters`` and renamed a few fields. mlx-lm's classes read the
older names and fall back to a default if they are missing: a checkpoint saved by transformers 5 would silently load
with the wrong RoPE. Weights are loaded in ``loading.py``. Standard library only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ModelError

# Families whose older rope_scaling applied only to full attention. mlx-lm's classes for newer models with two sets of
# settings (Gemma 4) read rope_parameters; there a rope_scaling would make transformers ignore both sets.
_SCALES_FULL_ATTENTION = ("gemma3_text", "gemma3n_text", "olmo3")
_GPT_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` at ``path``, a model folder or the file itself, as it is stored. Raises: ModelError."""
    file = path / "config.json" if path.is_dir() else path
    name_folder = "Name the folder of a Hugging Face language model."
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file.parent}: has no config.json", name_folder) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read ({error})", "Download the file again.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file}: has no model_type", name_folder)
    return config


def missing_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The older fields that ``config`` implies but does not state; empty for a config of transformers 4.

    A config may have both the old and the new fields; transformers 5 reads either. A stated field is never replaced,
    except for a ``rope_theta`` that contradicts ``rope_parameters`` (transformers 5 uses ``rope_parameters``).
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
    # All of rope_parameters, theta included: transformers reads a rope_scaling instead of rope_parameters if there is
    # one. Without scaling the field is stated as well, because some of mlx-lm's classes require it.
    found["rope_scaling"] = {**rope, "type": kind} if kind != "default" else None
    return found


def _rope_by_layer(rope: dict[str, Any], model_type: str | None) -> dict[str, Any]:
    """Gemma 3 and similar families: one set of settings for full attention, one for sliding attention."""
    full, sliding = ({**(rope.get(kind) or {})} for kind in ("full_attention", "sliding_attention"))
    found = {"rope_theta": full.get("rope_theta"), "rope_local_base_freq": sliding.get("rope_theta")}
    if model_type in _SCALES_FULL_ATTENTION:
        found["rope_scaling"] = _rope(full)["rope_scaling"]
    return {k: v for k, v in found.items() if v is not None}


def _sliding_window_pattern(config: dict[str, Any]) -> int | None:
    """N if every N-th layer has full attention and the others sliding attention; None for any other pattern."""
    types = config.get("layer_types")
    if not isinstance(types, list) or "sliding_attention" not in types or "full_attention" not in types:
        return None
    every = types.index("full_attention") + 1
    regular = all((kind == "full_attention") == ((i + 1) % every == 0) for i, kind in enumerate(types))
    return every if regular else None
