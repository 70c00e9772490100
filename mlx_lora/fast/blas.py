"""Quantized base layers on a CPU: float32 products of the dequantized weights.

MLX's quantized matmul runs at 0.1 to 6 GFLOP/s on a CPU; a float32 product through a real BLAS runs at 350 (4 cores).
The numbers are those of the quantized weights. A layer's float32 copy is made on first use and kept until one of the
layer's arrays is set. On a GPU nothing of this happens.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import dense_weight, is_quantized, kind
from ..device import is_cpu
from .swap import Changes, evaluated, keep, kept


def mixin_for(module: nn.Module) -> type | None:
    """The class to put before the class of ``module``; None where nothing is to be gained."""
    if not is_cpu() or not is_quantized(module):
        return None
    return {"linear": BlasLinear, "embedding": BlasEmbedding, "switch": BlasSwitch}.get(kind(module))


class _Dense(Changes):
    def dense(self) -> mx.array:
        """The weight in float32."""
        weight = kept(self)
        if weight is None:
            weight = dense_weight(self)
            if evaluated(weight):
                keep(self, weight)
        return weight


class BlasLinear(_Dense):
    def project(self, x: mx.array) -> mx.array:
        """``x W^T`` without the bias. x: [..., in] -> [..., out]."""
        return (x.astype(mx.float32) @ self.dense().T).astype(x.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.project(x)
        return y + self["bias"] if "bias" in self else y


class BlasEmbedding(_Dense):
    def __call__(self, x: mx.array) -> mx.array:
        return self.dense()[x]

    def project(self, x: mx.array) -> mx.array:
        return (x.astype(mx.float32) @ self.dense().T).astype(x.dtype)

    as_linear = project


class BlasSwitch(_Dense):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        weight = self.dense().swapaxes(-1, -2)
        y = mx.gather_mm(x.astype(mx.float32), weight, rhs_indices=indices, sorted_indices=sorted_indices)
        y = y.astype(x.dtype)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y
