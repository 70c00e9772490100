"""Several LoRA adapters on one layer, each row of a batch with its own (BGMV, arXiv:2310.18547). Inference only."""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError
from ..kernels import lora_rows, lora_shrink
from .siblings import Siblings, decode, fits


class Rows:
    """Which adapter each row of the batch takes; one object for all layers of a model."""

    def __init__(self):
        self.index: mx.array = mx.array([-1], mx.int32)  # [B]; one for all rows where there is one

    def of(self, x: mx.array) -> mx.array:
        """The adapter of each row of ``x`` flattened to [rows, in]; x: [B, ..., in]."""
        rows = x.size // x.shape[-1]
        if self.index.size not in (1, x.shape[0]):
            message = f"adapters are chosen for {self.index.size} rows, and the batch has {x.shape[0]}"
            raise AdapterError(message, "Call choose with a name for each row of the batch, or one for all.")
        each = self.index if self.index.size == x.shape[0] else mx.broadcast_to(self.index, (x.shape[0],))
        return each if rows == each.size else mx.repeat(each, rows // each.size)


class ManyLoRALinear(nn.Module):
    """y = W x + b + scale[i] * (x A[i]) B[i], i the adapter of the row; no update where it is negative.

    ``lora_a``: [adapters, in, R]; ``lora_b``: [adapters, R, out]; zero beyond an adapter's own rank.
    """

    siblings: Siblings | None = None

    def __init__(self, base: nn.Module, a: mx.array, b: mx.array, scale: mx.array, ranks: mx.array, rows: Rows):
        super().__init__()
        self.linear, self.lora_a, self.lora_b = base, a, b
        # Outside the module's dictionary: no parameters.
        object.__setattr__(self, "_scale", scale)
        object.__setattr__(self, "_ranks", ranks)
        object.__setattr__(self, "_rows", rows)
        object.__setattr__(self, "_shrink", shrink_rows(rows, ranks))
        self.freeze()

    @property
    def base(self) -> nn.Module:
        return self.linear

    @property
    def rank(self) -> int:
        return self.lora_a.shape[-1]

    def __call__(self, x: mx.array) -> mx.array:
        index = self._rows.of(x)
        if (base := fits(self, x)) is not None:
            return decode(self, base, x, self._shrink, self._scale, index=index, ranks=self._ranks)
        y = self.linear(x)
        flat = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        return lora_rows(*flat, self.lora_a, self.lora_b, self._scale, index, self._ranks).reshape(y.shape)


def shrink_rows(rows: Rows, ranks: mx.array) -> Callable:
    """The product that siblings share; the same function for layers of the same ranks."""
    return _shrink_rows(rows, tuple(ranks.tolist()))


@functools.lru_cache(maxsize=64)
def _shrink_rows(rows: Rows, ranks: tuple[int, ...]) -> Callable:
    known = mx.array(ranks, mx.int32)

    def shrink(x: mx.array, a: list[mx.array]) -> list[tuple[mx.array, int]]:
        u = lora_shrink(x.reshape(-1, x.shape[-1]), a, rows.of(x), known)
        return [(u, sum(m.shape[-1] for m in a[:i])) for i in range(len(a))]

    return shrink
