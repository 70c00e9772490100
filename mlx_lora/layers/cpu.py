"""Quantized base layers on a CPU: computed as float32 products of the dequantized weights.

MLX's quantized matmul runs at 0.1 to 6 GFLOP/s on a CPU, float32 through a real BLAS at 350 (4 cores); the numbers are
those of the quantized weights. The float32 copy of a layer is made on first use and kept. On a GPU nothing of this
happens. Stops at the base layers: adapters above them do not know.
"""

from __future__ import annotations

import functools

import mlx.core as mx
import mlx.nn as nn

from .base import dense_weight, derived, is_quantized, kind


def use_blas(model: nn.Module) -> None:
    """Let every quantized layer of ``model`` compute in float32. Parameters, names and types stay as they are."""
    for module in model.modules():
        if is_quantized(module) and (which := kind(module)):
            module.__class__ = _blas_class(type(module), which)


@functools.cache
def _blas_class(base: type[nn.Module], which: str) -> type[nn.Module]:
    """``base`` with another ``__call__``."""
    mixin = {"linear": _Linear, "embedding": _Embedding, "switch": _Switch}[which]
    return base if issubclass(base, mixin) else derived(_blas_class, base, which, before=(mixin,))


class _Dense:
    def dense(self) -> mx.array:
        kept = self.__dict__.get("_dense")
        if kept is None or kept[0] is not self["weight"]:
            kept = (self["weight"], dense_weight(self))
            try:
                mx.eval(kept[1])
            except ValueError:  # the weight is an argument of a function being traced: nothing to keep
                return kept[1]
            # Outside the module's dictionary: not a parameter, not saved.
            object.__setattr__(self, "_dense", kept)
        return kept[1]


class _Linear(_Dense):
    def project(self, x: mx.array) -> mx.array:
        return (x.astype(mx.float32) @ self.dense().T).astype(x.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.project(x)
        return y + self["bias"] if "bias" in self else y


class _Embedding(_Dense):
    def __call__(self, x: mx.array) -> mx.array:
        return self.dense()[x]

    def project(self, x: mx.array) -> mx.array:
        return (x.astype(mx.float32) @ self.dense().T).astype(x.dtype)

    as_linear = project


class _Switch(_Dense):
    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        weight = self.dense().swapaxes(-1, -2)
        y = mx.gather_mm(x.astype(mx.float32), weight, rhs_indices=indices, sorted_indices=sorted_indices)
        y = y.astype(x.dtype)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y
