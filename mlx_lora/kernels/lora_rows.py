"""``lora_rows``: the updates of several adapters over many rows, sorted by adapter. MLX's own operations only."""

from __future__ import annotations

import mlx.core as mx

from ..device import is_cpu


def lora_rows(
    y: mx.array, x: mx.array, a: mx.array, b: mx.array, scale: mx.array, index: mx.array, ranks: mx.array
) -> mx.array:
    """Add to each row of a base layer's output the update of that row's adapter.

    Semantics::

        i = index[m]; low = (x[m] @ a[i])[: ranks[i]]
        return y[m] + scale[i] * (low @ b[i][: ranks[i]]), or y[m] where i is negative

    Sorting puts the rows of one adapter side by side, so that each product runs over a whole segment.

    Args:
        y: [M, N]. x: [M, K]. a: [adapters, K, R], b: [adapters, R, N], zero beyond the ranks. scale: [adapters].
        index: [M] int32, negative for none. ranks: [adapters] int32.
    """
    order = mx.argsort(index)
    chosen = index[order]
    safe = mx.maximum(chosen, 0)
    wide = mx.float32 if is_cpu() else x.dtype  # on a CPU, gather_mm supports only this
    u = mx.gather_mm(x[order][:, None].astype(wide), a.astype(wide), rhs_indices=safe, sorted_indices=True)[:, 0]
    counts = (mx.arange(a.shape[-1]) < ranks[safe][:, None]) & (chosen >= 0)[:, None]
    u = mx.where(counts, scale[safe][:, None] * u, 0).astype(wide)
    update = mx.gather_mm(u[:, None], b.astype(wide), rhs_indices=safe, sorted_indices=True)[:, 0]
    return y + update[mx.argsort(order)].astype(y.dtype)
