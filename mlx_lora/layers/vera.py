"""VeRA: shared frozen random projections, two trained vectors a module (arXiv:2310.11454).

y = W x + b + lambda_b * (B (lambda_d * (A x))), with A [r, in] and B [out, r] cut from one pair for the whole model.
The pair is Kaiming uniform noise that PEFT draws on the CPU by torch's generator; ``draw_projections`` gives the same
bits without torch, so that an adapter that stores no projections means the same on both sides. There is no multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import LEAVES
from .base import AdapterLayer, dims

_BLOCK = 1 << 22  # numbers drawn at once


def draw_projections(rank: int, columns: int, rows: int, key: int = 0) -> tuple[mx.array, mx.array]:
    """PEFT's shared projections, bit for bit: A [rank, columns] and B [rows, rank], float32.

    Args:
        columns, rows: the largest input and output of the adapted modules.
        key: ``projection_prng_key``; torch seeds its generator with the lower 32 bits.
    """
    generator = np.random.RandomState(key & 0xFFFFFFFF)
    return _kaiming(generator, (rank, columns)), _kaiming(generator, (rows, rank))


def _kaiming(generator: np.random.RandomState, shape: tuple[int, int]) -> mx.array:
    """U(-bound, bound), bound = sqrt(6 / shape[1]): torch takes 24 bits of each draw and rounds once."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    low, high = np.float32(-bound), np.float32(bound)
    span, low = np.float64(high - low), np.float64(low)
    flat = np.empty(math.prod(shape), np.float32)
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK]
        bits = generator.randint(0, 2**32, size=part.size, dtype=np.uint32) & np.uint32((1 << 24) - 1)
        part[:] = bits * 2.0**-24 * span + low  # float64: the product is exact, so this is the fused multiply-add
    return mx.array(flat.reshape(shape))


def shared_dims(bases: Iterable[nn.Module]) -> tuple[int, int]:
    """(columns, rows) of the projections for these base layers: the largest of each."""
    sizes = [dims(base) for base in bases]
    return max(i for i, _ in sizes), max(o for _, o in sizes)


class _Shared:
    """What the two kinds of base have in common: the projections, and the vectors of trained numbers.

    Args:
        shared: (A [r, at least in], B [at least out, r]) of the whole model; drawn for this layer alone by default.
        d_initial: what ``vera_lambda_d`` starts from.
    """

    method = "vera"
    leaves = LEAVES["vera"]

    def __init__(self, base, rank, scale=1.0, dropout=0.0, dtype=mx.float32, *, shared=None, d_initial=0.1):
        super().__init__(base, rank, scale, dropout, dtype)
        columns, rows = dims(base)
        pair = tuple(array.astype(self._dtype) for array in shared or draw_projections(rank, columns, rows))
        mx.eval(pair)
        # Outside the module's dictionary: shared with other layers, and no parameters.
        object.__setattr__(self, "_shared", pair)
        many = (base.num_experts,) if self.base.weight.ndim == 3 else ()
        self.vera_lambda_d = mx.full((*many, rank), d_initial, self._dtype)
        self.vera_lambda_b = mx.zeros((*many, rows), self._dtype)

    def projections(self) -> tuple[mx.array, mx.array]:
        """This layer's part of the shared pair: A [r, in], B [out, r]."""
        columns, rows = dims(self.base)
        a, b = self._shared
        return a[:, :columns], b[:rows]

    def lora_pair(self) -> tuple[mx.array, mx.array]:
        """(lambda_d A)^T and (lambda_b B)^T in float32: the same update as LoRA with scale 1, in LoRA's layout."""
        a, b = (array.astype(mx.float32) for array in self.projections())
        a = self.vera_lambda_d.astype(mx.float32)[..., None] * a
        b = self.vera_lambda_b.astype(mx.float32)[..., None] * b
        return (a, b) if a.ndim == 3 else (a.T, b.T)

    def merged_weight(self, weight: mx.array) -> mx.array:
        a, b = self.lora_pair()
        return weight + (b @ a if a.ndim == 3 else b.T @ a.T)


class VeRALinear(_Shared, AdapterLayer):
    """``vera_lambda_d``: [r], at ``d_initial``; ``vera_lambda_b``: [out], at 0."""

    def __call__(self, x: mx.array) -> mx.array:
        a, b = self.projections()
        update = (self.vera_lambda_d * (self.dropout(x) @ a.T)) @ b.T
        return self.linear(x) + self.vera_lambda_b * update


class VeRASwitchLinear(_Shared, AdapterLayer):
    """Vectors for each expert over one pair: ``vera_lambda_d`` [experts, r], ``vera_lambda_b`` [experts, out]."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x: [..., 1, in], indices: [..., k] -> [..., k, 1, out]; or as gathered by mlx-lm, with sorted indices."""
        a, b = self.projections()
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        d, scale = (mx.expand_dims(v[indices], -2) for v in (self.vera_lambda_d, self.vera_lambda_b))
        return y + scale * ((d * (self.dropout(x) @ a.T)) @ b.T)
