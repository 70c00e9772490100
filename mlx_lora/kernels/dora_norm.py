"""``dora_norm``: squared row norms of an adapted weight, which is never written to memory (DoRA, arXiv:2402.09353)."""

from __future__ import annotations

import mlx.core as mx

from .registry import Launch, enabled
from .stored import Stored

MAX_RANK = 128  # 16 rows of b lie in threadgroup memory
_ROWS, _SIMDGROUPS = 4, 4


def dora_norm(base: Stored, a: mx.array | None = None, b: mx.array | None = None, scale: float = 1.0) -> mx.array:
    """Squared row norms of a base weight, with or without an update.

    Semantics::

        w = base.dequantized() + scale * (a @ b).T
        return w.square().sum(axis=1)

    Args:
        base: W [N, K]. a: [K, r]; b: [r, N].

    Returns: [N] float32, without a gradient: the backward pass treats the norm as a constant (section 4.3).
    """
    if a is not None:
        a, b = mx.stop_gradient(a), mx.stop_gradient(b)
    if not enabled("dora_norm") or (a is not None and a.shape[-1] > MAX_RANK):
        return mx.stop_gradient(_reference(base, a, b, scale))
    form, (N, K) = base.form(), base.shape
    inputs, defines = form.arrays(base.arrays()), form.defines(base.arrays())
    # The source does not use these names, but MLX caches kernels by name, and the input types must be part of it.
    types = {"W": base.weight if base.mode == "dense" else base.scales, **({} if a is None else {"A": a})}
    if a is not None:
        inputs |= {"a": a, "b": b, "scale": mx.array([scale], mx.float32)}
        defines.append("WITH_UPDATE")
    launch = Launch(
        "dora_norm",
        tuple(inputs),
        ("squared", mx.float32),
        defines=tuple(defines),
        constants={
            **{name: array.dtype for name, array in types.items() if mx.issubdtype(array.dtype, mx.floating)},
            "N": N,
            "K": K,
            "BITS": base.bits,
            "GROUP": base.group_size,
            "R": 1 if a is None else a.shape[-1],
            "ROWS": _ROWS,
            "NSG": _SIMDGROUPS,
        },
        groups=(1, -(-N // (_ROWS * _SIMDGROUPS)), 1),
        threadgroup=(32, _SIMDGROUPS, 1),
    )
    return mx.stop_gradient(launch(list(inputs.values()), (N,)))


def _reference(base: Stored, a: mx.array | None, b: mx.array | None, scale: float) -> mx.array:
    w = base.dequantized()
    if a is not None:
        w = mx.addmm(w, b.T.astype(mx.float32), a.T.astype(mx.float32), alpha=scale)
    return w.square().sum(axis=1)
