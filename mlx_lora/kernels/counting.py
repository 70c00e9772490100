"""Counts kernel launches without running anything: the primitives in a function's graph that reach the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import mlx.core as mx

from .registry import exportable

# These make views or nothing at all: no kernel runs for them.
_FREE = """AsStrided Broadcast BroadcastAxes Copy CustomTransforms Depends ExpandDims Flatten Full NumberOfElements
    Reshape Slice Split Squeeze StopGradient Transpose Unflatten View"""


def launches(f: Callable, *args: mx.array) -> Counter[str]:
    """How often ``f(*args)`` launches each primitive, by MLX's name for it. Nothing is evaluated.

    mlx-lora's kernels are ``CustomKernel``; with ``MLX_LORA_KERNELS=on`` they are counted on a machine without Metal
    too.
    """
    found: Counter[str] = Counter()

    def record(entry):
        if entry.get("type") == "primitive" and entry["name"] not in free:
            found[entry["name"]] += 1

    free = set(_FREE.split())
    with exportable():
        mx.export_function(record, f, *args)
    return found
