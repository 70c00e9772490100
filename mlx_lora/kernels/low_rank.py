"""The low-rank path of whole sequences: plain products forward, backward passes that keep little. No Metal of its own.

What autograd would keep of ``scale * (x A) B`` in a trainer whose adapters are wider than the model is x once more in
their dtype; of a scaled ``addmm`` it multiplies the whole gradient of y by the scale. Here x stays as it is, shared by
all adapters that read it, and everything else that is kept or scaled has r columns.
"""

from __future__ import annotations

import functools

import mlx.core as mx

from .registry import with_backward


def low_rank_products(x: mx.array, *a: mx.array) -> tuple[mx.array, ...]:
    """The products of x with several matrices, x read once forward and once backward.

    Semantics::

        return tuple(x @ matrix for matrix in a)

    x: [..., K]; a: [K, r_i] each. Returns [..., r_i] each.
    """
    return _products(x, *a)


def _products_forward(x, *a):
    return _columns(x @ mx.concatenate(a, axis=-1), a)


def _products_backward(primals, cotangents, _):
    x, *a = primals
    rows = mx.concatenate(cotangents, axis=-1)
    dx = rows @ mx.concatenate(a, axis=-1).T
    da = x.reshape(-1, x.shape[-1]).T @ rows.reshape(-1, rows.shape[-1])
    # In the dtypes of what they are gradients of, as autograd's: adapters may be wider than the model.
    return (dx.astype(x.dtype), *(d.astype(m.dtype) for d, m in zip(_columns(da, a), a, strict=True)))


_products = with_backward(_products_forward, _products_backward)


def _columns(joined: mx.array, a: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
    ends, end = [], 0
    for matrix in a[:-1]:
        ends.append(end := end + matrix.shape[-1])
    return tuple(mx.split(joined, ends, axis=-1)) if ends else (joined,)


def low_rank_add(y: mx.array, u: mx.array, b: mx.array, scale: float) -> mx.array:
    """The base's output with the update.

    Semantics::

        return y + scale * (u @ b)

    y: [..., N], u: [..., r], b: [r, N].
    """
    return _add(float(scale))(y, u, b)


@functools.lru_cache(maxsize=1024)
def _add(scale: float):
    def add(y, u, b):
        return mx.addmm(y, u, b, alpha=scale)

    def backward(primals, dy, _):
        y, u, b = primals
        small = (scale * u).reshape(-1, u.shape[-1])
        du, db = scale * (dy @ b.T), small.T @ dy.reshape(-1, dy.shape[-1])
        return dy.astype(y.dtype), du.astype(u.dtype), db.astype(b.dtype)

    return with_backward(add, backward)
