"""Which of mlx-lm's models give a row the same result in a batch of different lengths as alone.

Padding must not change a row's result. In these classes of mlx-lm 0.32.2 it changes it silently or raises an error. A
test compares all of mlx-lm's families.
"""

from __future__ import annotations

import mlx.nn as nn

from . import older_mlx_lm

_PADDING = "padding changes the state of its recurrent layers"
_CACHE = "its cache cannot be batched"
# Keyed by module of mlx_lm.models.
NOT_BATCHED = {
    "afm7": "padding changes its answers",
    "baichuan_m1": _PADDING,
    "bailing_moe_linear": _PADDING,
    "deepseek_v41": _CACHE,
    "gemma2": "its attention mask lacks the batch axis",
    "gpt_bigcode": "it uses one length for all rows",
    "jamba": _PADDING,
    "llama4": _CACHE,
    "longcat_flash_ngram": "padding changes its n-grams",
    "mamba": _PADDING,
    "nemotron_h": _PADDING,
    "olmo_hybrid": _PADDING,
    "recurrent_gemma": _PADDING,
    "rwkv7": _PADDING,
}


def why_not_batched(model: nn.Module) -> str | None:
    """The reason why rows of different lengths must be computed one at a time; None if they can share a batch."""
    family = type(model).__module__.rpartition(".")[2]
    return NOT_BATCHED.get(family) or (older_mlx_lm.NOT_BATCHED.get(family) if older_mlx_lm.is_used() else None)
