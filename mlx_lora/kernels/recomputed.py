"""Cheap functions of which the backward pass keeps the inputs alone, and makes the rest again (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .low_rank import low_rank_products
from .registry import with_backward


def recomputed(f: Callable[..., mx.array], inputs: list[mx.array], a: list[mx.array]) -> tuple[mx.array, ...]:
    """A function and the products of its result with several matrices.

    Semantics::

        y = f(*inputs)
        return (y, *(y @ matrix for matrix in a))

    Args:
        f: elementwise or nearly so, and the same whenever it is called; it is called once more in the backward pass.
            What it uses beside ``inputs`` is a constant.
        inputs: arrays of any shapes that f takes; y: [..., K].
        a: [K, r_i] each; may be empty.
    """
    count = len(inputs)

    def forward(*arrays):
        y = f(*arrays[:count])
        return (y, *(low_rank_products(y, *arrays[count:]) if a else ()))

    def backward(primals, cotangents, _):
        primals = (primals,) if isinstance(primals, mx.array) else primals
        # Not before the gradients are there; and a compiler that saw the same inputs would keep the first y instead.
        # (`mx.checkpoint` waits for the results, which keeps them.)
        return tuple(mx.vjp(forward, mx.depends(list(primals), list(cotangents)), list(cotangents))[1])

    return with_backward(forward, backward)(*inputs, *a)
