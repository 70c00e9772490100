"""Check that packing is correct for a model: by name, by configuration, and by a measurement on two rows of the data.

`FAMILIES` lists the families for which a test shows the same loss and gradients as for single rows. Other families may
pass state from token to token, use absolute positions, or be untested.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..base import older_mlx_lm
from ..errors import ConfigError
from .losses.cross_entropy import token_losses
from .packed_cache import HINT, packed_cache

# Modules of mlx_lm.models, by tests/model/test_packed_families.py.
_SHOWN_EQUAL = """
afmoe apertus bailing_moe cohere cohere2 dbrx deepseek deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone
exaone4 exaone_moe gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt_neox gpt_oss
gptj granite granitemoe helium internlm2 internlm3 kimi_k25 kimi_vl Klear laguna lille-130m llama llama4_text
longcat_flash mellum mimo mimo_v2_flash minicpm minicpm3 minimax ministral3 mistral3 mistral4 mixtral muse_glimmer
nanbeige nanochat nemotron nemotron-nas olmo2 olmo3 olmoe openelm phi phi3 phimoe phixtral pixtral plamo plamo3 qwen
qwen2 qwen2_moe qwen2_vl qwen3 qwen3_moe qwen3_vl qwen3_vl_moe seed_oss smollm3 solar_open spark2_5 stablelm
starcoder2 step3p5 talkie telechat3 youtu_llm
"""
FAMILIES = frozenset(_SHOWN_EQUAL.split())


def check_model(model: nn.Module, width: int) -> None:
    """Refuse models that are not known to compute packed rows like single rows. Needs no weights. Raises: ConfigError.

    Args:
        width: tokens in a packed sequence.
    """
    module, _, family = type(model).__module__.rpartition(".")
    wrong = older_mlx_lm.is_used() and family in older_mlx_lm.NOT_PACKED
    if module != "mlx_lm.models" or family not in FAMILIES or wrong:
        raise ConfigError(
            f"pack: {family if module == 'mlx_lm.models' else type(model).__name__} is not known to compute packed "
            "rows like single rows. (Unsuitable: state that passes from token to token, as in Mamba, "
            "convolutions and linear attention; absolute positions.)",
            HINT,
        )
    packed_cache(model, mx.zeros((1, 1), mx.int32))
    for what, limit in _limits(model):
        if width > limit:
            raise ConfigError(
                f"pack: {what} beyond {limit} tokens, and a packed sequence has {width}.",
                f"Set --max-seq-length to {limit} or less, or leave --pack out.",
            )


def _limits(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Parts that depend on more than the distance of two tokens, with the length up to which they do not."""
    for name, part in model.named_modules():
        if type(part).__name__.startswith("DynamicNTKScaling"):
            yield f"the rotary embedding {name} changes with the length of the sequence", part.max_position_embeddings
    arguments = getattr(model, "args", None)
    arguments = [arguments, getattr(arguments, "text_config", None)]
    for config in (found if isinstance(found, dict) else vars(found) for found in arguments if found is not None):
        rope = config.get("rope_parameters") or {}
        if rope.get("llama_4_scaling_beta"):
            yield "the scale of the attention changes with the position", rope["original_max_position_embeddings"]


def check_rows(model: nn.Module, rows: Sequence[Any], most: int = 64) -> None:
    """Pack two rows and compare the second one's loss with its loss as a single row. Raises: ConfigError.

    The model is in evaluation mode. The difference must be smaller than the change from attending to the first row: a
    tenth of it in float32, which some devices multiply in 10 bits, and half of it in half precision.
    """
    first, second = (mx.array(np.asarray(row.tokens[:most], np.int32)) for row in rows)
    together, begin = mx.concatenate([first, second])[None], first.size
    segments = mx.array([[1] * first.size + [2] * second.size])

    logits = model(second[None])[:, :-1]
    packed = model(together, cache=packed_cache(model, segments))[:, begin:-1]
    joined = model(together)[:, begin:-1]
    alone = token_losses(logits, second[None, 1:])
    off, leak = ((token_losses(other, second[None, 1:]) - alone).abs().mean().item() for other in (packed, joined))
    if off > max(1e-3, leak * (0.1 if logits.dtype == mx.float32 else 0.5)):
        raise ConfigError(
            f"pack: the loss of a packed row differs from its loss as a single row by {off:.1e} (by {leak:.1e} if it "
            "attends to the row before it).",
            HINT,
        )
