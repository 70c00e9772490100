"""LoftQ: an adapter that makes up for what quantizing loses (arXiv:2310.08659).

Alternately Q = quantize(W - scale B A) and the best scale B A of rank r for W - Q. Unlike PEFT's, the pair is divided
by the scale, so that Q + scale B A is near W for every scale. Q belongs to the pair: after one round it is the plain
quantization of W, after more it is another and must be kept.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .weights import largest

Pair = tuple[np.ndarray, np.ndarray]


def loftq_pair(
    weight: np.ndarray, quantized: Callable[[np.ndarray], np.ndarray], rank: int, scale: float, iterations: int = 1
) -> tuple[Pair, np.ndarray]:
    """((A [.., r, in], B [.., out, r]), the matrix that was quantized last).

    Args:
        weight: [.., out, in] float32.
        quantized: a matrix -> the numbers that are left of it when it is quantized.
    """
    target = weight
    for last in range(iterations, 0, -1):
        u, s, v = largest(weight - quantized(target), rank)
        root = np.sqrt(s / np.float32(abs(scale)))
        a, b = root[..., None] * v, u * root[..., None, :] * np.float32(np.sign(scale))
        if last > 1:
            target = weight - np.float32(scale) * (b @ a)
    return (a, b), target
