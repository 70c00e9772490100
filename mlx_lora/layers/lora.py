"""LoRA: low-rank adaptation (arXiv:2106.09685), over linear, embedding and switch layers.

rsLoRA (arXiv:2312.03732) is the same layer with another ``scale``; see ``AdapterConfig``.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from ..config import LEAVES
from .base import AdapterLayer, dims, uniform
from .siblings import add_update, fused, product


class LoRALinear(AdapterLayer):
    r"""y = W x + b + scale * (x A) B, with B = 0 at the start.

    ``lora_a``: [in, r], U(-1/sqrt(in), 1/sqrt(in)); ``lora_b``: [r, out]. Three launches: base, ``x A``, ``addmm``; two
    when decoding on Metal, the first of which siblings share.
    """

    method = "lora"
    leaves = LEAVES["lora"]
    siblings = None  # see siblings.py

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0, dtype=mx.float32):
        super().__init__(base, rank, scale, dropout, dtype)
        rows, columns = dims(base)
        self.lora_a = uniform(1 / math.sqrt(rows), (rows, rank), self._dtype)
        self.lora_b = mx.zeros((rank, columns), self._dtype)

    def __call__(self, x: mx.array) -> mx.array:
        y = fused(self, x)
        return y if y is not None else add_update(self, self.linear(x), product(self, x, self.dropout(x)))

    def merged_weight(self, weight: mx.array) -> mx.array:
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        return mx.addmm(weight, b.T, a.T, alpha=self.scale)


class LoRAEmbedding(LoRALinear):
    """y = W[x] + scale * A[x] B, and as a tied output head y = x W^T + scale * (x B^T) A^T, as in mlx-lm.

    ``lora_a``: [vocabulary, r]; ``lora_b``: [r, dim]. On a model with tied embeddings the update acts on both sides.
    """

    slot = "embedding"

    def __call__(self, x: mx.array) -> mx.array:
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
    """One update for each expert: y = W_e x + scale * B_e (A_e x), e the expert a token was routed to.

    ``lora_a``: [experts, r, in]; ``lora_b``: [experts, out, r] (mlx-lm's layout).
    """

    method = "lora"
    leaves = LEAVES["lora"]

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0, dtype=mx.float32):
        super().__init__(base, rank, scale, dropout, dtype)
        columns, rows = dims(base)
        experts = base.num_experts
        self.lora_a = uniform(1 / math.sqrt(columns), (experts, rank, columns), self._dtype)
        self.lora_b = mx.zeros((experts, rows, rank), self._dtype)

    def low_rank(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """B_e (A_e x) without the scale. x: [..., 1, in], indices: [...] -> [..., 1, out]."""
        gather = {"rhs_indices": indices, "sorted_indices": sorted_indices}
        u = mx.gather_mm(x, self.lora_a.swapaxes(-1, -2), **gather)
        return mx.gather_mm(u, self.lora_b.swapaxes(-1, -2), **gather)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        return y + self.scale * self.low_rank(self.dropout(x), indices, sorted_indices)

    def merged_weight(self, weight: mx.array) -> mx.array:
        return weight + self.scale * (self.lora_b.astype(mx.float32) @ self.lora_a.astype(mx.float32))
