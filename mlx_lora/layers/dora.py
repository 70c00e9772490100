"""DoRA: a learned magnitude times the direction of the adapted weight (arXiv:2402.09353).

W' = m * (W + scale * BA) / ||W + scale * BA||, the norm taken over each output row and held constant in the backward
pass (section 4.3 of the paper). Its square is ||W||^2 + 2 scale <W, BA> + scale^2 ||BA||^2, so that W + scale * BA is
never written out: <W, BA> takes one product of W with the r columns of A, through the quantized weight if the base is
quantized.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import project, squared_row_norms
from ..config import LEAVES
from .lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear


class _Magnitude:
    """Shared by all kinds of bases: ``m``, the norms and the factor m / norm."""

    method = "dora"
    leaves = LEAVES["dora"]

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0, dtype=mx.float32, *, key=None):
        super().__init__(base, rank, scale, dropout, dtype, key=key)
        # float32 whatever the model's dtype, so that m / norm is exactly 1 at the start.
        self.m = mx.sqrt(squared_row_norms(base))

    def inner_products(self) -> tuple[mx.array, mx.array]:
        """<W, BA> and ||BA||^2 of every row, float32, without the scale."""
        raise NotImplementedError

    def base_norms_squared(self) -> mx.array:
        """||W||^2 of every row, float32."""
        return squared_row_norms(self.base)

    def norms_squared(self) -> mx.array:
        """||W + scale * BA||^2 of every row, float32."""
        cross, update = self.inner_products()
        return self.base_norms_squared() + 2 * self.scale * cross + self.scale**2 * update

    def gain(self) -> mx.array:
        """m / ||W + scale * BA||, float32, without a gradient through the norm. Shape of ``m``."""
        # Rounding must not take the norm of a nearly cancelled row below zero; a padded vocabulary has zero rows.
        norm = mx.stop_gradient(mx.sqrt(mx.maximum(self.norms_squared(), 0)))
        return mx.where(norm > 0, self.m / mx.where(norm > 0, norm, 1), 1)


class DoRALinear(_Magnitude, LoRALinear):
    """y = gain * (W x + scale * (x A) B) + b, ``m``: [out], ``gain = m / ||W + scale * BA||``.

    Dropout as in PEFT: with x~ the input after dropout, y = W x + (gain - 1) * W x~ + gain * scale * (x~ A) B + b.
    """

    def inner_products(self) -> tuple[mx.array, mx.array]:
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        cross = (project(self.linear, a.T) * b).sum(axis=0)
        return cross, (((a.T @ a) @ b) * b).sum(axis=0)

    def __call__(self, x: mx.array) -> mx.array:
        """x: [..., in] -> [..., out]."""
        gain = self.gain().astype(x.dtype)
        y, dropped = project(self.linear, x), self.dropout(x)
        base = y if dropped is x else project(self.linear, dropped)
        update = gain * mx.addmm(base, dropped @ self.lora_a, self.lora_b, alpha=self.scale)
        y = update if dropped is x else y - base + update
        return y + self.linear.bias if "bias" in self.linear else y

    def merged_weight(self, weight: mx.array) -> mx.array:
        return self.gain()[:, None] * super().merged_weight(weight)


class DoRAEmbedding(_Magnitude, LoRAEmbedding):
    """y = gain[x] * (W[x] + scale * A[x] B), ``m``: [vocabulary], one magnitude per token, as in mlx-lm.

    PEFT keeps one magnitude per dimension instead, over the whole vocabulary: the two cannot be converted.
    """

    def inner_products(self) -> tuple[mx.array, mx.array]:
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        cross = (project(self.embedding, b).T * a).sum(axis=1)
        return cross, ((a @ (b @ b.T)) * a).sum(axis=1)

    def __call__(self, x: mx.array) -> mx.array:
        """x: [...] tokens -> [..., dim]."""
        y = super().__call__(x)
        return self.gain()[x][..., None].astype(y.dtype) * y

    def as_linear(self, x: mx.array) -> mx.array:
        """x: [..., dim] -> logits [..., vocabulary]."""
        y = super().as_linear(x)
        return self.gain().astype(y.dtype) * y

    def merged_weight(self, weight: mx.array) -> mx.array:
        return self.gain()[:, None] * super().merged_weight(weight)


class DoRASwitchLinear(_Magnitude, LoRASwitchLinear):
    """DoRA of each expert's matrix; ``m``: [experts, out]. Dropout as in ``DoRALinear``."""

    def inner_products(self) -> tuple[mx.array, mx.array]:
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        product = self._project(a, mx.arange(self.linear.num_experts))  # [experts, r, out]
        cross = (product.swapaxes(-1, -2) * b).sum(axis=-1)
        return cross, ((b @ (a @ a.swapaxes(-1, -2))) * b).sum(axis=-1)

    def _project(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """W_e x without the bias."""
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        return y - mx.expand_dims(self.linear.bias[indices], -2) if "bias" in self.linear else y

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x: [..., 1, in], indices: [..., k] -> [..., k, 1, out]; or mlx-lm's sorted form."""
        gain = mx.expand_dims(self.gain()[indices], -2).astype(x.dtype)
        y, dropped = self._project(x, indices, sorted_indices), self.dropout(x)
        base = y if dropped is x else self._project(dropped, indices, sorted_indices)
        update = gain * (base + self.scale * self.low_rank(dropped, indices, sorted_indices))
        y = update if dropped is x else y - base + update
        return y + mx.expand_dims(self.linear.bias[indices], -2) if "bias" in self.linear else y

    def merged_weight(self, weight: mx.array) -> mx.array:
        return self.gain()[..., None] * super().merged_weight(weight)
