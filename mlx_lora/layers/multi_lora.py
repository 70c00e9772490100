"""Several LoRA adapters on one layer, one adapter per row of the batch (BGMV, arXiv:2310.18547). Inference only."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..errors import AdapterError
from ..kernels import lora_rows


class Rows:
    """Which adapter each row of the batch uses; one object for all layers of a model."""

    def __init__(self):
        self.choose([-1])

    def choose(self, adapters: Sequence[int]) -> None:
        """Set the adapter of each row, negative for none; a single value applies to all rows."""
        self.index: mx.array = mx.array(adapters, mx.int32)  # [B], or [1] for all rows alike
        self.only = adapters[0] if len(set(adapters)) == 1 else None  # the adapter, if all rows have the same

    def of(self, x: mx.array) -> mx.array:
        """The adapter of each row of ``x`` flattened to [rows, in]. x: [B, ..., in] -> int32 [rows].

        Raises: AdapterError: the batch has another number of rows than adapters were chosen for.
        """
        rows = x.size // x.shape[-1]
        if self.index.size not in (1, x.shape[0]):
            message = f"adapters are chosen for {self.index.size} rows, and the batch has {x.shape[0]}"
            raise AdapterError(message, "Call choose with one name per row of the batch, or one name for all rows.")
        each = self.index if self.index.size == x.shape[0] else mx.broadcast_to(self.index, (x.shape[0],))
        return each if rows == each.size else mx.repeat(each, rows // each.size)


class MultiLoRALinear(nn.Module):
    """y = W x + b + scale[i] * (x A[i]) B[i], where i is the row's adapter; no update if i is negative.

    Args:
        a: [adapters, in, R]. b: [adapters, R, out]. Both are zero beyond an adapter's own rank.
        scale: float32 [adapters]. ranks: int32 [adapters].
        rows: says which adapter each row uses.
    """

    def __init__(self, base: nn.Module, a: mx.array, b: mx.array, scale: mx.array, ranks: mx.array, rows: Rows):
        super().__init__()
        self.linear, self.lora_a, self.lora_b = base, a, b
        # The underscore keeps them out of the parameters: scales stay float32 when the model's dtype is set.
        self._scale, self._ranks, self._rows = scale, ranks, rows
        # Views of each adapter's own part, outside the module's parameters and submodules.
        pairs = zip(ranks.tolist(), scale.tolist(), strict=True)
        object.__setattr__(self, "_each", [(a[i, :, :r], b[i, :r], s) for i, (r, s) in enumerate(pairs)])
        self.freeze()

    @property
    def base(self) -> nn.Module:
        return self.linear

    @property
    def rank(self) -> int:
        return self.lora_a.shape[-1]

    def __call__(self, x: mx.array) -> mx.array:
        """x: [B, ..., in] -> [B, ..., out]."""
        if self._rows.only is not None:  # plain products, without gathering
            return self._same_for_all(x, self._rows.only)
        index, y = self._rows.of(x), self.linear(x)
        flat = y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        return lora_rows(*flat, self.lora_a, self.lora_b, self._scale, index, self._ranks).reshape(y.shape)

    def _same_for_all(self, x: mx.array, index: int) -> mx.array:
        """The layer with one adapter for all rows. x: [B, ..., in] -> [B, ..., out]."""
        y = self.linear(x)
        if index < 0:
            return y
        a, b, scale = self._each[index]
        return mx.addmm(y, x @ a, b, alpha=scale) if a.shape[-1] else y
