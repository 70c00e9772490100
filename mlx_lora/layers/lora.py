"""LoRA: low-rank adaptation (arXiv:2106.09685), over linear, embedding and switch layers.

rsLoRA (arXiv:2312.03732) is the same layer with another ``scale``; see ``AdapterConfig``.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import base_dtype, dims
from ..config import LEAVES
from .base import AdapterLayer, uniform


class LoRALinear(AdapterLayer):
    """y = W x + b + scale * (x A) B, with B = 0 at the start.

    ``lora_a``: [in, r], U(-1/sqrt(in), 1/sqrt(in)); ``lora_b``: [r, out].

    Args:
        dtype: of ``lora_a`` and ``lora_b`` if the base's storage does not determine it. The low-rank matrices compute
            in the base's dtype, so that the forward pass needs no casts.
        key: of the random start; MLX's global random state by default.
    """

    method = "lora"
    leaves = LEAVES["lora"]

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        dtype: mx.Dtype = mx.float32,
        *,
        key: mx.array | None = None,
    ):
        super().__init__(base, rank, scale, dropout)
        rows, columns = dims(base)
        dtype = base_dtype(base) or dtype
        self.lora_a = uniform(1 / math.sqrt(rows), (rows, rank), dtype, key)
        self.lora_b = mx.zeros((rank, columns), dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """x: [..., in] -> [..., out]."""
        return mx.addmm(self.linear(x), self.dropout(x) @ self.lora_a, self.lora_b, alpha=self.scale)

    def merged_weight(self, weight: mx.array) -> mx.array:
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        return mx.addmm(weight, b.T, a.T, alpha=self.scale)


class LoRAEmbedding(LoRALinear):
    """y = W[x] + scale * A[x] B, and, as a tied output head, y = x W^T + scale * (x B^T) A^T, as in mlx-lm.

    ``lora_a``: [vocabulary, r]; ``lora_b``: [r, dim]. On a model with tied embeddings the update acts on both sides.
    """

    slot = "embedding"

    def __call__(self, x: mx.array) -> mx.array:
        """x: [...] tokens -> [..., dim]."""
        update = self.dropout(self.lora_a[x] @ self.lora_b)
        return self.embedding(x) + self.scale * update

    def as_linear(self, x: mx.array) -> mx.array:
        """x: [..., dim] -> logits [..., vocabulary]."""
        y = self.embedding.as_linear(x)
        return mx.addmm(y, self.dropout(x) @ self.lora_b.T, self.lora_a.T, alpha=self.scale)

    def merged_weight(self, weight: mx.array) -> mx.array:
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        return mx.addmm(weight, a, b, alpha=self.scale)


class LoRASwitchLinear(AdapterLayer):
    """One update for each expert: y = W_e x + scale * B_e (A_e x), e being the expert a token was routed to.

    ``lora_a``: [experts, r, in]; ``lora_b``: [experts, out, r] (mlx-lm's layout).
    """

    method = "lora"
    leaves = LEAVES["lora"]

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        dtype: mx.Dtype = mx.float32,
        *,
        key: mx.array | None = None,
    ):
        super().__init__(base, rank, scale, dropout)
        columns, rows = dims(base)
        dtype = base_dtype(base) or dtype
        self.lora_a = uniform(1 / math.sqrt(columns), (base.num_experts, rank, columns), dtype, key)
        self.lora_b = mx.zeros((base.num_experts, rows, rank), dtype)

    def low_rank(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """B_e (A_e x) without the scale. x: [..., 1, in], indices: [...] -> [..., 1, out]."""
        gather = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        u = mx.gather_mm(x, self.lora_a.swapaxes(-1, -2), **gather)
        return mx.gather_mm(u, self.lora_b.swapaxes(-1, -2), **gather)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x: [..., 1, in], indices: [..., k] -> [..., k, 1, out]; or mlx-lm's sorted form."""
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        return y + self.scale * self.low_rank(self.dropout(x), indices, sorted_indices)

    def merged_weight(self, weight: mx.array) -> mx.array:
        return weight + self.scale * (self.lora_b.astype(mx.float32) @ self.lora_a.astype(mx.float32))
