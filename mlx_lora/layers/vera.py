"""VeRA: shared frozen random projections, two trained vectors per module (arXiv:2310.11454).

y = W x + b + lambda_b * (B (lambda_d * (A x))), with A [r, in] and B [out, r] cut from one pair for the whole model.
There is no multiplier.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import base_dtype, dims
from ..base.vera import draw_projections, pair_as_lora
from ..config import LEAVES
from .base import AdapterLayer


class Projections(nn.Module):
    """VeRA's shared pair: ``vera_a`` [r, columns] and ``vera_b`` [rows, r], frozen. One object serves a whole model."""

    def __init__(self, a: mx.array, b: mx.array):
        super().__init__()
        self.vera_a, self.vera_b = a, b
        self.freeze()

    def unfreeze(self, *args, **kwargs):
        return self  # always frozen, like the weights of MLX's quantized layers


class _VeRA(AdapterLayer):
    """Shared by linear and switch layers: the projections and the trained vectors.

    Args:
        shared: the model's projections; by default drawn for this layer alone.
        d_initial: the initial value of ``vera_lambda_d``.
    """

    method = "vera"
    leaves = LEAVES["vera"]

    def __init__(
        self, base, rank, scale=1.0, dropout=0.0, dtype=mx.float32, *, key=None, shared=None, d_initial=0.1
    ):  # fmt: skip
        super().__init__(base, rank, scale, dropout)
        columns, rows = dims(base)
        dtype = base_dtype(base) or dtype
        if shared is None:
            shared = Projections(*(array.astype(dtype) for array in draw_projections(rank, columns, rows)))
        self.shared = shared
        experts = (base.num_experts,) if base.weight.ndim == 3 else ()
        self.vera_lambda_d = mx.full((*experts, rank), d_initial, dtype)
        self.vera_lambda_b = mx.zeros((*experts, rows), dtype)

    def projections(self) -> tuple[mx.array, mx.array]:
        """This layer's part of the shared pair: A [r, in], B [out, r]."""
        columns, rows = dims(self.base)
        return self.shared.vera_a[:, :columns], self.shared.vera_b[:rows]

    def merged_weight(self, weight: mx.array) -> mx.array:
        pair = self.shared.vera_a, self.shared.vera_b
        a, b = pair_as_lora(self.vera_lambda_d, self.vera_lambda_b, *pair, dims(self.base)[0])
        return weight + (b @ a if a.ndim == 3 else b.T @ a.T)


class VeRALinear(_VeRA):
    """``vera_lambda_d``: [r], ``d_initial`` at the start; ``vera_lambda_b``: [out], 0 at the start."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: [..., in] -> [..., out]."""
        a, b = self.projections()
        update = (self.vera_lambda_d * (self.dropout(x) @ a.T)) @ b.T
        return self.linear(x) + self.vera_lambda_b * update


class VeRASwitchLinear(_VeRA):
    """Vectors for each expert over one pair: ``vera_lambda_d`` [experts, r], ``vera_lambda_b`` [experts, out]."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x: [..., 1, in], indices: [..., k] -> [..., k, 1, out]; or mlx-lm's sorted form."""
        a, b = self.projections()
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        d, scale = (mx.expand_dims(v[indices], -2) for v in (self.vera_lambda_d, self.vera_lambda_b))
        return y + scale * ((d * (self.dropout(x) @ a.T)) @ b.T)
