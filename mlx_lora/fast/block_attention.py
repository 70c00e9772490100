"""Attention in blocks of queries, so that training memory grows with the length and not with its square.

MLX keeps the weights [B, H, L, S] of every attention layer for the backward pass; also on Metal, where training uses
plain operations. Here both passes compute the weights of one block of queries at a time, and only queries, keys,
values and the result are kept (arXiv:2205.14135). The weights are computed twice. Keys that no query of a block
sees are left out, which makes up for it: with a causal mask these are nearly half of the keys.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..kernels import with_backward
from .swap import evaluated


class Block(NamedTuple):
    """Some queries, and the keys that they see."""

    rows: slice
    keys: slice
    clear: int  # number of first keys that all of the queries see
    mask: mx.array | None  # for the other keys; None: a part of the mask that is an argument, if there is one


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    blocks: list[Block] | None = None,
) -> mx.array:
    """What ``mx.fast.scaled_dot_product_attention`` computes.

    Semantics, for every head::

        scores = where(mask, scale * q @ k.T, lowest)
        weights = softmax(concatenate([sink, scores]))[1:]  # with one sink for all queries, or none
        y = weights @ v

    Args:
        q: [B, H, L, D].
        k: [B, Hk, S, D]; v: [B, Hk, S, Dv]; each head serves H / Hk consecutive heads of q.
        mask: "causal", where the last query sees all keys and S >= L; or booleans that broadcast to [B, H, L, S].
        sinks: [H].
        blocks: by default those of ``blocks_of`` with 256 queries.

    Returns: [B, H, L, Dv].
    """
    heads = k.shape[1], q.shape[1] // k.shape[1]
    blocks = blocks or blocks_of(q.shape[2], k.shape[2], mask)
    masks = [_with_groups(mask, heads)] if isinstance(mask, mx.array) and blocks[0].mask is None else []
    q, k, v = (x.astype(mx.result_type(q, k, v)) for x in (q, k, v))
    sinks = [] if sinks is None else [sinks.astype(q.dtype).reshape(1, *heads, 1, 1)]
    y = _operation(blocks, scale, len(masks))(mx.unflatten(q, 1, heads), k, v, *masks, *sinks)
    return y.flatten(1, 2)


def _operation(blocks: list[Block], scale: float, masks: int):
    """The operation on q [B, Hk, H/Hk, L, D], k, v, ``masks`` masks (one or none) and sinks [1, Hk, H/Hk, 1, 1]."""

    def part(block: Block, after: list[mx.array], q, k, v, *rest) -> list[mx.array]:
        """The block's parts of the arguments, to be computed after other arrays."""
        # Waiting prevents the weights of two blocks from being in memory at once, and `mx.compile` from keeping those
        # of the forward pass for the backward pass.
        q, k, v, *rest = mx.depends([q, k, v, *rest], after) if after else [q, k, v, *rest]
        own = [_slice(m, -2, block.rows, -1, block.keys) for m in rest[:masks]] or [block.mask]
        return [q[..., block.rows, :] * scale, k[:, :, block.keys], v[:, :, block.keys], *own, *rest[masks:]]

    def weights(block: Block, q, k, mask, *sinks) -> list[mx.array]:
        """[B, Hk, H/Hk, rows, keys], and with sinks [B, Hk, H/Hk, rows, 1], theirs."""
        scores = _matmul(q, k.swapaxes(-1, -2))
        if mask is not None:
            masked = mx.where(mask, scores[..., block.clear :], mx.finfo(scores.dtype).min)
            scores = mx.concatenate([scores[..., : block.clear], masked], -1) if block.clear else masked
        of_sinks = [mx.broadcast_to(sink, (*scores.shape[:-1], 1)) for sink in sinks]
        both = mx.softmax(mx.concatenate([scores, *of_sinks], -1) if sinks else scores, -1, precise=True)
        return mx.split(both, [scores.shape[-1]], -1) if sinks else [both]

    def forward(*arrays):
        parts: list[mx.array] = []
        for block in blocks:
            q, k, v, *rest = part(block, parts[-1:], *arrays)
            parts.append(_matmul(weights(block, q, k, *rest)[0], v))
        return mx.concatenate(parts, axis=3)

    def backward(primals, cotangent, y):
        _, k, v, *rest = primals
        dtype = mx.float64 if k.dtype == mx.float64 else mx.float32
        of_q, of_k, of_v, *of_sinks = [], *(mx.zeros(x.shape, dtype) for x in (k, v, *rest[masks:]))
        after = [cotangent]
        for block in blocks:
            q, k, v, *rest = part(block, after, *primals)
            g, out = (x[..., block.rows, :] for x in (cotangent, y))
            p, *p_sinks = weights(block, q, k, *rest)
            of_v = of_v.at[:, :, block.keys].add(_transposed_matmul(p, g).astype(dtype))
            for mask in rest[:masks]:  # the scores of a query that sees no key are constants
                g = mx.where(mask.any(-1, keepdims=True), g, 0)
            mean = (g.astype(dtype) * out).sum(-1, keepdims=True)
            g_scores = (p * (_matmul(g, v.swapaxes(-1, -2)) - mean)).astype(p.dtype)
            of_q.append(scale * _matmul(g_scores, k))
            of_k = of_k.at[:, :, block.keys].add(_transposed_matmul(g_scores, q).astype(dtype))
            of_sinks = [x - (p * mean).sum((0, 3, 4), keepdims=True) for x, p in zip(of_sinks, p_sinks, strict=True)]
            after = [of_q[-1], of_k, of_v, *of_sinks]
        gradients = [mx.concatenate(of_q, axis=3), of_k, of_v, *map(mx.zeros_like, primals[3 : 3 + masks]), *of_sinks]
        return tuple(g.astype(x.dtype) for g, x in zip(gradients, primals, strict=True))

    return with_backward(forward, backward)


