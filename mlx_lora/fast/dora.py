"""DoRA's norms kept between calls: ||W||^2 while the base stays as it is, and m / norm while decoding.

||W||^2 costs a pass over W, and <W, BA> another; a token costs one. Where kernels are used, ``dora_norm`` computes
the squared norms without writing W + scale * BA out.
"""

from __future__ import annotations

import mlx.core as mx

from ..base.modules import squared_row_norms
from ..kernels import dora_norm, enabled
from ..kernels.dora_norm import MAX_RANK
from .stored import stored
from .swap import Changes, evaluated, keep, kept, version


class KeptNorms(Changes):
    """Mixin for DoRA's layers; their base has ``Changes`` too."""

    def base_norms_squared(self) -> mx.array:
        squared = kept(self.base, "squared norms")
        if squared is None:
            known = stored(self.base) if enabled() else None
            squared = squared_row_norms(self.base) if known is None else dora_norm(known)
            if evaluated(squared):
                keep(self.base, "squared norms", squared)
        return squared

    def norms_squared(self) -> mx.array:
        known = stored(self.base) if enabled() and self.lora_a.ndim == 2 and self.slot == "linear" else None
        if known is None or self.rank > MAX_RANK:
            return super().norms_squared()
        return dora_norm(known, self.lora_a, self.lora_b, self.scale)

    def gain(self) -> mx.array:
        if self.training:
            return super().gain()
        known = kept(self, "gain")
        if known is not None and known[0] == version(self.base):
            return known[1]
        gain = super().gain()
        if evaluated(gain):
            keep(self, "gain", (version(self.base), gain))
        return gain
