"""Cheap functions that keep only their inputs, so the backward pass computes the rest again (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .registry import with_backward


def recomputed(f: Callable[..., mx.array], inputs: list[mx.array], a: mx.array | None = None) -> tuple[mx.array, ...]:
    """A function and, with ``a``, the product of its result with a matrix.

    Semantics::

        y = f(*inputs)
        return (y,) if a is None else (y, y @ a)

    Args:
        f: elementwise or nearly so, and deterministic; the backward pass calls it once more. Other values that it uses
            are constants.
        inputs: arrays of any shapes that f takes; y: [..., K].
        a: [K, r].
    """
    count = len(inputs)

    def forward(*arrays):
        y = f(*arrays[:count])
        return (y, *(y @ matrix for matrix in arrays[count:]))

    def backward(primals, cotangents, _):
        primals = (primals,) if isinstance(primals, mx.array) else primals
        # Wait for the gradients, so that `mx.compile` does not reuse the first y, which would keep it in memory.
        # (`mx.checkpoint` waits for the results, which keeps them.)
        return tuple(mx.vjp(forward, mx.depends(list(primals), list(cotangents)), list(cotangents))[1])

    return with_backward(forward, backward)(*inputs, *([] if a is None else [a]))
