"""``lora_shrink``: the products x A of all adapters that read the same x, in one launch, for a few rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx

from .registry import Launch, enabled, maker, with_backward

MAX_ROWS = 32  # rows of x; for more a matrix product is faster
_TILE = 8  # rows of x to a threadgroup, whose sums fit in registers
MAX_MATRICES = 4


def lora_shrink(
    x: mx.array, a: list[mx.array], index: mx.array | None = None, ranks: mx.array | None = None
) -> mx.array:
    """The low-rank inputs of one or several adapters.

    Semantics::

        u = mx.concatenate([x @ matrix for matrix in a], axis=-1)           # one adapter: a[i] is [K, r_i]
        u[m] = x[m] @ a[i][index[m]][:, : ranks[index[m]]], else zeros      # many: a[i] is [adapters, K, r_i]
        return u[None]

    Args:
        x: [M, K], with M up to MAX_ROWS where the kernel runs.
        a: up to MAX_MATRICES matrices for the same x, in the dtype of x.
        index: [M] int32, the adapter of each row, negative for none. ranks: [adapters] int32, the columns in use.

    Returns: [splits, M, sum of r_i] float32, to be summed over the first axis (``lora_qmv`` does).
    """
    arrays = (x, *a) if index is None else (x, *a, index, ranks)
    return _operation(len(a), index is not None, enabled("lora_shrink"))(*arrays)


@functools.cache
def _operation(count: int, indexed: bool, metal: bool):
    """The differentiable operation; without Metal it is the reference."""
    if not metal:
        return functools.partial(_reference, count)

    def backward(primals, cotangent, _):
        floats, rest = primals[: 1 + count], primals[1 + count :]
        # The splits are only ever summed, so each has the gradient of the sum.
        gradients = mx.vjp(lambda *p: _reference(count, *p, *rest), floats, [cotangent[:1]])[1]
        return (*gradients, *(mx.zeros_like(r) for r in rest))

    return with_backward(functools.partial(_metal, count), backward)


def _reference(count: int, x: mx.array, *arrays: mx.array) -> mx.array:
    x, a, rest = x.astype(mx.float32), arrays[:count], arrays[count:]
    if not rest:
        return (x @ mx.concatenate([m.astype(mx.float32) for m in a], axis=-1))[None]
    index, ranks = rest
    safe = mx.maximum(index, 0)
    parts = []
    for matrix in a:
        u = (x[:, None] @ matrix.astype(mx.float32)[safe])[:, 0]
        counts = (mx.arange(matrix.shape[-1]) < ranks[safe][:, None]) & (index >= 0)[:, None]
        parts.append(mx.where(counts, u, 0))
    return mx.concatenate(parts, axis=-1)[None]


def tiles(M: int) -> tuple[int, int]:
    """Into how many threadgroups M rows of x are divided, and the rows of each; the last one may repeat some.

    The rows of each are a constant of the kernel, and M is not: MLX compiles 12 kernels for all M up to MAX_ROWS.
    """
    count = -(-M // _TILE)
    return count, -(-M // count)


def splits(K: int) -> int:
    """The number of parts of K, chosen so that a few columns keep enough threads busy."""
    return max(1, min(8, K // 1024))


def _metal(count: int, x: mx.array, *arrays: mx.array) -> mx.array:
    (M, K), widths = x.shape, tuple(matrix.shape[-1] for matrix in arrays[:count])
    launch = shrink_launch(maker(), widths, len(arrays) > count, x.dtype, M, K)
    return launch([x, *arrays], (splits(K), M, sum(widths)))


@functools.lru_cache(maxsize=1024)
def shrink_launch(make: Callable, widths: tuple[int, ...], indexed: bool, dtype: mx.Dtype, M: int, K: int) -> Launch:
    """The launch for matrices of these ranks. make: ``maker()``."""
    lanes = next((c for c in (1, 2, 4, 8) if 4 * c >= max(widths)), 16)  # side by side on the columns of one k
    columns, parts, simdgroups = -(-max(widths) // (4 * lanes)), splits(K), 8
    count, rows = tiles(M)
    names = ("x", *(f"a{i}" for i in range(len(widths))), *(("idx", "ranks") if indexed else ()))
    constants = {"T": dtype, "M": rows, "TILED": int(count > 1), "K": K, "C": lanes, "NSG": simdgroups}
    constants |= {"SPLITS": parts, "U": sum(widths)}
    return Launch(
        "lora_shrink",
        names,
        ("u", mx.float32),
        defines=(f"NPROJ {len(widths)}", *(["INDEXED"] if indexed else [])),
        constants=constants,
        groups=(count, parts * columns, len(widths) * (rows if indexed else 1)),
        threadgroup=(32, simdgroups, 1),
    )
