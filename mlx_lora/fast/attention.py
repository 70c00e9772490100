"""Train mlx-lm's attention layers in blocks of queries, if the mask empties enough blocks to make up for the cost.

Such a layer calls mlx-lm's ``scaled_dot_product_attention``, or MLX's function of this name. Here its code runs as
mlx-lm wrote it, with this name (or ``mx``) replaced, so that the call reaches ``block_attention.attention``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn

from ..device import is_cpu
from .block_attention import attention, blocks_of, share_seen
from .global_names import with_global
from .latent_attention import Scores, rewritten, where
from .shared_input import SharesInput
from .swap import plain_class

_NAME, _BASE = "scaled_dot_product_attention", "mlx_lm.models.base"
_METHODS = ("__call__", "attention")  # that read the name; the second in iquestloopcoder
# (the fewest queries that are split, queries in a block). Measured on a CPU: below 640 queries, blocks take longer than
# plain attention. On a GPU each block adds about 25 launches, so these numbers are larger; they are estimates.
_ON_CPU, _ON_GPU = (640, 128), (1024, 256)
# Weights are computed twice, so leaving out a quarter of the keys makes up for it.
_MOST_SEEN = 0.75


def sizes() -> tuple[int, int]:
    return _ON_CPU if is_cpu() else _ON_GPU


def _in_blocks(queries, keys, values, *, scale, mask=None, sinks=None, causal=False, **more) -> mx.array:
    """MLX's function, in blocks if that saves enough. ``causal``: whether an array mask is known to be causal."""
    shortest, size = sizes()
    # A mask of numbers may have a gradient, which is as large as the weights.
    numbers = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    usual = mask is not None and not numbers and not more and queries.ndim == 4
    if usual and shortest <= queries.shape[2] <= keys.shape[2] and not _keeps_no_weights(queries, values):
        blocks = blocks_of(queries.shape[2], keys.shape[2], mask, size, causal)
        if share_seen(blocks, keys.shape[2]) <= _MOST_SEEN:
            return attention(queries, keys, values, scale, mask, sinks, blocks)
    return mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=scale, mask=mask, **({} if sinks is None else {"sinks": sinks}), **more
    )


def _keeps_no_weights(queries: mx.array, values: mx.array) -> bool:
    """Whether MLX itself has a backward pass without the weights: cuDNN's, under the conditions of MLX 0.32."""
    if is_cpu() or mx.metal.is_available() or queries.dtype not in (mx.float16, mx.bfloat16):
        return False
    return queries.shape[2] % 128 == 0 and all(x.shape[3] % 8 == 0 and x.shape[3] <= 128 for x in (queries, values))


def _of_mlx_lm(queries, keys, values, cache, scale, mask, sinks=None) -> mx.array:
    """mlx-lm's function, in blocks if that saves enough."""
    if hasattr(cache, "bits"):
        plain = getattr(sys.modules[_BASE], _NAME)
        return plain(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    if isinstance(mask, Scores):
        queries, keys = mask.joined(queries, keys, scale)
        mask = mask.mask
    causal = getattr(cache, "causal", False)
    return _in_blocks(queries, keys, values, scale=scale, mask=mask, sinks=sinks, causal=causal)


def _scores(q: mx.array, scale: float, k: mx.array) -> Scores | mx.array:
    """The product that a latent attention passes as a mask; not computed if there are many queries."""
    return Scores(q, scale, k) if q.shape[2] >= sizes()[0] else (q * scale) @ k.swapaxes(-1, -2)


@functools.cache
def _mlx() -> SimpleNamespace:
    """``mlx.core`` with attention in blocks."""
    return SimpleNamespace(
        **{**vars(mx), "where": where, "fast": SimpleNamespace(**{**vars(mx.fast), _NAME: _in_blocks})}
    )


def _replaced(method: Callable) -> Callable | None:
    """The method with attention in blocks; None if it calls another function of this name, or none."""
    if not inspect.isfunction(method) or _NAME not in method.__code__.co_names:
        return None
    if _NAME not in method.__globals__:
        return with_global(method, "mx", _mlx()) if method.__globals__.get("mx") is mx else None
    base = getattr(sys.modules.get(_BASE), _NAME, None)
    if method.__globals__[_NAME] is not base or not inspect.isfunction(base):
        return None
    same = list(inspect.signature(base).parameters) == list(inspect.signature(_of_mlx_lm).parameters)
    if not same:
        return None
    latent = rewritten(method, _NAME)
    if latent is not None:
        method = with_global(with_global(latent, "mx", _mlx()), "_scores", _scores)
    return with_global(method, _NAME, _of_mlx_lm)


@functools.cache
def has_attention(kind: type) -> bool:
    """Whether a method of this class calls a function named as MLX's attention."""
    methods = [method for owner in kind.__mro__ for method in vars(owner).values() if inspect.isfunction(method)]
    return any(_NAME in method.__code__.co_names for method in methods)


def obstacle(module: nn.Module) -> str | None:
    """Why a module with attention cannot train in blocks; None if it can."""
    kind = plain_class(module)
    if any(_replaced(getattr(kind, name, None)) for name in _METHODS):
        return None
    return f"{kind.__module__}.{kind.__name__} does not call the attention of {_BASE} or MLX in {' or '.join(_METHODS)}"


def _training_in_blocks(name: str) -> Callable:
    def method(self, *args, **kwargs):
        plain = getattr(plain_class(self), name)
        return ((self._training and _replaced(plain)) or plain)(self, *args, **kwargs)

    return method


class _InBlocks:
    __call__, attention = map(_training_in_blocks, _METHODS)


class BlockedAttention(SharesInput, _InBlocks):
    """Mixin for a module with attention."""
