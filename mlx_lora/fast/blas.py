"""Quantized base layers on a CPU: float32 products of the dequantized weights.

MLX's quantized matmul runs at 0.1 to 6 GFLOP/s on a CPU; a float32 product through a real BLAS runs at 350 (4 cores).
The results are those of the quantized weights. A layer's float32 copy is made on first use and kept until one of the
layer's arrays is set.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import base_dtype, dense_weight
from .dora import weight_arrays
from .swap import computed, plain_class


def knows(module: nn.Module) -> bool:
    """Whether a quantized layer is exactly MLX's or mlx-lm's class: a subclass may compute something else."""
    owner = next(c for c in plain_class(module).__mro__ if "__call__" in vars(c))
    return owner.__module__.startswith(("mlx.nn.layers.", "mlx_lm.models.switch_layers", "mlx_lora."))


class _Dense:
    def dense(self) -> mx.array:
        """The weight in float32."""
        return computed(self, "dense", weight_arrays(self), lambda: dense_weight(self))


class BlasLinear(_Dense):
    def project(self, x: mx.array) -> mx.array:
        """``x W^T`` without the bias. x: [..., in] -> [..., out]."""
        return (x.astype(mx.float32) @ self.dense().T).astype(x.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.project(x)
        return y + self["bias"] if "bias" in self else y


class BlasEmbedding(_Dense):
    def __call__(self, x: mx.array) -> mx.array:
        return self.dense()[x].astype(base_dtype(self) or mx.bfloat16)  # MLX's own for mxfp4 and the like

    def project(self, x: mx.array) -> mx.array:
        return (x.astype(mx.float32) @ self.dense().T).astype(x.dtype)

    as_linear = project


class BlasSwitch(_Dense):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        weight = self.dense().swapaxes(-1, -2)
        y = mx.gather_mm(x.astype(mx.float32), weight, rhs_indices=indices, sorted_indices=sorted_indices)
        y = y.astype(x.dtype)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


BY_KIND = {"linear": BlasLinear, "embedding": BlasEmbedding, "switch": BlasSwitch}
