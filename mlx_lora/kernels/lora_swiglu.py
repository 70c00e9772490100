"""``lora_swiglu``: gate and up projections of an MLP with their updates, and SwiGLU (arXiv:2002.05202)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx

from .lora_qmv import rows_launch
from .lora_shrink import tiles
from .registry import Launch, enabled, maker, with_reference
from .stored import Form, Stored


def lora_swiglu(
    x: mx.array,
    bases: tuple[Stored, Stored],
    u: mx.array,
    b: tuple[mx.array, mx.array],
    scale: mx.array,
    offset: mx.array,
) -> mx.array:
    """Both projections of x and their product.

    Semantics::

        gate, up = (x @ W.T + s * (u.sum(axis=0)[:, o : o + r] @ m) for W, m, s, o in zip(bases, b, scale, offset))
        return mx.sigmoid(gate) * gate * up

    Args:
        x: [M, K]. bases: two weights [N, K] with the same storage; doubly quantized NF4 is not supported.
        u: from ``lora_shrink``. b: [r, N] each. scale: float32 [2]. offset: int32 [2], their first columns of u.

    Returns: [M, N] in the dtype of x.
    """
    gate, up = bases
    arrays = {"x": x, **gate.arrays(), **{f"{name}2": array for name, array in up.arrays().items()}}
    arrays |= {"u": u, "b": b[0], "b2": b[1], "scale": scale, "offset": offset}
    return with_reference(_metal, _reference, tuple(arrays), gate.form(), enabled("lora_swiglu"))(*arrays.values())


def _reference(names: tuple[str, ...], form: Form, *arrays: mx.array) -> mx.array:
    known = dict(zip(names, arrays, strict=True))
    x, u = known["x"].astype(mx.float32), known["u"].sum(axis=0)
    sides = []
    for side, end in enumerate(("", "2")):
        own = {name: known[name + end] for name in ("w", "scales", "biases") if name + end in known}
        b = known["b" + end].astype(mx.float32)
        low = mx.take(u, known["offset"][side] + mx.arange(b.shape[0]), axis=-1)
        side_value = x @ Stored.of(own, form).dequantized().T + known["scale"][side] * (low @ b)
        sides.append(side_value.astype(known["x"].dtype).astype(mx.float32))
    gate, up = sides
    return (mx.sigmoid(gate) * gate * up).astype(known["x"].dtype)


def _metal(names: tuple[str, ...], form: Form, *arrays: mx.array) -> mx.array:
    known = form.arrays(dict(zip(names, arrays, strict=True)))
    (M, K), u, (R, N) = known["x"].shape, known["u"], known["b"].shape[-2:]
    launch = swiglu_launch(maker(), tuple(known), form, known["x"].dtype, (M, K, R, N), u.shape[0])
    return launch(list(known.values()), (M, N))


@functools.lru_cache(maxsize=1024)
def swiglu_launch(
    make: Callable, names: tuple[str, ...], form: Form, dtype: mx.Dtype, sizes: tuple[int, int, int, int], splits: int
) -> Launch:
    """The launch for these inputs; arguments as of ``lora_qmv.qmv_launch``."""
    # Two sets of sums: with many rows of x, fewer rows of the weights fit in registers.
    return rows_launch("lora_swiglu", names, form, dtype, sizes, splits, 4 if tiles(sizes[0])[1] <= 4 else 2, 4, [])
