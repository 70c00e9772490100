"""DoRA's norms kept between calls: ||W||^2 while the base is unchanged, and m / norm while decoding.

||W||^2 costs a pass over W, and <W, BA> another; a token costs one. Where kernels are used, ``dora_norm`` computes
the squared norms without writing W + scale * BA out.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import squared_row_norms
from ..kernels import dora_norm, enabled
from ..kernels.dora_norm import MAX_RANK
from .stored import stored
from .swap import Changes, computed


def weight_arrays(base: nn.Module) -> list[mx.array]:
    """The arrays that hold the weight of a base layer, packed or not."""
    return [value for name, value in base.items() if isinstance(value, mx.array) and name != "bias"]


class KeptNorms(Changes):
    """Mixin for DoRA's layers."""

    def base_norms_squared(self) -> mx.array:
        known = stored(self.base) if enabled("dora_norm") else None
        return computed(
            self,
            "base norms",
            weight_arrays(self.base),
            lambda: squared_row_norms(self.base) if known is None else dora_norm(known),
        )

    def norms_squared(self) -> mx.array:
        known = stored(self.base) if enabled("dora_norm") and self.lora_a.ndim == 2 and self.slot == "linear" else None
        if known is None or self.rank > MAX_RANK:
            return super().norms_squared()
        return dora_norm(known, self.lora_a, self.lora_b, self.scale)

    def gain(self) -> mx.array:
        if self.training:
            return super().gain()
        arrays = [self.lora_a, self.lora_b, self.m, *weight_arrays(self.base)]
        return computed(self, "gain", arrays, super().gain, self.scale)
