"""Packing: several rows in one sequence, each attending only to itself.

mlx-lm's models ask their cache for the attention mask, for the keys and values and for the offset of the positions. The
cache here keeps nothing: it returns a block-diagonal causal mask and the new keys and values. That is right for models
whose only link between tokens is attention with relative positions; `packing_checks.py` refuses the others.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError

HINT = "Leave --pack out (in Python pack=False): rows are then padded, and each row's loss is the same."


class PackedCache:
    """The cache of a layer of a packed batch. segments: [B, N] integers, equal for the tokens of one row."""

    causal = True  # every mask is causal, so attention need not compute later tokens
    offset = 0  # rotary embeddings are relative, so positions need not restart in each row

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
    """The argument `cache` of a model for rows packed by `segments` [B, N].

    Raises: ConfigError: the model carries other state than keys and values from token to token.
    """
    packed = PackedCache(segments)

    def like(entry: Any) -> Any:
        kind = type(entry).__name__
        if kind == "CacheList":
            return tuple(like(inner) for inner in entry.caches)
        if kind not in ("KVCache", "RotatingKVCache"):
            raise ConfigError(f"pack: layers of this model have state that crosses rows ({kind}).", HINT)
        return packed

    if not hasattr(model, "make_cache"):  # then mlx-lm gives each layer a KVCache
        return [packed] * len(model.layers)
    return [like(entry) for entry in model.make_cache()]
