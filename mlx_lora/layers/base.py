"""Shared by all adapter methods: the frozen base layer, the multiplier and the dropout.

Each method has its own file, which adds its parameters, ``__call__`` and ``merged_weight``. Functions about the base
layer itself are in ``base/modules.py``.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import dims
from ..errors import AdapterError


class AdapterLayer(nn.Module):
    """A trainable update over a frozen base layer.

    Sub-classes name the attribute that holds the base in ``slot`` (mlx-lm's names, so that parameter paths agree) and
    their own arrays in ``leaves``.

    Args:
        base: the layer to adapt; it is frozen.
        rank: rank of the update.
        scale: multiplier of the update.
        dropout: probability of dropping an input of the update, in training.
    """

    method = ""
    slot = "linear"
    leaves: tuple[str, ...] = ()

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float):
        super().__init__()
        base.freeze()
        self[self.slot] = base
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        self._rank = rank

    @property
    def base(self) -> nn.Module:
        return self[self.slot]

    @property
    def rank(self) -> int:
        return self._rank

    def merged_weight(self, weight: mx.array) -> mx.array:
        """The base's float32 ``weight`` with the update added; same shape, float32."""
        raise NotImplementedError

    def merged_bias(self) -> mx.array | None:
        """The bias with the update added, [out] or [experts, out]; None if there is no bias."""
        return self.base.get("bias")

    def adapter_weights(self) -> dict[str, mx.array]:
        """The layer's own arrays by leaf name: ``lora_a``, ``lora_b``, ..."""
        return {name: self[name] for name in self.leaves}

    def _extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={1 - self.dropout._p_1:g}"


def check_rank(base: nn.Module, rank: int) -> None:
    """Refuse a new low-rank update with a rank above its layer's. (Adapters from other tools may have such a rank.)

    Raises: AdapterError.
    """
    limit = min(dims(base))
    if rank > limit:
        raise AdapterError(
            f"rank {rank} is larger than the layer it should adapt ({dims(base)[0]} x {dims(base)[1]})",
            f"A rank of {limit} already expresses every update of this layer; choose a smaller one.",
        )


def uniform(bound: float, shape: tuple[int, ...], dtype: mx.Dtype, key: mx.array | None = None) -> mx.array:
    """U(-bound, bound), drawn in float32 so that every dtype starts from the same numbers."""
    return mx.random.uniform(-bound, bound, shape, key=key).astype(dtype)
