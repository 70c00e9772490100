"""Where mlx-lm computes something else than the model's authors: said when such a model is loaded.

Each was measured against transformers on random weights (tests/judge/test_architectures.py). Differences below 1 % of
the largest logit are left out. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Config = dict[str, Any]

# mlx-lm's classes for these attend to all tokens; the window matters only for texts that are longer.
_NO_WINDOW = ("gemma2", "ministral3", "mistral", "mixtral", "phi3", "phimoe", "starcoder2")


def _rotates_a_part(config: Config) -> bool:
    rope = config.get("rope_parameters") or config
    return rope.get("partial_rotary_factor", 0.5) != 1.0


def _does_not_truncate(config: Config) -> bool:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope.get("rope_type") == "yarn" and rope.get("truncate") is False


_DIFFERENCES: dict[str, tuple[Callable[[Config], bool], str]] = {
    "ernie4_5_moe": (lambda c: True, "chooses experts without the model's correction bias (moe_statics)"),
    "glm": (_rotates_a_part, "rotates all of each attention head, the model a part of it (partial_rotary_factor)"),
    "gpt_oss": (_does_not_truncate, "rounds the limits of YaRN's ramp, the model does not (truncate: false)"),
    "olmo_hybrid": (lambda c: True, "computes other logits, and the cause is not known"),
    "jamba": (
        lambda c: c.get("num_experts", 1) > 1,
        "normalizes the weights of chosen experts, the model does not",
    ),
}


def known_differences(config: Config) -> list[str]:
    """Sentences about what mlx-lm's class computes differently for a model with this ``config``."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    kind, window = text.get("model_type"), text.get("sliding_window")
    found = []
    if kind in _DIFFERENCES and _DIFFERENCES[kind][0](text):
        found.append(f"mlx-lm {_DIFFERENCES[kind][1]}: its answers differ from transformers'")
    if kind in _NO_WINDOW and isinstance(window, int) and 0 < window < (text.get("max_position_embeddings") or 0):
        found.append(f"mlx-lm attends to all tokens, the model to the last {window}: longer texts differ")
    return found