def _matmul(x: mx.array, y: mx.array) -> mx.array:
    """x: [B, Hk, groups, N, K]; y: [B, Hk, K, M]. Returns [B, Hk, groups, N, M]."""
    return mx.unflatten(x.flatten(2, 3) @ y, 2, x.shape[2:4])


def _transposed_matmul(x: mx.array, y: mx.array) -> mx.array:
    """x: [B, Hk, groups, N, K]; y: [B, Hk, groups, N, M]. Returns [B, Hk, K, M], the sum over the groups too."""
    return x.flatten(2, 3).swapaxes(-1, -2) @ y.flatten(2, 3)


def _slice(x: mx.array, *parts: int | slice) -> mx.array:
    """Slices of axes, given as axis, slice, axis, slice; an axis of 1, which is broadcast, stays."""
    for axis, part in zip(parts[::2], parts[1::2], strict=True):
        if x.shape[axis] > 1:
            x = x[..., part] if axis == -1 else x[..., part, :]
    return x


def _with_dims(mask: mx.array, count: int) -> mx.array:
    return mask.reshape(*[1] * (count - mask.ndim), *mask.shape)


def _with_groups(mask: mx.array, heads: tuple[int, int]) -> mx.array:
    """[B or 1, Hk or 1, H/Hk or 1, L or 1, S or 1]."""
    mask = _with_dims(mask, 4)
    return mask[:, :, None] if mask.shape[1] == 1 else mx.unflatten(mask, 1, heads)


def blocks_of(
    length: int, keys: int, mask: mx.array | str | None, size: int = 256, causal: bool = False
) -> list[Block]:
    """``size`` queries at a time, from what is known about the mask [..., L, S] while the graph is built.

    A mask that depends on the arguments of a function being traced is not known; ``causal``: whether each query is
    known to see its own key and none after it.
    """
    before, window, seen = keys - length, keys if isinstance(mask, str) else None, None
    if isinstance(mask, mx.array) and evaluated(mask):
        every = np.array(mask).reshape(-1, *_with_dims(mask, 2).shape[-2:])
        seen = np.broadcast_to(every.any(0), (length, keys))
        lone = np.broadcast_to(~every.any(-1).all(0), length)  # queries without any key, which average all values
        window = _window(seen) if mask.size == seen.size else None
    edges: dict[tuple[int, ...], mx.array] = {}
    blocks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        first, last, clear, edge = 0, keys, 0, None
        if window:
            first, last = max(before + start + 1 - window, 0), before + stop
            clear = before + start if window == keys else 0
            shape = stop - start, last - first - clear, before + start - first - clear
            if shape not in edges:
                edges[shape] = _band(mx, *shape, window)
            edge = edges[shape]
        elif seen is not None:
            if not lone[start:stop].any():
                found = np.flatnonzero(seen[start:stop].any(0))
                first, last = int(found[0]), int(found[-1]) + 1
        elif causal:
            last = before + stop
        blocks.append(Block(slice(start, stop), slice(first, last), clear, edge))
    return blocks


def share_seen(blocks: list[Block], keys: int) -> float:
    """The share of all weights that is computed."""
    computed = sum((b.rows.stop - b.rows.start) * (b.keys.stop - b.keys.start) for b in blocks)
    return computed / (blocks[-1].rows.stop * keys)


def _band(library, rows: int, keys: int, before: int, window: int):
    """Which of ``keys`` each of ``rows`` sees: up to its own, which is ``before`` keys further, within the window."""
    distance = library.arange(before, before + rows)[:, None] - library.arange(keys)
    return (distance >= 0) & (distance < window)


def _window(seen: np.ndarray) -> int | None:
    """How many keys up to its own each query sees at most; None if it sees other keys."""
    length, keys = seen.shape
    window = int(seen[-1].sum())
    found = window > 0 and keys >= length and np.array_equal(seen, _band(np, length, keys, keys - length, window))
    return window if found else None
