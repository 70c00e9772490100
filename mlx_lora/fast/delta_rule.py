"""The gated delta rule in chunks of tokens, so that it can be trained (arXiv:2412.06464, arXiv:2406.06484).

mlx-lm trains it by a Python loop over the tokens, and autograd keeps a state [Dv, Dk] of every head for every token.
Here a chunk of ``CHUNK`` tokens takes a few matrix products; a triangular system gives the values that its tokens
write. A segment of ``SEGMENT`` tokens keeps only its inputs and its first state, and is computed again in the backward
pass.

Two choices keep float32 accurate for any gates:

* A decay is only ever a product of gates. There are no logarithms, no divisions and no cumulative sums whose difference
  is taken: these lose digits next to a strong gate, and gates that are zero have no logarithm. A product over
  the tokens between two positions is put together from the products over blocks of 1, 2, 4, ... tokens.
* The triangular matrix is inverted by blocks of 1, 2, 4, ... rows, as forward substitution does. The product
  (I - L)(I + L^2)(I + L^4)... has fewer steps, but its powers grow like binomial coefficients if keys repeat.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from ..kernels import with_backward

CHUNK, SEGMENT = 64, 512  # tokens


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """What ``mlx_lm.models.gated_delta.gated_delta_ops`` computes, in float32 inside.

    Semantics, for every head::

        for t in range(T):
            decayed = state * g[t]
            new = decayed + outer(beta[t] * (v[t] - decayed @ k[t]), k[t])
            y[t] = new @ q[t]
            state = new if mask[t] else state

    Args:
        q, k: [B, T, Hk, Dk]; each head serves Hv / Hk consecutive heads of v.
        v: [B, T, Hv, Dv].
        g: [B, T, Hv], or [B, T, Hv, Dk] with a gate for each channel; from 0 to 1.
        beta: [B, T, Hv].
        state: [B, Hv, Dv, Dk]; zeros by default.
        mask: [B, T]; False leaves the state unchanged.

    Returns: y [B, T, Hv, Dv] in the dtype of q, and the last state, in float32 (float64 if q is float64).
    """
    (batch, length, key_heads, key_dim), (heads, value_dim) = k.shape, v.shape[2:]
    dtype = mx.float64 if q.dtype == mx.float64 else mx.float32
    state = mx.zeros((batch, heads, value_dim, key_dim), dtype) if state is None else state.astype(dtype)
    state = state.reshape(batch, key_heads, -1, value_dim, key_dim)
    arrays = [q, k, v, g if g.ndim == 4 else g[..., None], beta[..., None]]
    if mask is not None:
        arrays.append(mask[..., None, None].astype(dtype))
    # The gradient of `split` is one concatenation. That of slices would be an array of the whole length for each slice.
    segments = zip(*(mx.split(x, range(SEGMENT, length, SEGMENT), axis=1) for x in arrays), strict=True)
    ys = []
    for segment in segments:
        y, state = _segment(state, *segment)
        ys.append(y)
    return mx.concatenate(ys, axis=1), state.reshape(batch, heads, value_dim, key_dim)


def _compute_segment(
    state: mx.array, q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, *masks: mx.array
) -> tuple[mx.array, mx.array]:
    """state: [B, Hk, Hv/Hk, Dv, Dk]; the others as in ``gated_delta``, with four dimensions; ``masks``: one or none."""
    (batch, length, key_heads, _), dtype = k.shape, q.dtype
    size = min(CHUNK, 1 << max(length - 1, 1).bit_length())
    padding = -length % size

    def chunks(x: mx.array, fill: float = 0) -> mx.array:
        """x: [B, L, H, D] -> [B, Hk, H/Hk, chunks, size, D]; a mask's H is 1."""
        x = mx.pad(x.astype(state.dtype), [(0, 0), (0, padding), (0, 0), (0, 0)], constant_values=fill)
        x = x.reshape(batch, -1, size, min(key_heads, x.shape[2]), max(x.shape[2] // key_heads, 1), x.shape[3])
        return x.transpose(0, 3, 4, 1, 2, 5)

    # Only beta and g of a padded token matter: with zero and one it leaves the state as it is.
    q, k, v, g, beta = chunks(q), chunks(k), chunks(v), chunks(g, 1), chunks(beta)
    own, (q_read, k_read, k_written) = (q * k).sum(-1, keepdims=True), (q, k, k)
    for mask in masks:  # a masked token reads the state with its own gate, and the others do not see it
        mask = chunks(mask, 1) > 0
        gate, g = mx.where(mask, 1, g), mx.where(mask, g, 1)
        q_read, k_read, k_written = q * gate, k * gate, mx.where(mask, k, 0)

    decay_to, decay_from, decay, between = _decays(g, [q_read, k_read], k_written)
    q_weights = between[0] + own * mx.eye(size, dtype=state.dtype)
    solved = _inverse(beta * between[1]) * beta.swapaxes(-1, -2)
    reads = mx.concatenate([mx.broadcast_to(x * decay_to, (*v.shape[:-1], x.shape[-1])) for x in (k_read, q_read)], -2)
    ys = []
    steps = (v, q_weights, solved, reads, k_written * decay_from, decay)
    for v, q_weights, solved, reads, k_written, decay in zip(*map(_split_chunks, steps), strict=True):
        k_read, q_read = mx.split(reads @ state.swapaxes(-1, -2), 2, axis=-2)
        written = solved @ (v - k_read)
        ys.append(q_read + q_weights @ written)
        state = state * decay + written.swapaxes(-1, -2) @ k_written
    y = mx.stack(ys, axis=1).transpose(0, 1, 4, 2, 3, 5)  # [B, chunks, size, Hk, Hv/Hk, Dv]
    return y.reshape(batch, -1, y.shape[3] * y.shape[4], y.shape[5])[:, :length].astype(dtype), state


def _split_chunks(x: mx.array) -> list[mx.array]:
    return [part.squeeze(3) for part in mx.split(x, x.shape[3], axis=3)]


def _backward(primals, cotangents, _):
    # Waiting for the gradients prevents `mx.compile` from reusing, and so storing, results of the forward pass.
    return tuple(mx.vjp(_compute_segment, mx.depends(list(primals), list(cotangents)), list(cotangents))[1])


_segment = with_backward(_compute_segment, _backward)


def _decays(
    g: mx.array, rows: list[mx.array], columns: mx.array
) -> tuple[mx.array, mx.array, mx.array, list[mx.array]]:
    """Products of gates within a chunk, and the products of rows with columns that decay by them.

    Args:
        g: [..., size, 1] or [..., size, Dk].
        rows, columns: [..., size, Dk].

    Returns: for each token the product of the gates up to it and of those after it, both [..., size, D]; the product of
        all gates, [..., 1, D]; and for each of ``rows`` the matrix [..., size, size] with
        ``sum(rows[i] * columns[j] * prod(g[j + 1 : i + 1]))`` at i, j for j < i, and zero elsewhere.
    """
    size, one_gate = g.shape[-2], g.shape[-1] < columns.shape[-1]
    pairs = [(mx.ones_like(g), mx.ones_like(g))] if one_gate else [(x, columns) for x in rows]
    between: list[mx.array] = [mx.zeros((size, size), g.dtype)] * len(pairs)
    # Within blocks of tokens: up to each token, after each token, and of the whole block.
    to, after, whole = g, mx.ones_like(g), g
    for block, mask in _levels(size):
        # From the first block of two into the second, so neither factor spans more than what is between i and j.
        between = [
            total + mx.where(mask, (x * to) @ (y * after).swapaxes(-1, -2), 0)
            for total, (x, y) in zip(between, pairs, strict=True)
        ]
        pairs_of_blocks = ((to, block), (after, block), (whole, 1))
        (to_1, to_2), (after_1, after_2), (whole_1, whole_2) = (
            mx.split(mx.unflatten(x, -2, (-1, 2, rows)), 2, axis=-3) for x, rows in pairs_of_blocks
        )
        to = mx.concatenate([to_1, to_2 * whole_1], axis=-3).flatten(-4, -2)
        after = mx.concatenate([after_1 * whole_2, after_2], axis=-3).flatten(-4, -2)
        whole = (whole_1 * whole_2).flatten(-4, -2)
    if one_gate:
        between = [between[0] * (x @ columns.swapaxes(-1, -2)) for x in rows]
    return to, after, whole, between


def _compute_inverse(lower: mx.array) -> mx.array:
    """The inverse of I + lower, for strictly lower triangular matrices [..., size, size]."""
    (_, pairs), *levels = _levels(lower.shape[-1])
    inverse = mx.eye(lower.shape[-1], dtype=lower.dtype) - mx.where(pairs, lower, 0)
    for _, mask in levels:  # [[A, 0], [X, B]] has the inverse [[A', 0], [-B' X A', B']]
        inverse = inverse - inverse @ mx.where(mask, lower, 0) @ inverse
    return inverse


def _inverse_backward(_, cotangent: mx.array, inverse: mx.array) -> mx.array:
    transposed = inverse.swapaxes(-1, -2)
    return mx.tril(-(transposed @ cotangent @ transposed), -1)


_inverse = with_backward(_compute_inverse, _inverse_backward)


def _levels(size: int) -> Iterator[tuple[int, mx.array]]:
    """(1, 2, 4, ... below size; where row i is in the second and column j in the first block of one pair of blocks)."""
    for block in (1 << n for n in range(size.bit_length() - 1)):
        index = mx.arange(size) // block
        yield block, (index[:, None] % 2 == 1) & (index[:, None] - 1 == index)
