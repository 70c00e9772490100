"""Rows side by side in one sequence (packing), each of which attends to itself alone.

mlx-lm's models ask their cache for the attention mask, for the keys and values and for the offset of the positions. The
cache here keeps nothing: it returns a block-diagonal causal mask and the new keys and values. That is right for models
whose only link between tokens is attention with relative positions. `FAMILIES` are those for which a test showed the
same loss and gradients as for each row alone; `check_model` refuses the others, and `check_rows` measures on the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import ConfigError

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
_HINT = "Leave --pack out (in Python pack=False): without it rows are padded, and the loss of each is the same."


class PackedCache:
    """The cache of a layer of a packed batch. segments: [B, N] integers, equal for the tokens of one row."""

    offset = 0  # rotary embeddings are relative, so that the positions need not begin again in each row

    def __init__(self, segments: mx.array):
        self._segments = segments

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **_: Any) -> mx.array:
        """The tokens to attend to [B, 1, N, N]: the row's own up to this one, within the window."""
        here, other = mx.arange(N)[:, None], mx.arange(N)[None]
        seen = here >= other if window_size is None else (here >= other) & (here < other + window_size)
        return (self._segments[:, None, :, None] == self._segments[:, None, None, :]) & seen

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values


def packed_cache(model: nn.Module, segments: mx.array) -> list[Any]:
    """The argument `cache` of a model of `FAMILIES` for rows packed by `segments` [B, N].

    Raises: ConfigError: the model keeps something else than keys and values from token to token.
    """
    packed = PackedCache(segments)

    def like(entry: Any) -> Any:
        kind = type(entry).__name__
        if kind == "CacheList":
            return tuple(like(inner) for inner in entry.caches)
        if kind not in ("KVCache", "RotatingKVCache"):
            raise ConfigError(f"pack: layers of this model have state that crosses rows ({kind}).", _HINT)
        return packed

    if not hasattr(model, "make_cache"):  # then mlx-lm gives each layer a KVCache
        return [packed] * len(model.layers)
    return [like(entry) for entry in model.make_cache()]


def check_model(model: nn.Module, width: int) -> None:
    """Refuse models that are not known to compute each packed row as alone. Needs no weights. Raises: ConfigError.

    Args:
        width: tokens in a packed sequence.
    """
    module, _, family = type(model).__module__.rpartition(".")
    if module != "mlx_lm.models" or family not in FAMILIES:
        raise ConfigError(
            f"pack: {family if module == 'mlx_lm.models' else type(model).__name__} is not known to compute packed "
            "rows as it computes each alone. (What does not: state that passes from token to token, as in Mamba, "
            "convolutions and linear attention; absolute positions.)",
            _HINT,
        )
    packed_cache(model, mx.zeros((1, 1), mx.int32))
    for what, limit in _limits(model):
        if width > limit:
            raise ConfigError(
                f"pack: {what} beyond {limit} tokens, and a packed sequence has {width}.",
                f"Set --max-seq-length to {limit} at most, or leave --pack out.",
            )


def _limits(model: nn.Module) -> Iterator[tuple[str, int]]:
    """What depends on more than the distance of two tokens, and the length up to which it does not."""
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
    """Compare the loss of the second of two rows packed with that of the row alone. Raises: ConfigError.

    The model is in evaluation mode. The difference must be much smaller than the one that attending to the first row
    makes: a hundredth in float32, and half of it in half precision, whose rounding is of this order.
    """
    from .losses.cross_entropy import token_losses

    first, second = (mx.array(np.asarray(row.tokens[:most], np.int32)) for row in rows)
    together, begin = mx.concatenate([first, second])[None], first.size
    segments = mx.array([[1] * first.size + [2] * second.size])

    logits = model(second[None])[:, :-1]
    packed = model(together, cache=packed_cache(model, segments))[:, begin:-1]
    joined = model(together)[:, begin:-1]
    alone = token_losses(logits, second[None, 1:])
    off, leak = ((token_losses(other, second[None, 1:]) - alone).abs().mean().item() for other in (packed, joined))
    if off > max(1e-4, leak * (0.01 if logits.dtype == mx.float32 else 0.5)):
        raise ConfigError(
            f"pack: the loss of a packed row differs from that of the row alone by {off:.1e} (by {leak:.1e} if it "
            "attends to the row before it).",
            _HINT,
        )
