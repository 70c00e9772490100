"""(IA)^3: one trained vector per layer that scales its input or output (arXiv:2205.05638).

Attention's layers scale their outputs, y = l * (W x + b), and the last layer of a feed-forward block its inputs,
y = W (l * x) + b. There is no rank and no multiplier.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import base_dtype, dims
from ..config import LEAVES
from .base import AdapterLayer


class IA3Linear(AdapterLayer):
    """``ia3_l``: [out, 1], or [1, in] with ``feedforward``, which are PEFT's shapes; 1 at the start.

    Args:
        feedforward: scale the inputs instead of the outputs.
    """

    method = "ia3"
    leaves = LEAVES["ia3"]

    def __init__(
        self,
        base: nn.Module,
        rank: int = 1,
        scale: float = 1.0,
        dropout: float = 0.0,
        dtype: mx.Dtype = mx.float32,
        *,
        key: mx.array | None = None,
        feedforward: bool = False,
    ):
        super().__init__(base, rank, scale, dropout)
        columns, rows = dims(base)
        self.ia3_l = mx.ones((1, columns) if feedforward else (rows, 1), base_dtype(base) or dtype)

    @property
    def feedforward(self) -> bool:
        return self.ia3_l.shape[0] == 1

    def __call__(self, x: mx.array) -> mx.array:
        """x: [..., in] -> [..., out]."""
        vector = self.ia3_l.reshape(-1)
        return self.linear(x * vector) if self.feedforward else self.linear(x) * vector

    def merged_weight(self, weight: mx.array) -> mx.array:
        return weight * self.ia3_l.astype(mx.float32)

    def merged_bias(self) -> mx.array | None:
        bias = super().merged_bias()
        if bias is None or self.feedforward:
            return bias
        return bias.astype(mx.float32) * self.ia3_l.reshape(-1).astype(mx.float32)
