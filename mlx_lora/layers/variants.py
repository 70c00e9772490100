"""Variants of a method's layer: an update with its own bias."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import dims
from .lora import LoRALinear


class LoRABiasLinear(LoRALinear):
    """y = W x + b + scale * ((x A) B + lora_bias), ``lora_bias``: [out], 0 at the start (PEFT's ``lora_bias``)."""

    leaves = (*LoRALinear.leaves, "lora_bias")

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0, dtype=mx.float32, *, key=None):
        super().__init__(base, rank, scale, dropout, dtype, key=key)
        self.lora_bias = mx.zeros((dims(base)[1],), self.lora_b.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) + self.scale * self.lora_bias

    def merged_bias(self) -> mx.array:
        added = self.scale * self.lora_bias.astype(mx.float32)
        bias = super().merged_bias()
        return added if bias is None else bias.astype(mx.float32) + added


# Layer class -> the class that takes its place under the setting.
WITH_BIAS = {LoRALinear: LoRABiasLinear}
