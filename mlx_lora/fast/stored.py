"""The parts of a base layer that the kernels read."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from ..base.modules import kind
from ..base.nf4 import nf4_stored
from ..kernels import Stored
from .swap import plain_class


def stored(base: nn.Module) -> Stored | None:
    """A base layer's weight as the kernels read it; None for a class that the kernels do not support."""
    call = plain_class(base).__call__
    if call is nn.Linear.__call__:
        return Stored(base.weight)
    if call is nn.QuantizedLinear.__call__ and kind(base) and base.get("global_scale") is None:
        return Stored(base.weight, base.scales, base.get("biases"), base.group_size, base.bits, base.mode)
    return nf4_stored(base.nf4) if hasattr(base, "nf4") else None


def computes_in(base: Stored) -> mx.Dtype | None:
    """The dtype of x that a kernel accepts with this weight; None for any dtype."""
    if base.mode == "nf4":
        return None
    dtype = (base.weight if base.mode == "dense" else base.scales).dtype
    return dtype if mx.issubdtype(dtype, mx.floating) else None


def reader(base: nn.Module, found: Stored) -> Callable[[], list[mx.array]]:
    """A function that returns the current arrays of ``base`` in the order of ``found.arrays()``.

    It reads at each call, so that new weights are never missed, and is fast enough for small models.
    """
    if found.mode == "nf4":
        return lambda: list(found.form().arrays(stored(base).arrays()).values())
    names = [name for name in ("weight", "scales", "biases") if base.get(name) is not None]
    return lambda: [base[name] for name in names]
