"""``nf4_dequantize``: QLoRA's 4-bit weights as floats (arXiv:2305.14314)."""

from __future__ import annotations

import mlx.core as mx

from .registry import Launch, enabled
from .stored import Stored


def nf4_dequantize(base: Stored, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The values of an NF4 weight, doubly quantized or not.

    Semantics::

        return base.dequantized().astype(dtype)      # NF4[code] * scale of its block

    Returns: [N, K] in ``dtype``. MLX refuses to differentiate the kernel.
    """
    numbers = 2 * base.weight.size
    if not enabled("nf4_dequantize") or numbers % 16:
        return base.dequantized().astype(dtype)
    form, threads = base.form(), numbers // 16
    inputs = form.arrays(base.arrays())
    launch = Launch(
        "nf4_dequantize",
        tuple(inputs),
        ("out", dtype),
        defines=tuple(form.defines(inputs)),
        constants={"T": dtype, "GROUP": base.group_size},
        groups=(-(-threads // 256), 1, 1),
        threadgroup=(256, 1, 1),
    )
    return launch(list(inputs.values()), base.shape)
