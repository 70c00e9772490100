"""Memory that a row's KV cache needs, and memory that is available."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..device import is_cpu
from ..errors import MLXLoRAError

_SHARE = 0.9  # of the memory that MLX or the system reports; the rest is for activations


class TooLongError(MLXLoRAError):
    """A row is too long for the model or the memory."""


def new_cache(model: nn.Module, max_kv_size: int | None = None) -> list:
    """Create an empty KV cache for one row.

    Args:
        max_kv_size: tokens that layers with plain attention keep at most; the first four are always among them.
            mlx-lm ignores this for model classes that create their own caches, which most do.
    """
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    caches = make_prompt_cache(model)
    if max_kv_size is None:
        return caches
    return [RotatingKVCache(max_size=max_kv_size, keep=4) if type(c) is KVCache else c for c in caches]


def can_always_trim(caches: list) -> bool:
    """Whether tokens can always be removed from the end. A sliding window has already overwritten earlier tokens."""
    return all(cache.is_trimmable() and not hasattr(cache, "max_size") for cache in _flat(caches))


class KeysAndValues:
    """Bytes of a KV cache by length, measured by running the model on one token.

    vocab_size: size of the model's logits.
    """

    def __init__(self, model: nn.Module):
        caches = new_cache(model)
        self.vocab_size: int = model(mx.array([[0]]), cache=caches).shape[-1]
        mx.eval([cache.state for cache in caches])
        self._fixed, self._growing = 0, []  # bytes; (bytes a token, most tokens or None)
        for cache in _flat(caches):
            step = getattr(cache, "step", None)
            if step is None:
                self._fixed += cache.nbytes
            else:
                self._growing.append((cache.nbytes / step, getattr(cache, "max_size", None)))

    def nbytes(self, tokens: int) -> int:
        """Bytes for one row of ``tokens`` tokens."""
        grown = sum(each * (min(tokens, most) if most else tokens) for each, most in self._growing)
        return self._fixed + int(grown)

    def of_batch(self, tokens: list[int]) -> int:
        """Bytes for a batch of rows with these lengths. Padding makes each row as large as the longest."""
        return len(tokens) * self.nbytes(max(tokens))

    def check(self, tokens: int, limit: int) -> None:
        """Raises: TooLongError: one row of ``tokens`` tokens needs more than ``limit`` bytes."""
        if (needed := self.nbytes(tokens)) > limit:
            sizes = f"{needed / 1e9:.2f} GB, and {limit / 1e9:.2f} GB are available"
            raise TooLongError(
                f"the keys and values of {tokens} tokens need {sizes}", "Shorten the prompt, or lower max_tokens."
            )


def _flat(caches: Any) -> list:
    return [part for cache in caches for part in (_flat(cache.caches) if hasattr(cache, "caches") else [cache])]


def free_memory() -> int:
    """Bytes available for KV caches: the free part of the GPU's working set, or of the system's memory."""
    if is_cpu():
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        total = mx.device_info()["max_recommended_working_set_size"]
    return max(0, int(_SHARE * total) - mx.get_active_memory())
